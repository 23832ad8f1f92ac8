"""The micro-step recorded once per shape as a CUDA graph and replayed: the GPU never waits for Python to start a kernel.

At batch 1 SDXL's forward and backward are some 4,000 kernels of 10 microseconds; starting each from Python takes longer.
"""

import functools
import statistics

import torch

WARM_UP = 2  # calls before recording: libraries set themselves up and Triton compiles, which cannot be recorded


class Eager:
    """Call `function` with a batch of CPU tensors moved to `device`."""

    def __init__(self, function, device):
        self.function, self.device = function, device

    def __call__(self, batch):
        return self.function(**{name: part.to(self.device) for name, part in batch.items()})


class Graphed:
    """The same, as one graph per set of shapes. All of them share their memory.

    function: tensors by name -> a tensor. It may add to the tensors in `changes`, which recording leaves as they were.
    What a call returns is overwritten by the next one.
    """

    def __init__(self, function, device, changes):
        self.eager, self.changes = Eager(function, device), changes
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, batch):
        shapes = tuple(part.shape for part in batch.values())
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record({name: part.to(self.eager.device) for name, part in batch.items()})
        graph, inputs, output = self.recorded[shapes]
        for name, part in batch.items():  # pinned, a copy does not wait for the work before it
            inputs[name].copy_(part.pin_memory(), non_blocking=True)
        graph.replay()
        return output

    def _record(self, inputs):
        before = [tensor.cpu() for tensor in self.changes]
        on_side_stream(lambda: [self.eager(inputs) for _ in range(WARM_UP)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, side_stream()):
            output = self.eager(inputs)
        for tensor, value in zip(self.changes, before):
            tensor.copy_(value)
        return graph, inputs, output


@functools.cache
def side_stream():
    """The one stream that everything here runs on: libraries keep a workspace for each."""
    return torch.cuda.Stream()


def on_side_stream(function):
    """function() on the side stream, after what was asked for before and before what comes."""
    side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()):
        result = function()
    torch.cuda.current_stream().wait_stream(side_stream())
    return result


def seconds(function):
    """Median time that the GPU takes for function(), without the time that Python takes to start its kernels."""
    on_side_stream(function)
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=side_stream()):
        function()
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
