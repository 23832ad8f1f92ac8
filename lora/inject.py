"""READ 2. Where the updates go: every attention projection of the UNet, or all its transformers. The rest is frozen.

    attn        to_q, to_k, to_v and to_out.0 of 140 attentions: 560 layers in SDXL, 1,451,520 × rank trained weights
    attn-mlp    these, the two products of 70 feed-forwards, proj_in and proj_out: 722 layers, 2,659,840 × rank

A set of layers is named by patterns, in which * stands for anything. The patterns name projections as diffusers does.
Here those that read the same input are fused into one layer, side by side (lora/attention.py): to_q, to_k, to_v of a
self-attention into to_qkv, to_k, to_v of a cross-attention into to_kv. They are adapted together or not at all.
"""

from fnmatch import fnmatchcase

import torch
from torch import nn

from data.common.errors import UserError
from lora.adapters import Adapters
from lora.attention import fuse_projections, projections_of
from lora.linear import LoRALinear

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0")
TARGETS = {
    "attn": ATTENTION,
    "attn-mlp": (*ATTENTION, "*.proj_in", "*.proj_out", "*.ff.net.0.proj", "*.ff.net.2"),
}


def inject(unet, rank, alpha, seed=0, layers="attn"):
    """Freeze `unet`, put a LoRALinear around each of its layers that TARGETS[layers] names, and return the Adapters.

    The Adapters (lora/adapters.py) hold all A and B as one flat vector, which is what training changes. Call it when
    the UNet is on its device, because moving it afterwards would part the layers from that vector.
    """
    widest = max(min(inside, out) for _, inside, out in targets(unet, layers))
    if rank > widest:
        raise UserError(f"rank {rank} is more than the widest layer's {widest}: no longer low-rank; use a smaller one")
    unet.requires_grad_(False)
    fuse_projections(unet)
    generator = torch.Generator().manual_seed(seed)
    adapted = {
        name: LoRALinear(layer, rank, alpha, generator, parts=len(projections_of(name)))
        for name, layer in _layers(unet, layers)
    }
    for name, around in adapted.items():
        unet.set_submodule(name, around)
    return Adapters(adapted, rank, alpha)


def targets(unet, layers="attn"):
    """[(name, in, out)] of the projections that TARGETS[layers] names, in the order of `unet`, fused there or not.

    Raises UserError when a pattern fits nothing in it, when a layer is wanted in part or has an adapter already, or
    when it is not a plain linear layer.
    """
    found = []
    for name, module in _layers(unet, layers):
        if isinstance(module, LoRALinear):
            raise UserError(f"{name} has an adapter already; inject once, or load the UNet again")
        if not isinstance(module, nn.Linear):
            raise UserError(f"{name} is of type {type(module).__name__}: only a linear layer can be adapted")
        names = projections_of(name)
        found += [(projection, module.in_features, module.out_features // len(names)) for projection in names]
    for pattern in TARGETS[layers]:
        if not any(fnmatchcase(name, pattern) for name, _, _ in found):
            raise UserError(f"{type(unet).__name__} has no {pattern}: not a UNet with attention as SDXL's")
    return found


def _layers(unet, layers):
    """[(name, layer)] of the layers to wrap: each computes one of the projections that are named, or several fused."""
    found = []
    for name, layer in unet.named_modules():
        wanted = [any(fnmatchcase(part, pattern) for pattern in TARGETS[layers]) for part in projections_of(name)]
        if any(wanted) and not all(wanted):
            raise UserError(f"{name} is one layer: adapt {', '.join(projections_of(name))} together, or none of them")
        if any(wanted):
            found.append((name, layer))
    return found
