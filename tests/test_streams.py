"""Output that cannot fail, whoever reads it or does not."""

import errno
import os
import pty
import subprocess
import sys
import threading
import time
import warnings

import pytest
from conftest import ROOT

from data.common import disk, errors, safe, streams

TALK = """
import sys, warnings
from data.common import errors, safe

def main(argv):
    with open(argv[0], "w") as file:
        for i in range(2000):
            print("out", i, flush=True)
            print("bar", i, end="\\r", file=sys.stderr, flush=True)
            file.write(f"{i}\\n")
    print("done")
    raise errors.UserError("the end") if argv[1:] else SystemExit(0)

safe.run(main, sys.argv[1:])
"""


def talk(*argv, **popen):
    """A process that prints and writes a file of its own at the same time, without torch."""
    return subprocess.Popen([sys.executable, "-c", TALK, *map(str, argv)], cwd=ROOT, **popen)


def nobody(kind):
    """What a stream leads to that nobody reads."""
    if kind == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe() if kind == "dead reader" else pty.openpty()
    os.close(reader)
    return writer


@pytest.mark.parametrize("kind", ["full disk", "dead reader", "closed terminal"])
@pytest.mark.parametrize("which", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_the_work_goes_on_when_nobody_reads(which, kind, tmp_path):
    gone = nobody(kind)
    process = talk(
        tmp_path / "file", **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **dict.fromkeys(which, gone)}
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "".join(f"{i}\n" for i in range(2000))
    assert out is None or out.endswith(b"out 1999\ndone\n")
    assert err is None or err.endswith(b"bar 1999\r")


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2], [1, 2]])
def test_what_was_closed_at_the_start_is_not_a_file_of_ours(closed, tmp_path):
    """The first file that is opened would get the number, and everything that is printed."""
    process = talk(tmp_path / "file", preexec_fn=lambda: [os.close(descriptor) for descriptor in closed])
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "".join(f"{i}\n" for i in range(2000))


def test_an_exit_code_does_not_need_a_reader(tmp_path):
    with open("/dev/full", "w") as gone:
        assert talk(tmp_path / "file", "fail", stdout=gone, stderr=gone).wait(60) == 2


def test_a_file_of_ours_on_a_full_disk_is_an_error_all_the_same(capfd):
    def main(argv):
        with disk.naming("/dev/full"), open("/dev/full", "w") as file:
            file.write("a step")

    with pytest.raises(SystemExit) as left:
        safe.run(main, [])
    assert left.value.code == 3 and "the disk refused to write /dev/full" in capfd.readouterr().err


def test_who_stops_reading_is_not_waited_for_and_can_come_back(monkeypatch):
    """`| less`, a terminal that hangs: the training goes on, and what is printed once he reads again arrives."""
    monkeypatch.setattr(streams, "PATIENCE", 0.2)
    reader, writer = os.pipe()
    output, began = streams.Output(writer), time.monotonic()
    for _ in range(1000):
        assert output.write(b"x" * 9000) <= 9000
    assert 0.2 <= time.monotonic() - began < 2
    os.read(reader, 2**20)  # all that a pipe holds
    output.write(b"here again")
    assert os.read(reader, 100) == b"here again"
    os.close(reader), os.close(writer)


def test_a_slow_reader_gets_every_byte():
    reader, writer = os.pipe()
    found = []

    def read():
        while data := os.read(reader, 5000):
            found.append(data)
            time.sleep(0.001)

    thread = threading.Thread(target=read)
    thread.start()
    text = "".join(f"line {i} ×\n" for i in range(50_000))
    before = os.dup(1)
    os.dup2(writer, 1), os.close(writer)
    try:
        with streams.that_cannot_fail():
            print(text, end="")
    finally:
        os.dup2(before, 1), os.close(before)
    thread.join()
    os.close(reader)
    assert b"".join(found).decode() == text


def test_an_error_is_never_on_a_bars_line(capfd):
    def main(argv):
        print("captions:  12%|█", end="", file=sys.stderr, flush=True)
        raise errors.UserError("bad")

    with pytest.raises(SystemExit):
        safe.run(main, [])
    assert capfd.readouterr().err == "captions:  12%|█\nerror: bad\n"


def test_a_librarys_warning_is_one_line_once_and_ends_nothing(capfd):
    """PYTHONWARNINGS=error is set where people test their own programs."""

    def main(argv):
        for _ in range(3):
            warnings.warn("this GPU\nis too old", stacklevel=2)
            warnings.warn("will go", DeprecationWarning, stacklevel=2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        safe.run(main, [])
    assert capfd.readouterr() == ("warning: this GPU is too old\n", "")


def test_letters_that_the_terminal_does_not_have(tmp_path):
    code = "import sys; from data.common import safe; safe.run(lambda _: print('64 × 64'), [])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"64 \\xd7 64\n", b"")


def test_streams_are_put_back(capfd):
    before = sys.stdout, sys.stderr
    with pytest.raises(OSError, match="bug"), streams.that_cannot_fail():
        assert sys.stdout is not before[0]
        raise OSError(errno.EPIPE, "bug")
    assert (sys.stdout, sys.stderr) == before
