"""The projections of one input side by side in one layer: q, k and v of a self-attention, k and v of a cross-attention.

One layer instead of two or three means fewer and fuller kernels.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

BLOCKS = 80  # of queries times heads, about as many as keep a GPU busy in cross-attention's backward
SIDE_BY_SIDE = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def projections_of(name):
    """Names of the projections that the layer `name` computes: x.to_kv -> x.to_k, x.to_v; x.to_q -> itself."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in SIDE_BY_SIDE.get(last, (last,))]


class FusedAttention:
    """Attention that reads projections which stand side by side; an attention processor of diffusers."""

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        """x (B, L, width), encoder_hidden_states None or the text (B, 77, 2048) -> (B, L, width)"""
        assert attention_mask is None, "SDXL attends to everything"
        if encoder_hidden_states is None:
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, (k, v) = attn.to_q(x), attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in (q, k, v))  # (B, L, heads, 64)
        return attn.to_out[0](attend(q, k, v).flatten(2))


def attend(q, k, v):
    """softmax(q kᵀ / √d) v for q (B, L, heads, d), k and v (B, keys, heads, d) -> (B, L, heads, d)

    Where the keys are few, as a caption's 77, the queries are cut into pieces that attend as images of their own,
    because the backward's kernels share their work out by keys, heads and images, never by queries, and most of a GPU
    would be idle. (4,096 queries, 10 heads, an H100: 544 µs become 110 in PyTorch's memory-efficient attention, 131
    become 62 in cuDNN's.)
    """
    B, L, heads, _ = q.shape
    pieces = 1
    while k.shape[1] < 128 <= L // pieces and L // pieces % 2 == 0 and B * heads * pieces < BLOCKS:
        pieces *= 2
    q = q.unflatten(1, (pieces, -1)).flatten(0, 1)
    k, v = (part[:, None].expand(-1, pieces, -1, -1, -1).flatten(0, 1) for part in (k, v))
    mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
    return mixed.transpose(1, 2).unflatten(0, (B, pieces)).flatten(1, 2)


@torch.no_grad()
def fuse_projections(unet):
    """Put the projections of one input side by side in one layer. A second call does nothing.

    Call it before the weights go to the GPU, because the old layers would leave holes in its memory.
    """
    for attention in (module for module in unet.modules() if isinstance(module, Attention)):
        fused = "to_kv" if attention.is_cross_attention else "to_qkv"
        if fused not in dict(attention.named_children()):
            parts = [attention.get_submodule(part) for part in SIDE_BY_SIDE[fused]]
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
            attention.add_module(fused, _linear(torch.cat([part.weight for part in parts]), bias))
            for part in SIDE_BY_SIDE[fused]:
                delattr(attention, part)
            attention.set_processor(FusedAttention())


def _linear(weight, bias):
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
