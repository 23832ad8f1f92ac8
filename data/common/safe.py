"""What every command needs around its work: errors that a user can act on, whole files, one command at a time per run.

Standard library only, so that every layer may import it and a mistyped flag is answered before torch is imported.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from data.common import system


class UserError(Exception):
    """Bad input or usage: one line that names the file, row or flag and what to do. Exit code 2."""

    code = 2


class MachineError(UserError):
    """The machine is too small or full (disk, GPU, memory). Exit code 3."""

    code = 3


class NumbersError(UserError):
    """Something that must be finite is not. Exit code 4."""

    code = 4


class Stopped(UserError):
    """Stopped by a signal after everything was saved. Exit code 128 + signal."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.code = 128 + signum


def run(main, argv):
    """Run a command's `main(argv)` and end the process with the exit code of its outcome."""
    # On import these two report optional parts that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    system.share_the_cores()
    before = {signum: signal.signal(signum, _leave) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(argv)
    except UserError as error:
        sys.exit(_report(error, error.code))
    except (RuntimeError, MemoryError) as error:
        full = out_of_memory(error)
        if not full:
            raise
        knobs = "use a smaller --vram_gib, --train_batch_size, --rank or --resolution"
        reason = str(error).split("\n")[0]
        sys.exit(_report(f"the {full} is out of memory: {knobs} ({reason})", 3))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted; run the same command to go on", 130))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a flag's value was taken for a path
            sys.exit(_report(f"{str(error.filename)[:60]}…: {error.strerror}", 2))
        if error.errno not in DISK_ERRORS:
            raise
        where, free = "", ""
        if error.filename:
            where = f" {error.filename}"
            free = f", {free_space(Path(error.filename).parent) / 2**20:.0f} MiB are free there"
        message = f"the disk refused to write{where}: {error.strerror}{free}; free some and run the same command"
        sys.exit(_report(message, 3))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def out_of_memory(error):
    """Whose memory ran out in this error: "GPU", "machine", or None when it is another error.

    It is told by torch's words, because torch is not imported here.
    """
    if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error):
        return "GPU"
    words = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")
    return "machine" if isinstance(error, MemoryError) or any(word in str(error) for word in words) else None


def _leave(signum, _frame):
    """End at once, which is right until there is something to save (Signals).

    An exception instead would make C++ code that is being imported call abort().
    """
    _say("error: interrupted; run the same command to go on")
    os._exit(128 + signum)


def _say(line):
    """Write to stderr from a signal's handler, where a print() would raise if it interrupted another one."""
    with contextlib.suppress(OSError):  # raised when nobody reads stderr any more
        os.write(2, f"{line}\n".encode())


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def _report(message, code):
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return code


class Signals:
    """Ask a loop to stop: `received` is the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self):
        self.received = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum, _frame):
        self.received = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _say(f"\n{signal.Signals(signum).name}: finishing this step and saving; once more ends at once")


UNFINISHED = ".unfinished"  # a temporary file is .NAME.xxxxxxxx.unfinished


@contextlib.contextmanager
def naming(path):
    """Make an OSError in here name `path`, because a write through a buffer and its close() do not know their file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file next to `path`. After the block it is on disk under that name, or `path` is untouched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial(tempfile.NamedTemporaryFile, mode, prefix=f".{path.name}.", suffix=UNFINISHED, delete=False)
    with naming(path), unfinished(dir=path.parent) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    sync_folder(path.parent)


def sync_folder(folder):
    """Make the names in `folder` durable, because without it a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(string):
    """The string with "?" for what UTF-8 cannot hold: half a surrogate pair, or another encoding's bytes in a name."""
    return string.encode("utf-8", "replace").decode()


def is_text(string):
    """Whether all of the string can be written as UTF-8."""
    return printable(string) == string


def free_space(folder):
    """Bytes that are free where `folder` is or will be."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def need_space(folder, needed, what):
    """Raise MachineError when `folder`'s disk has less than `needed` bytes free."""
    free = free_space(folder)
    if needed > free:
        raise MachineError(f"{what} needs {needed / 2**20:.0f} MiB in {folder}, where {free / 2**20:.0f} MiB are free")


def free_memory():
    """Bytes of RAM that programs can still have. A container's own limit is not looked at."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines.get("MemAvailable", lines["MemFree"]).split()[0]) * 1024


def need_memory(needed, what):
    """Raise MachineError when less than `needed` bytes of RAM are free, because Linux just ends who takes more."""
    free = free_memory()
    if needed > free:
        raise MachineError(
            f"{what} needs {needed / 2**30:.1f} GiB of RAM, {free / 2**30:.1f} are free; end other programs"
        )


def sha256_file(path):
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
