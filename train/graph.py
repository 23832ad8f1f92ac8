"""The micro-step captured as a CUDA graph and replayed, so that the GPU never waits for Python to start a kernel.

At batch 1 SDXL's forward and backward are some 4,000 kernels of 10 microseconds; starting each from Python takes
longer.
"""

import functools
import statistics

import torch

# Calls before capturing, in which libraries set themselves up and kernels are compiled, which cannot be captured.
WARM_UP = 2


class Eager:
    """Call `function` with a batch of CPU tensors moved to `device`."""

    def __init__(self, function, device):
        self.function, self.device = function, device

    def __call__(self, batch):
        return self.function(**{name: tensor.to(self.device) for name, tensor in batch.items()})


def preparer(device, capture):
    """-> prepare(function, batches): Captured where there is a GPU and `capture` is on, else Eager.

    All that one preparer captures shares its memory, because only one of them computes at a time.
    """
    if device.type != "cuda" or not capture:
        return lambda function, batches: Eager(function, device)
    pool = torch.cuda.graph_pool_handle()
    return lambda function, batches: Captured(function, device, batches, pool)


class Captured:
    """The same, as one captured graph for each shape of batch. All graphs share their memory.

    function: tensors by name -> a tensor. What it writes while it is captured is rubbish.
    batches: one of every shape that will be asked for, the largest first.
    pool: the memory of graphs captured before, which this one may use as well.
    What a call returns is overwritten by the next one.
    """

    def __init__(self, function, device, batches, pool=None):
        self.function, self.pool = function, pool or torch.cuda.graph_pool_handle()
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        # All shapes run before the first is captured, because a graph keeps its memory and a run next to it would need
        # as much again.
        on_side_stream(lambda: [function(**inputs) for inputs in batches for _ in range(WARM_UP)])
        self.graphs = {_shapes(inputs): self._capture(inputs) for inputs in batches}

    def __call__(self, batch):
        graph, inputs, output = self.graphs[_shapes(batch)]
        for name, tensor in batch.items():  # a pinned copy does not wait for the work before it
            inputs[name].copy_(tensor.pin_memory(), non_blocking=True)
        graph.replay()
        return output

    def _capture(self, inputs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, side_stream()):
            output = self.function(**inputs)
        return graph, inputs, output


def _shapes(batch):
    return tuple(batch[name].shape for name in sorted(batch))


@functools.cache
def side_stream():
    """The one stream that everything here runs on, because libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


def on_side_stream(function):
    """function() on the side stream, after the work that was asked for before and ahead of what comes."""
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
