"""Projections side by side: the same attention with fewer layers."""

import copy

import pytest
import torch
from conftest import predict, unet_inputs
from diffusers.models.attention_processor import Attention

from lora.attention import attend, fuse_projections


def test_fused_attention_equals_diffusers_own():
    """In fp64, self and cross, with and without bias: k and v swapped would be a UNet that was never trained."""
    for text_width, bias in ((None, False), (12, False), (None, True), (12, True)):
        attention = (
            Attention(query_dim=16, cross_attention_dim=text_width, heads=2, dim_head=8, bias=bias).double().eval()
        )
        fused = torch.nn.Sequential(copy.deepcopy(attention))
        fuse_projections(fused)
        x = torch.randn(2, 9, 16, dtype=torch.float64)
        text = torch.randn(2, 5, text_width, dtype=torch.float64) if text_width else None
        torch.testing.assert_close(fused[0](x, text), attention(x, text), rtol=1e-12, atol=1e-12)
        assert {name for name, _ in fused[0].named_children()} & {"to_k", "to_v"} == set()


@pytest.mark.parametrize("B, L, keys", [(1, 1024, 77), (2, 4096, 77), (3, 1008, 77), (1, 999, 77), (2, 256, 256)])
def test_queries_in_pieces_attend_as_one(B, L, keys):
    """Output and gradients, for lengths that halve often, seldom and never, against plain products."""
    q, k, v = (torch.randn(B, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (L, keys, keys))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * 8**-0.5
    wanted = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
    mixed, weight = attend(q, k, v), torch.randn(B, L, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(mixed, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, (q, k, v), weight), torch.autograd.grad(wanted, (q, k, v), weight)
    ):
        torch.testing.assert_close(ours, theirs)


def test_fusing_takes_no_memory_and_twice_is_once(unet):
    """The old layers kept beside the new would take 1.3 GB at SDXL's size."""
    numbers = sum(p.numel() for p in unet.parameters())
    fuse_projections(unet)
    fuse_projections(unet)
    assert sum(p.numel() for p in unet.parameters()) == numbers
    assert sum(name.endswith((".to_qkv", ".to_kv")) for name, _ in unet.named_modules()) == sum(
        isinstance(m, Attention) for m in unet.modules()
    )


def test_the_fused_unet_predicts_as_diffusers_own(unet):
    plain = copy.deepcopy(unet)
    fuse_projections(unet)
    torch.testing.assert_close(predict(unet, unet_inputs()), predict(plain, unet_inputs()), rtol=1e-5, atol=1e-5)
