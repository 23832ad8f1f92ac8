"""The layer: y = W x + b + (alpha / rank) B (A x)."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora.linear import LoRALinear, lora


def layer(base=None, rank=4, alpha=6.0, filled=True, seed=0, parts=1):
    g = torch.Generator().manual_seed(seed)
    adapted = LoRALinear(base or nn.Linear(12, 8), rank, alpha, g, parts)
    if filled:
        with torch.no_grad():
            adapted.B.normal_(generator=g)
    return adapted


def test_forward_is_the_papers_equation():
    """Written out in fp64 from the weights: a factor, a transpose or the bias forgotten would show."""
    adapted, x = layer(), torch.randn(3, 5, 12)
    W, b, A, B = (p.detach().double() for p in (adapted.base.weight, adapted.base.bias, adapted.A, adapted.B))
    wanted = torch.einsum("oi,...i->...o", W + 6 / 4 * B[0] @ A, x.double()) + b
    torch.testing.assert_close(adapted(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_starts_as_the_base_with_a_of_deviation_one_over_rank():
    """Else the first step starts from a damaged model, or with updates of another size at another rank."""
    for rank in (4, 16):
        adapted = layer(nn.Linear(4096, 64), rank, filled=False)
        x = torch.randn(2, 4096)
        assert torch.equal(adapted(x), adapted.base(x))
        assert not adapted.B.any()
        assert adapted.A.std().item() == pytest.approx(1 / rank, rel=0.03)
        assert abs(adapted.A.mean().item()) < 0.03 / rank


def test_scale_zero_is_the_base_bit_for_bit_whatever_is_in_b():
    """Multiplied by 0 rather than skipped, an infinite B would give NaN."""
    adapted, x = layer(), torch.randn(3, 12)
    with torch.no_grad():
        adapted.B[0, 0] = torch.inf
    adapted.scale = 0
    assert torch.equal(adapted(x), adapted.base(x))


def test_scale_is_read_at_run_time_and_linear():
    """A scale baked in when the layer is built could not be turned up and down in one process."""
    adapted, x = layer(), torch.randn(3, 12)
    full = adapted(x) - adapted.base(x)
    for scale in (0.5, -1.0, 2.0):
        adapted.scale = scale
        torch.testing.assert_close(adapted(x) - adapted.base(x), scale * full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_base_of_any_dtype_is_computed_in_it(dtype):
    """A and B of another dtype would cost a conversion each, in every layer and every micro-step."""
    adapted = layer(nn.Linear(12, 8).to(dtype))
    y = adapted(torch.randn(3, 12).to(dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype
    for part in (adapted.A, adapted.B):
        assert part.dtype == part.grad.dtype == dtype and part.grad.any()
    assert adapted.base.weight.grad is None and adapted.base.bias.grad is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_output_and_gradients_equal_those_of_the_plain_formula(dtype, tolerance):
    """The layer takes fewer kernels and writes its gradients by hand; autograd of the plain lines is the judge."""
    adapted = layer(nn.Linear(12, 8)).to(dtype)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(15, 12, generator=g).to(dtype), torch.randn(15, 8, generator=g).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    A, B = (p.detach().clone().requires_grad_() for p in (adapted.A, adapted.B[0]))
    ys = adapted(inputs[0]), lora(inputs[1], adapted.base, A, B, scaling=6 / 4)
    for y in ys:
        (y * weight).sum().backward()

    def close(found, wanted):  # to the largest number, because where terms cancel, a small one is rounding alone
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())

    close(*ys)
    close(inputs[0].grad, inputs[1].grad)
    close(adapted.A.grad, A.grad)
    close(adapted.B.grad[0], B.grad)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5)])
def test_gradients_of_the_whole_layer_equal_finite_differences(parts, shape):
    """They are written by hand: a factor or a transpose forgotten would train with a wrong gradient, unseen."""
    adapted = layer(nn.Linear(5, 6), parts=parts).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, adapted.A.detach().requires_grad_(), adapted.B.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, A, B: torch.func.functional_call(adapted, {"A": A, "B": B}, x), inputs)


def test_same_generator_state_gives_the_same_a():
    assert torch.equal(layer(seed=3).A, layer(seed=3).A)
    assert not torch.equal(layer(seed=3).A, layer(seed=4).A)


def test_parts_side_by_side_equal_layers_of_their_own():
    """Forward and gradients: q's update must not leak into k."""
    parts = [layer(nn.Linear(12, 8), seed=seed) for seed in range(3)]
    stacked = layer(nn.Linear(12, 24), parts=3)
    with torch.no_grad():
        stacked.base.weight.copy_(torch.cat([p.base.weight for p in parts]))
        stacked.base.bias.copy_(torch.cat([p.base.bias for p in parts]))
        stacked.A.copy_(torch.cat([p.A for p in parts]))
        stacked.B.copy_(torch.cat([p.B for p in parts]))
    x, weight = torch.randn(2, 5, 12), torch.randn(2, 5, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ys = stacked(inputs[0]), torch.cat([p(inputs[1]) for p in parts], dim=-1)
    for y in ys:
        (y * weight).sum().backward()
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(*ys)
    close(inputs[0].grad, inputs[1].grad)
    close(stacked.A.grad, torch.cat([p.A.grad for p in parts]))
    close(stacked.B.grad, torch.cat([p.B.grad for p in parts]))


def test_an_input_used_twice_gets_both_gradients():
    """The backward adds into the gradient it is given: into one that somebody else still reads, it would be wrong."""
    first, second, x = layer(seed=1), layer(seed=2), torch.randn(3, 12, requires_grad=True)
    (first(x) + second(x) + x.sum()).square().sum().backward()
    plain = x.detach().requires_grad_()
    y = (
        sum(F.linear(plain, l.base.weight + l.scaling * l.B[0] @ l.A, l.base.bias) for l in (first, second))
        + plain.sum()
    )
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_an_input_without_gradient_costs_the_base_no_backward():
    """Text: its gradient would be computed in 70 layers and thrown away."""
    adapted, x = layer(), torch.randn(3, 12)
    asked = []
    adapted.base.register_full_backward_hook(lambda *_: asked.append(1))
    y = adapted(x)
    y.square().sum().backward()
    assert not asked and adapted.A.grad.any() and adapted.B.grad.any()
