"""Files that are never half written, one run per folder, errors in one line, signals."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data.common import door, safe


def python(code, *argv, **popen):
    """A process with `code` and without torch: it starts in a tenth of a second."""
    argv = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def finish(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def wait_for(process, word):
    assert process.stdout.readline().strip() == word


# ---- atomic_write


def test_the_file_appears_whole_and_readable(tmp_path):
    path = tmp_path / "new" / "file"
    with safe.atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and os.listdir(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644  # a temporary file's own 0600 would lock colleagues out


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with safe.atomic_write(path) as file:
            file.write(b"half")
            1 / 0
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_kill_in_the_middle_leaves_the_old_file_and_the_next_command_cleans_up(tmp_path):
    """At SDXL's size each would be half a gigabyte, under a name that nobody sees."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / ".file2.other").write_bytes(b"not ours")
    code = (
        "import sys, time; from data.common.safe import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n"
        "    f.write(b'half'); f.flush(); print('half', flush=True); time.sleep(60)"
    )
    process = python(code, path)
    wait_for(process, "half")
    process.kill()
    finish(process)
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 3
    with door.hold(tmp_path, "--output_dir"):
        assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == [".file2.other", ".lock", "file"]


def test_bytes_are_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    """If the file were renamed first, a power cut would leave an empty one under the final name."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    with safe.atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    assert done == ["fsync", "replace", "fsync"]  # the bytes, the name, the folder


# ---- errors and exit codes


@pytest.mark.parametrize(
    "error, code",
    [
        (safe.UserError("row 3:\nbad"), 2),
        (safe.MachineError("disk"), 3),
        (safe.NumbersError("loss"), 4),
        (safe.Stopped(signal.SIGTERM, "stopped"), 143),
        (safe.Stopped(signal.SIGINT, "stopped"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3),
        (OSError(errno.EFBIG, "File too large"), 3),
    ],
)
def test_every_outcome_has_its_exit_code_and_one_line(error, code, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as left:
        safe.run(main, [])
    captured = capsys.readouterr()
    assert left.value.code == code
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


def test_a_bug_keeps_its_traceback():
    """A file that is not there is no full disk. Behind a line about disks nobody would find the bug."""
    with pytest.raises(FileNotFoundError):
        safe.run(lambda argv: open("/nowhere/at/all"), [])


def test_a_full_disk_is_named_with_what_is_needed_and_free(tmp_path):
    with pytest.raises(safe.MachineError, match=r"the cache needs 1000000000 MiB in .* MiB are free"):
        safe.need_space(tmp_path, 10**6 * 1000 * 2**20, "the cache")
    safe.need_space(tmp_path, 1, "the cache")


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_lets_the_work_finish(signum):
    process = python(LOOP.format(0))
    wait_for(process, "ready")
    process.send_signal(signum)
    code, out, err = finish(process)
    assert code == 0 and f"saved {int(signum)}" in out
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


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert safe.sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_it_needs_nothing_but_the_standard_library():
    """A mistyped flag must be answered before the seconds that torch takes."""
    code = (
        "import sys; before = set(sys.modules); import data.common.safe, data.common.flags; "
        "new, ours = set(sys.modules) - before, sys.stdlib_module_names | {'data'}; "
        "print([m for m in new if m.split('.')[0] not in ours])"
    )
    assert finish(python(code))[:2] == (0, "[]\n")
    assert Path(safe.__file__).parent == ROOT / "data" / "common"


def test_a_gpu_out_of_memory_exits_3_with_the_knobs(capsys):
    """torch's error is told by its name, so torch is not imported for it. A bug's RuntimeError keeps its traceback."""

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")

    with pytest.raises(SystemExit) as stop:
        safe.run(full, [])
    printed = capsys.readouterr().err
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
        printed = capsys.readouterr().err
        assert stop.value.code == 3 and f"the {what} is out of memory" in printed and printed.count("\n") == 1

    def broken(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        safe.run(broken, [])
