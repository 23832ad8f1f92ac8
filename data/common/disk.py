"""Files that are whole or not there, on disks that may be full, slow or of a simple kind."""

import contextlib
import errno
import hashlib
import os
import shutil
import warnings
from pathlib import Path

from data.common import system
from data.common.errors import MachineError, UserError, printable

UNFINISHED = ".unfinished"  # a temporary file is .NAME.xxxxxxxx.unfinished
NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # what simple file systems answer


def numbers(*names):
    """The numbers of those errors that this system knows."""
    return {number for number, name in errno.errorcode.items() if name in names}


FULL = numbers("ENOSPC", "EDQUOT", "EFBIG")
UNREACHABLE = numbers("ESTALE", "ENOTCONN", "ENODEV", "ENXIO", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ESHUTDOWN")
DISK_ERRORS = FULL | UNREACHABLE | numbers("EIO", "EREMOTEIO", "EUCLEAN", "ECONNABORTED")
# EROFS counts here, where work is under way; at the door it is a folder badly chosen.
MACHINE_ERRORS = DISK_ERRORS | numbers("EROFS", "EMFILE", "ENFILE", "ENOMEM")

READ_ONLY = numbers("EROFS", "EACCES", "EPERM")  # what a folder that cannot be written answers

WHAT_TO_DO = {
    errno.EACCES: "change its owner or mode, or use another",
    errno.EPERM: "change its owner or mode, or use another",
    errno.EISDIR: "a file is needed there; move the folder away, or name the file in it",
    errno.ENOTDIR: "a part of this path is a file; use another path",
    errno.ENOENT: "bring it back, or name another",
    errno.ELOOP: "links lead round in a circle; remove one of them",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "end other programs",
    errno.ENOMEM: "end other programs",
}


def in_words(error):
    """The UserError or MachineError that an OSError is to a user; None where it is a bug, which keeps its traceback.

    It is the user's where it is about a file that he can see to, and the machine's where the disk itself fails. What
    is about no file is a bug: an error of a write or a read gets its file's name by naming().
    """
    reason = error.strerror or str(error)
    where = "" if error.filename is None else printable(str(error.filename))
    if error.errno in FULL:
        free = f", {free_space(Path(where).parent) / 2**20:.0f} MiB are free there" if where else ""
        message = f"the disk refused to write{where and ' '}{where}: {reason}{free}; free some and run the same command"
        return MachineError(message)
    if error.errno in MACHINE_ERRORS:
        what_to_do = WHAT_TO_DO.get(error.errno, "see to its disk")
        return MachineError(f"{where or 'the machine'}: {reason}; {what_to_do}, and run the same command")
    if where:
        return UserError(f"{where}: {reason}; {WHAT_TO_DO.get(error.errno, 'use another')}")
    return None


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
    """Open a temporary file next to `path`. After the block it is on disk under that name, or `path` is untouched.

    Its mode is what the umask makes of 0666, as for every new file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.urandom(4).hex()}{UNFINISHED}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}  # the same bytes on every system
    with naming(path):
        try:
            with open(unfinished, mode.replace("w", "x"), **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            system.replace(unfinished, path)  # closed before, because Windows renames no open file
        except BaseException:
            with contextlib.suppress(OSError):  # on a disk that fails this fails too, and the first error counts
                os.unlink(unfinished)
            raise
    sync_folder(path.parent)


def sync_folder(folder):
    """Make the names in `folder` durable, because without it a power cut can undo a rename."""
    try:
        system.sync_folder(folder)
    except OSError as error:
        if error.errno not in {*NOT_OFFERED, errno.EBADF}:
            error.filename = str(folder)
            raise
        warnings.warn(f"{folder}: its disk does not sync folders; a power cut may undo the last save", stacklevel=2)


def claim(file, size):
    """Take `size` bytes of the disk for an open file now, because a full disk would show only after hours of work.

    Where the file system cannot, it is said, and what is free is looked at instead. Raises MachineError naming the file
    when the disk does not have them.
    """
    folder = Path(file.name).parent
    try:
        system.set_aside(file, size)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise MachineError(f"{file.name}: {error.strerror}; {size / 2**20:.0f} MiB are needed") from error
        warnings.warn(f"{folder}: its disk cannot set room aside for a file; keep enough of it free", stacklevel=2)
        need_space(folder, size - system.taken(os.fstat(file.fileno())), file.name)


def check_readable(path):
    """Raise the OSError that says why a file cannot be read; safetensors says of any such file that it is not there."""
    with naming(path), open(path, "rb") as file:
        file.read(1)


def free_space(folder):
    """Bytes that are free where `folder` is or will be."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def need_space(folder, needed, what):
    """Raise MachineError when `folder`'s disk has less than `needed` bytes free."""
    free = free_space(folder)
    if needed > free:
        raise MachineError(f"{what} needs {needed / 2**20:.0f} MiB in {folder}, where {free / 2**20:.0f} MiB are free")


def sha256_file(path):
    """Hex sha256 of a file's content."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
