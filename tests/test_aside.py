"""The gradients of A and B on a stream of their own: the same bits, ready when the backward is."""

import pytest
import torch

from lora.aside import aside
from lora.linear import LoRALinear


def test_on_a_cpu_it_is_the_function():
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    assert aside(torch.mm, out, a, b) is out and torch.equal(out, a @ b)


def layer():
    return LoRALinear(torch.nn.Linear(640, 640, device="cuda", dtype=torch.half), 32, 16)


@pytest.mark.gpu
def test_the_gradients_memory_is_of_the_stream_that_reads_them():
    """Or emptying the cache takes it while they are read, because that waits for the memory's own stream alone."""
    part, x = layer(), torch.randn(4096, 640, device="cuda", dtype=torch.half)
    gradients = torch.autograd.grad(part(x).float().square().mean(), [part.A, part.B])
    segments = torch.cuda.memory_snapshot()
    for gradient in gradients:
        at = gradient.data_ptr()
        (of,) = [s for s in segments if s["address"] <= at < s["address"] + s["total_size"]]
        assert of["stream"] == torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_eager_or_captured_the_gradients_are_there_and_the_same(monkeypatch):
    """What the stream still reads must not be written over: the layers' activations come and go in the same memory."""

    layers, x = [layer() for _ in range(40)], torch.randn(4096, 640, device="cuda", dtype=torch.half)
    for part in layers:
        part.B.data.normal_(0, 0.02)
    parameters = [p for part in layers for p in (part.A, part.B)]

    def gradients():
        h = x
        for part in layers:
            h = h + part(h)
        return torch.autograd.grad(h.float().square().mean(), parameters)

    with monkeypatch.context() as patch:
        patch.setattr("lora.products.aside", lambda function, out, *tensors: function(*tensors, out=out))
        wanted = [gradient.clone() for gradient in gradients()]
    for _ in range(3):
        assert all(map(torch.equal, gradients(), wanted))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        gradients()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients()
    for _ in range(3):
        for gradient in captured:
            gradient.zero_()
        graph.replay()
        assert all(map(torch.equal, captured, wanted))
