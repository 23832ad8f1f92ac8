"""What differs from platform to platform, in one place. Linux is what is tested."""

import errno
import fcntl
import os
import time
from pathlib import Path

from data.common.errors import MachineError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer


def share_the_cores():
    """Let torch's waiting threads sleep soon, because next to other programs they would spin in each other's way.

    Called before torch is imported, whose OpenMP reads it then. On two cores a step of the toy takes 0.15 s alone. Next
    to two busy programs it took 16 s; now 0.4, when they run at the start, and 0.8 when they come later.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0" if others_running() * 2 >= os.cpu_count() else "10000")


def others_running():
    """How many other threads of this machine want a core, the least of five looks; 0 where the system does not tell."""
    table, found = Path("/proc/loadavg"), []
    while table.exists() and len(found) < 5:  # 0.52 0.58 0.59 3/389 4711
        found.append(int(table.read_text().split()[3].split("/")[0]) - 1)
        time.sleep(0.005)
    return min(found, default=0)


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
