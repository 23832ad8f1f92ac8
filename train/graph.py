"""The micro-step recorded as a CUDA graph, one per shape, and replayed: the GPU never waits for Python to start a kernel.

At batch 1 SDXL's forward and backward are some 4,000 kernels of 10 microseconds; starting each from Python takes longer.
"""

import functools
import statistics

import torch

WARM_UP = 2  # calls before recording: libraries set themselves up and kernels.cu is compiled, which cannot be recorded


class Eager:
    """Call `function` with a batch of CPU tensors moved to `device`."""

    def __init__(self, function, device):
        self.function, self.device = function, device

    def __call__(self, batch):
        return self.function(**{name: part.to(self.device) for name, part in batch.items()})


class Graphed:
    """The same, as one graph for each shape of batch. All of them share their memory.

    function: tensors by name -> a tensor. It may add to the tensors in `changes`, which recording leaves as they were.
    batches: one of every shape that will be asked for, the largest first.
    What a call returns is overwritten by the next one.
    """

    def __init__(self, function, device, changes, batches):
        self.function, self.pool = function, torch.cuda.graph_pool_handle()
        batches = [{name: part.to(device) for name, part in batch.items()} for batch in batches]
        before = [tensor.cpu() for tensor in changes]
        # All shapes before the first is recorded: a graph keeps its memory, and what runs beside it would take as much again
        on_side_stream(lambda: [function(**inputs) for inputs in batches for _ in range(WARM_UP)])
        self.recorded = {_shapes(inputs): self._record(inputs) for inputs in batches}
        for tensor, value in zip(changes, before):
            tensor.copy_(value)

    def __call__(self, batch):
        graph, inputs, output = self.recorded[_shapes(batch)]
        for name, part in batch.items():  # pinned, a copy does not wait for the work before it
            inputs[name].copy_(part.pin_memory(), non_blocking=True)
        graph.replay()
        return output

    def _record(self, inputs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, side_stream()):
            output = self.function(**inputs)
        return graph, inputs, output


def _shapes(batch):
    return tuple(batch[name].shape for name in sorted(batch))


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
