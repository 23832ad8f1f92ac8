"""The door of every command: the folders that it works in are looked at and locked before the work begins.

Standard library only. A part is named as "state/" when it is a folder, and as "metrics.jsonl" when it is a file.
"""

import contextlib
import os
import stat
from pathlib import Path

from data.common import system
from data.common.disk import DISK_ERRORS, UNFINISHED
from data.common.errors import MachineError, UserError


@contextlib.contextmanager
def hold(folder, flag, parts=(), lock_file=".lock"):
    """Create `folder` and lock it, so that one command at a time writes into it. The lock dies with its owner.

    flag: what names the folder. parts: what the command writes there. lock_file: a cache's .lock is held by readers.
    Raises UserError when the folder or a part is of the wrong kind, cannot be written, or another command works in it.
    """
    folder = can_be_written(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / lock_file, "ab")
    except OSError as error:
        kind = MachineError if error.errno in DISK_ERRORS else UserError
        raise kind(f"{flag} {folder}: not a folder that can be written ({error.strerror})") from error
    with file:
        if not lock(file, folder):
            raise UserError(f"{flag} {folder}: {_processes(file.name)} working here; wait for it or stop it")
        for part in parts:
            look_at(folder / part, "folder" if part.endswith("/") else "file", write=True)
        for place in (folder, *(folder / part for part in parts if part.endswith("/"))):
            for leftover in place.glob(f".*.????????{UNFINISHED}"):  # what killed writers left
                leftover.unlink()
        yield folder


def can_be_written(folder, flag):
    """-> the folder as a Path. Raises UserError naming the flag when it is none, or none can be made there."""
    try:
        look_at(folder, "folder", write=True)
    except UserError as error:
        raise UserError(f"{flag} {folder}: not a folder that can be written ({error})") from None
    except OSError as error:  # a name that no disk takes
        raise UserError(f"{flag} {folder}: not a folder that can be written ({error.strerror})") from None
    return Path(folder)


def lock(file, folder, shared=False):
    """system.lock, but a file system without locks is said, and is no reason to stop."""
    try:
        return system.lock(file, shared)
    except OSError as error:
        if error.errno not in system.NO_LOCKS:
            raise
        print(f"{folder}: this file system has no locks ({error.strerror}); start one command at a time on it")
        return True


def look_at(path, kind, write=False):
    """Raise UserError when `path` is there and is not a file or folder, as `kind` says, that can be read (and written).

    What is not there is fine, as long as the folder that it will be in can be written.
    """
    path = Path(path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if write:
            parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
            look_at(parent, "folder", write=True)
        return
    if not path.exists():
        target = f" to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        raise UserError(f"{path}: a link{target}; remove it, or bring back what it leads to")
    mode = path.stat().st_mode
    if not (stat.S_ISDIR(mode) if kind == "folder" else stat.S_ISREG(mode)):
        raise UserError(f"{path}: not a {kind}; move it away, or use another folder")
    if not os.access(path, os.R_OK | (os.X_OK if kind == "folder" else 0)):
        raise UserError(f"{path}: no permission to read it; change its owner or mode")
    if write and not os.access(path, os.W_OK):
        raise UserError(f"{path}: no permission to write to it, or its disk is read-only; use another folder")


@contextlib.contextmanager
def reading(cache):
    """Hold a finished cache together with other readers, so that no row of theirs is changed. Links lead to one lock.

    Raises UserError when a precompute changes it now.
    """
    with contextlib.ExitStack() as held:
        for mode in ("ab", "rb"):  # a disk that cannot be written may still have the lock's file
            try:
                file = held.enter_context(open(Path(cache) / ".lock", mode))
            except OSError:
                continue
            if not lock(file, cache, shared=True):
                raise UserError(f"{cache}: {_processes(file.name)} changing this cache; wait for it or stop it")
            break
        yield


@contextlib.contextmanager
def changing(cache, harmless):
    """Hold a cache against readers, because rows that they read may change. Raises UserError naming them.

    harmless(): whether those rows stay as they are; asked where there are readers, which then go on.
    """
    with open(Path(cache) / ".lock", "ab") as file:
        if not lock(file, cache) and not harmless():
            raise UserError(
                f"{cache}: {_processes(file.name)} reading this cache, and rows that they read would change; "
                "wait, or use another --cache_dir"
            )
        yield


def _processes(path):
    """Who holds the lock on a file: "process 12 is", or "processes 12, 13 are"."""
    pids = system.holders(path)
    if len(pids) > 1:
        return f"processes {', '.join(map(str, pids))} are"
    return f"process {pids[0]} is" if pids else "another process is"
