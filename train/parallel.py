"""Several GPUs: each rank trains on its own slots of a step, and one sum of all gradients makes the ranks agree.

    slot of a step          0      1      2      3            gradient_accumulation_steps = 4
    2 ranks              rank 0 rank 1 rank 0 rank 1          slot = micro-step · ranks + rank

A step has the same slots however many ranks share them, so that N ranks train what one rank trains, in less time. All
start from the same weights, add up one flat gradient, and step alike: nothing else is ever sent. torchrun says by
environment variables who is who (data/common/ranks.py).
"""

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from data.common import ranks
from data.common.errors import MachineError

PATIENCE = timedelta(hours=2)  # for ranks that wait while the first one saves, measures and draws


class Alone:
    """One process has all slots."""

    index, count = 0, 1

    def from_first(self, value):
        """The first rank's value, on every rank."""
        return value

    def add_up(self, gradient, loss):
        """Replace the gradient (in place) by the sum of all ranks' -> the sum of their losses."""
        return loss

    def leave(self):
        """Say goodbye after the last step, or the others' libraries would warn of it."""

    def agree(self, signal):
        """A signal that any rank received, the same on all of them; None where none did."""
        return signal


class Ranks(Alone):
    """One of several processes."""

    def __init__(self, device):
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.processes = [None] * self.count  # (host, pid) of each
        dist.all_gather_object(self.processes, (socket.gethostname(), os.getpid()))
        self._sum(torch.zeros(1, device=device))  # takes the memory that sums need before it is planned what is left

    def from_first(self, value):
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def add_up(self, gradient, loss):
        # On the CPU first, after waiting for the GPU: a rank that ended shows there at once, but sums on the GPU that
        # were asked for wait for ever.
        total = self._sum(loss.cpu())
        self._sum(gradient)
        return total.to(loss.device)

    def agree(self, signal):
        return int(self._sum(torch.tensor(signal or 0), dist.ReduceOp.MAX)) or None

    def leave(self):
        dist.destroy_process_group()

    def _sum(self, tensor, op=dist.ReduceOp.SUM):
        try:
            dist.all_reduce(tensor, op)
        except RuntimeError as error:
            gone, reason = self._gone(), str(error).splitlines()[0]
            who = f"rank {' and '.join(gone)} ended" if gone else "a sum of all ranks failed; where one of them ended"
            raise MachineError(f"{who}, its own last lines say why ({reason})") from None
        return tensor

    def _gone(self):
        """The ranks of this host that ended. It waits for them, because who is killed loses its connections first."""
        here = socket.gethostname()
        for _ in range(20):
            gone = [str(i) for i, (host, pid) in enumerate(self.processes) if host == here and not _lives(pid)]
            if gone:
                return gone
            time.sleep(0.1)
        return []


def _lives(pid):
    """Whether a process is there and is more than the record of its end."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True


def join(device):
    """-> Alone, or Ranks once all that torchrun started are there. Sums on the GPU go by NCCL, on the CPU by gloo."""
    if ranks.count() == 1:
        return Alone()
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backends, timeout=PATIENCE)
    return Ranks(device)
