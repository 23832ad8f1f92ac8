"""What differs from platform to platform, in one place. Linux is what is tested.

A system is told by what it lacks and not by its name, so that a test can take it away. psutil is asked where there is
no /proc; requirements.txt names it for those systems.
"""

import errno
import importlib.util
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath

from data.common.errors import MachineError

ROOT = Path("/")  # of the folders in which Linux tells of itself; other systems have none
WINDOWS = importlib.util.find_spec("fcntl") is None  # every other system that Python runs on has it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer
READERS = 64  # who can hold a shared lock at the same time on Windows
HANGUPS = ("SIGHUP", "SIGBREAK")  # a terminal that closes; the second is Windows' word for it
PATIENCE = 2  # seconds that Windows gets to let a file go
# Of a cgroup, the kernel's word for a container: where the groups are, its limit, what it holds, what of it is only
# kept of files and can go. Version 2, and version 1 of older systems.
LIMITS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


# ---- Cores and memory


def share_the_cores():
    """Let torch's waiting threads sleep soon, because next to other programs they would spin in each other's way.

    Called before torch is imported, whose OpenMP reads it then. On two cores a step of the toy takes 0.15 s alone. Next
    to two busy programs it took 16 s; now 0.4, when they run at the start, and 0.8 when they come later.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0" if others_running() * 2 >= os.cpu_count() else "10000")


def others_running():
    """How many other threads of this machine want a core, the least of five looks; 0 where the system does not tell."""
    table, found = ROOT / "proc/loadavg", []
    while table.exists() and len(found) < 5:  # 0.52 0.58 0.59 3/389 4711
        found.append(int(_text(table).split()[3].split("/")[0]) - 1)
        time.sleep(0.005)
    return min(found, default=0)


def free_memory():
    """Bytes of RAM that programs can still have: the least of what the machine has and what a container's limits leave.

    Nobody but the kernel looks at such a limit: the process that passes it is killed without a word.
    """
    return min([_free_on_the_machine(), *_left_by_limits()])


def _free_on_the_machine():
    table = ROOT / "proc/meminfo"
    if not table.exists():
        import psutil

        return psutil.virtual_memory().available
    lines = dict(line.split(":") for line in _text(table).splitlines())
    return int(lines.get("MemAvailable", lines["MemFree"]).split()[0]) * 1024


def _left_by_limits():
    """Yield the bytes that each limit over this process leaves: of its own cgroup, and of all that it is in."""
    table = ROOT / "proc/self/cgroup"
    for line in _text(table).splitlines() if table.exists() else ():  # 0::/docker/4711, or 9:memory:/docker/4711
        _, controller, own = line.split(":", 2)
        if controller not in LIMITS:
            continue
        groups, limit, used, files = LIMITS[controller]
        own = PurePosixPath(own)
        for place in (own, *own.parents):  # in a container these are often not there, and the root is its own
            folder = ROOT / groups / place.relative_to("/")
            if (folder / limit).exists() and _text(folder / limit).strip() != "max":
                facts = dict(words.split() for words in _text(folder / "memory.stat").splitlines())
                can_go = sum(int(facts.get(name, 0)) for name in files)
                yield max(0, int(_text(folder / limit)) - int(_text(folder / used)) + can_go)


def _text(path):
    return path.read_text(encoding="utf-8")


def need_memory(needed, what):
    """Raise MachineError when less than `needed` bytes of RAM are free, because Linux just ends who takes more."""
    free = free_memory()
    if needed > free:
        raise MachineError(
            f"{what} needs {needed / 2**30:.1f} GiB of RAM, {free / 2**30:.1f} are free; end other programs, or give "
            "the container more"
        )


def peak_memory():
    """The most RAM that this process has held so far, bytes."""
    if WINDOWS:
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back(pages):
    """Let the system take back the memory that a map of a file (mmap.mmap) holds; it is read again when needed."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is not None:  # Windows has none, and takes them when it is short of memory
        pages.madvise(advice)


# ---- Locks


