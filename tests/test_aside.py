"""The gradients of A and B on a stream of their own: the same bits, ready when the backward is."""

import pytest
import torch

from lora.aside import aside
from lora.linear import LoRALinear


def test_on_a_cpu_it_is_the_function():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(aside(torch.mm, a, b), a @ b)


@pytest.mark.gpu
def test_eager_or_captured_the_gradients_are_there_and_the_same(monkeypatch):
    """What the stream still reads must not be written over: the layers' activations come and go in the same memory."""

    def layer():
        return LoRALinear(torch.nn.Linear(640, 640, device="cuda", dtype=torch.half), 32, 16)

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
        patch.setattr("lora.products.aside", lambda function, *tensors: function(*tensors))
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
