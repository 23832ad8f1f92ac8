"""What differs from platform to platform, in one place. Linux is what is tested."""

import errno
import fcntl
import os
from pathlib import Path

from data.common.errors import MachineError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer


def share_the_cores():
    """Let torch's waiting threads sleep soon, because next to other programs they would spin in each other's way.

    Called before torch is imported, whose OpenMP reads it then. Without it a step of the toy takes 0.16 s on two idle
    cores and 16 s next to two busy programs; with it 0.16 and 0.7, where one thread takes 1.0.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def lock(file, shared=False):
    """Lock an open file until it is closed or its process ends. -> False where somebody else's lock forbids it.

    shared: others may hold shared locks on it at the same time. Raises OSError with an errno of NO_LOCKS where the file
    system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holders(path):
    """The pids of other processes that hold a lock on the file, as far as the system tells (Linux: /proc/locks)."""
    table, found = Path("/proc/locks"), set()
    if not table.exists():
        return []
    facts = os.stat(path)
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    for line in table.read_text().splitlines():  # 1: FLOCK ADVISORY READ 4711 08:01:131 0 EOF
        words = line.split()
        if "->" not in words and place in words:
            found.add(int(words[words.index(place) - 1]))
    return sorted(found - {os.getpid()})


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
