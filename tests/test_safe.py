"""One run per folder, errors in one line, signals."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data.common import errors, safe


def python(code, *argv, **popen):
    """A process with `code` and without torch: it starts in a tenth of a second."""
    argv = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def finish(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def wait_for(process, word):
    assert process.stdout.readline().strip() == word


# ---- errors and exit codes


@pytest.mark.parametrize(
    "error, code",
    [
        (errors.UserError("row 3:\nbad"), 2),
        (errors.MachineError("disk"), 3),
        (errors.NumbersError("loss"), 4),
        (errors.Stopped(signal.SIGTERM, "stopped"), 143),
        (errors.Stopped(signal.SIGINT, "stopped"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2),
    ],
)
def test_every_outcome_has_its_exit_code_and_one_line(error, code, capfd):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as left:
        safe.run(main, [])
    captured = capfd.readouterr()
    assert left.value.code == code
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(errno.EINVAL, "Invalid argument"), ChildProcessError()])
def test_a_bug_keeps_its_traceback(error):
    """Behind a line about disks nobody would find the bug."""

    def main(argv):
        raise error

    with pytest.raises(type(error)):
        safe.run(main, [])


def test_a_message_is_one_line_of_readable_length(capfd):
    """A row whose caption is a file of megabytes, with all that a terminal obeys."""

    def main(argv):
        raise errors.UserError("row 3: its caption '" + "word \x1b[2J\n" * 10**6 + "' is no caption; write another")

    began = time.monotonic()
    with pytest.raises(SystemExit):
        safe.run(main, [])
    line = capfd.readouterr().err
    assert (
        line.startswith("error: row 3: its caption 'word") and line.endswith("write another\n") and "\x1b" not in line
    )
    assert line.count("\n") == 1 and len(line) < 1000 and time.monotonic() - began < 1


# ---- signals

LOOP = """
import time
from data.common.safe import Signals
stop = Signals()
print('ready', flush=True)
while not stop.received:
    time.sleep(0.01)
print('saving', flush=True)
time.sleep({})
print('saved', int(stop.received))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_lets_the_work_finish(signum):
    process = python(LOOP.format(0))
    wait_for(process, "ready")
    process.send_signal(signum)
    code, out, err = finish(process)
    counts_as = signal.SIGTERM if signum == signal.SIGHUP else signum
    assert code == 0 and f"saved {int(counts_as)}" in out
    assert signum.name in err  # the user hears that it was understood


@pytest.mark.parametrize(
    "first, second",
    [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_ends_at_once(first, second):
    process = python(LOOP.format(60))
    wait_for(process, "ready")
    process.send_signal(first)
    wait_for(process, "saving")
    process.send_signal(second)
    began = time.monotonic()
    code, out, _ = finish(process)
    assert code == -second and "saved" not in out and time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals, code",
    [
        ([signal.SIGHUP, signal.SIGHUP], 0),  # a terminal that closes: from its shell and from the kernel
        ([signal.SIGHUP, signal.SIGTERM], 0),
        ([signal.SIGTERM, signal.SIGHUP], 0),  # systemd's way to end a session
        ([signal.SIGHUP, signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM),
    ],
)
def test_a_terminal_that_closes_is_no_second_signal(signals, code):
    process = python(LOOP.format(0.5))
    wait_for(process, "ready")
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.1)
    found, out, _ = finish(process)
    assert found == code and ("saved 15" in out) == (code == 0)


def test_who_was_started_by_nohup_does_not_hear_the_terminal_close():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + LOOP.format(0)
    process = python(code)
    wait_for(process, "ready")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert f"saved {int(signal.SIGINT)}" in finish(process)[1]


@pytest.mark.parametrize("signum, code", [(signal.SIGHUP, 143), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_there_is_something_to_save(signum, code):
    main = "lambda argv: (print('ready', flush=True), time.sleep(60))"
    process = python(f"import time; from data.common import safe; safe.run({main}, [])")
    wait_for(process, "ready")
    process.send_signal(signum)
    assert finish(process) == (code, "", "error: interrupted; run the same command to go on\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_something_is_printed(signum):
    """The handler's own line, printed while a progress bar prints, was a RuntimeError in the middle of a step."""
    code = """
import sys
from data.common import door, safe

def main(argv):
    stop, sys.stderr = safe.Signals(), open(2, "w", buffering=1)
    while not stop.received:
        sys.stderr.write("x" * 150 + "\\n")  # until nobody reads any more
    print("saved")

safe.run(main, [])
"""
    process = python(code)
    time.sleep(1.5)
    process.send_signal(signum)
    time.sleep(0.2)
    code, out, err = finish(process)
    assert (code, out) == (0, "saved\n") and f"{signum.name}: finishing this step" in err, err.replace("x", "")


def test_it_needs_nothing_but_the_standard_library():
    """A mistyped flag must be answered before the seconds that torch takes."""
    code = (
        "import sys; before = set(sys.modules); import data.common.safe, data.common.flags; "
        "new, ours = set(sys.modules) - before, sys.stdlib_module_names | {'data'}; "
        "print([m for m in new if m.split('.')[0] not in ours])"
    )
    assert finish(python(code))[:2] == (0, "[]\n")
    assert Path(safe.__file__).parent == ROOT / "data" / "common"


def test_a_gpu_out_of_memory_exits_3_with_the_knobs(capfd):
    """torch's error is told by its name, so torch is not imported for it. A bug's RuntimeError keeps its traceback."""

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")

    with pytest.raises(SystemExit) as stop:
        safe.run(full, [])
    printed = capfd.readouterr().err
    assert stop.value.code == 3 and "--vram_gib" in printed and printed.count("\n") == 1

    memory = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
    for error, what in (
        (memory, "machine"),
        (MemoryError(), "machine"),
        (RuntimeError("can't start new thread"), "machine"),
        (RuntimeError("CUDA error: out of memory\nMore"), "GPU"),
    ):

        def fails(_):
            raise error

        with pytest.raises(SystemExit) as stop:
            safe.run(fails, [])
        printed = capfd.readouterr().err
        assert stop.value.code == 3 and f"the {what} is out of memory" in printed and printed.count("\n") == 1

    def broken(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        safe.run(broken, [])