def lock(file, shared=False):
    """Lock an open file until it is closed or its process ends. -> False where somebody else's lock forbids it.

    shared: others may hold shared locks on it at the same time. Raises OSError with an errno of NO_LOCKS where the file
    system has no locks.
    """
    if WINDOWS:
        return _lock_bytes(file, shared)
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_bytes(file, shared):
    """The same where only ranges of bytes can be locked, and by one owner each: Windows.

    A reader takes one of READERS bytes, whichever is free, and a writer all of them, as SQLite did on Windows 95. The
    bytes need not be there.
    """
    import msvcrt

    for start, count in [(i, 1) for i in range(READERS)] if shared else [(0, READERS)]:
        os.lseek(file.fileno(), start, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, count)
        except PermissionError:
            continue
        return True
    return False


def holders(path):
    """The pids of other processes that hold a lock on the file, as far as the system tells (Linux: /proc/locks)."""
    table, found = ROOT / "proc/locks", set()
    if not table.exists():
        return []
    facts = os.stat(path)
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    for line in _text(table).splitlines():  # 1: FLOCK ADVISORY READ 4711 08:01:131 0 EOF
        words = line.split()
        if "->" not in words and place in words:
            found.add(int(words[words.index(place) - 1]))
    return sorted(found - {os.getpid()})


# ---- Files


def replace(source, target):
    """os.replace. Windows refuses while somebody has one of the two open, often a virus scanner for a moment."""
    until = time.monotonic() + (PATIENCE if WINDOWS else 0)
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)


def write_at(descriptor, data, at):
    """Write bytes at a place of a file. -> how many, fewer on a disk that fills up. Windows has no os.pwrite."""
    os.lseek(descriptor, at, os.SEEK_SET)
    return os.write(descriptor, data)


def sync_data(descriptor):
    """Bring a file's bytes and length to the disk; where there is no call for these alone, all that is known of it."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder):
    """Bring the names in a folder to the disk. Raises OSError where that is not offered.

    On Windows, which opens no folders, a rename on NTFS is in the disk's journal.
    """
    if WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(file, size):
    """Give an open file `size` bytes of the disk. Raises OSError with ENOSYS where the system cannot (macOS).

    On Windows a file's length is taken of the disk at once.
    """
    allocate = getattr(os, "posix_fallocate", None)
    if allocate:
        allocate(file.fileno(), 0, size)
    elif not WINDOWS:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    elif size > os.fstat(file.fileno()).st_size:
        file.truncate(size)


def taken(facts):
    """Bytes of the disk that a file takes, by its os.stat; Windows tells its length alone."""
    return getattr(facts, "st_blocks", facts.st_size / 512) * 512


def find_a_place_for_downloads():
    """Let the hub's packages write into a temporary folder where the home folder cannot be written, or there is none.

    In a container whose user has no name they would else make a folder called ~ in the current one. What is in a
    read-only cache of the hub is used there; only datasets, which write beside what they read, are unpacked elsewhere.
    Called before they are imported, because they read the environment then.
    """
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = Path(os.path.expanduser(os.environ.get("HF_HOME", default)))
    nearest = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if WINDOWS or (cache.is_absolute() and os.access(nearest, os.W_OK | os.X_OK)):
        return
    spare = Path(tempfile.gettempdir()) / f"huggingface-{os.getuid()}"
    spare.mkdir(mode=0o700, exist_ok=True)
    if spare.stat().st_uid != os.getuid():  # somebody else could put other models into it
        return
    os.environ.setdefault("HF_DATASETS_CACHE", str(spare / "datasets"))
    if cache.is_dir():
        where = f"models that are in it are used, datasets are unpacked in {spare}"
    else:
        os.environ.setdefault("HF_HOME", str(spare))
        where = f"what is downloaded goes to {spare}"
    print(f"{cache}: cannot be written; {where}; HF_HOME names another folder")


# ---- Terminals


def encoding(stream, descriptor):
    """The encoding that bytes written to a descriptor are read in. stream: Python's own for it, or None.

    A console of Windows reads bytes in its code page, although Python's stream, which does not write bytes, says UTF-8.
    """
    return (WINDOWS and os.device_encoding(descriptor)) or (stream.encoding if stream else "utf-8")
