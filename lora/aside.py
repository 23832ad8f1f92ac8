"""Work of a backward that nothing else in it waits for, on a GPU stream of its own. Skip it on a first reading.

The products that make the gradients of A and B are small and many. Alone, each leaves most of a GPU idle; next to the
rest of the backward they cost little: 53.8 ms of a micro-step become 52.2 (1024², batch 1, an H100).
"""

import functools

import torch
from torch.autograd import Variable

HELD = 2**26  # bytes that such work may hold on to


def aside(function, out, *tensors):
    """function(*tensors, out=out) -> out, to be called in a backward; at the backward's end it is filled.

    `out` is the caller's, because memory belongs to the stream that it was allocated on: memory of this one's, freed
    after the backward, would be taken from those who still read it. CUDA calls that an illegal memory access.
    """
    return _aside(out.device).run(function, out, tensors) if out.is_cuda else function(*tensors, out=out)


class _Aside:
    """What a function reads and writes is kept until it is waited for, or the work that follows would write over it.

    That happens every now and then, not only at the backward's end, by which gigabytes would be held.
    """

    def __init__(self, device):
        self.stream, self.kept = torch.cuda.Stream(device), []

    def run(self, function, out, tensors):
        Variable._execution_engine.queue_callback(self.join)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function(*tensors, out=out)
        self.kept += out, *tensors
        if sum(tensor.nbytes for tensor in self.kept) > HELD:
            self.join()
        return out

    def join(self):
        if self.kept:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.kept = []


_aside = functools.cache(_Aside)
