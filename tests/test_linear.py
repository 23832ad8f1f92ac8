"""The layer: y = W x + b + (alpha / rank) B (A x)."""

import pytest
import torch
from torch import nn

from lora.linear import LoRALinear


def layer(base=None, rank=4, alpha=6.0, filled=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    adapted = LoRALinear(base or nn.Linear(12, 8), rank, alpha, g)
    if filled:
        with torch.no_grad():
            adapted.B.normal_(generator=g)
    return adapted


def test_forward_is_the_papers_equation():
    """Written out in fp64 from the weights: a factor, a transpose or the bias forgotten would show."""
    adapted, x = layer(), torch.randn(3, 5, 12)
    W, b, A, B = (p.detach().double() for p in (adapted.base.weight, adapted.base.bias, adapted.A, adapted.B))
    wanted = torch.einsum("oi,...i->...o", W + 6 / 4 * B @ A, x.double()) + b
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
def test_base_of_any_dtype_keeps_it_while_a_and_b_stay_fp32(dtype):
    """A and B in fp16 would lose steps of 1e-4, and GradScaler refuses their gradients."""
    adapted = layer(nn.Linear(12, 8).to(dtype))
    y = adapted(torch.randn(3, 12).to(dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype
    for part in (adapted.A, adapted.B):
        assert part.dtype == part.grad.dtype == torch.float32 and part.grad.any()
    assert adapted.base.weight.grad is None and adapted.base.bias.grad is None


def test_gradients_equal_finite_differences():
    """A cast or a detach in the wrong place would train with a wrong gradient and nobody would see."""
    adapted = layer(nn.Linear(5, 3)).double()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, adapted.A.detach().requires_grad_(), adapted.B.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, A, B: torch.func.functional_call(adapted, {"A": A, "B": B}, x), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_layer_gives_the_same_output_and_is_the_plain_layer(dtype):
    adapted = layer(nn.Linear(12, 8).to(dtype))
    x = torch.randn(3, 12).to(dtype)
    before, base = adapted(x), adapted.base
    merged = adapted.merge()
    assert merged is base and type(merged) is nn.Linear and merged.weight.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(merged(x), before, rtol=tolerance, atol=tolerance)


def test_merge_takes_the_present_scale():
    """A merge at scale 0.5 that wrote the full update would be twice as strong as what was seen."""
    adapted, x = layer(), torch.randn(3, 12)
    adapted.scale = 0.5
    before = adapted(x)
    torch.testing.assert_close(adapted.merge()(x), before, rtol=1e-5, atol=1e-5)


def test_same_generator_state_gives_the_same_a():
    assert torch.equal(layer(seed=3).A, layer(seed=3).A)
    assert not torch.equal(layer(seed=3).A, layer(seed=4).A)


def test_quantised_base():
    """bitsandbytes' 4-bit layer: its packed weight has another shape and dtype; only its output may be used."""
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    adapted, x = layer(base), torch.randn(2, 64)
    torch.testing.assert_close(adapted(x), base(x) + 1.5 * x @ adapted.A.T @ adapted.B.T, rtol=1e-4, atol=1e-4)
    adapted(x).square().sum().backward()
    assert adapted.A.grad.any() and adapted.B.grad.any()
    with pytest.raises(TypeError, match="unquantised"):
        adapted.merge()
