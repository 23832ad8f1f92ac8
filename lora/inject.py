"""READ 2. Where the updates go: every attention projection of the UNet. Everything else is frozen.

In SDXL these are to_q, to_k, to_v and to_out.0 of 140 attentions: 560 projections with 1,451,520 × rank trainable
weights. Those that read the same input stand side by side in one layer (lora/attention.py): to_q, to_k, to_v of a
self-attention in to_qkv, to_k, to_v of a cross-attention in to_kv.
"""

import torch
from torch import nn

from data.common.errors import UserError
from lora.adapters import Adapters
from lora.attention import SIDE_BY_SIDE, fuse_projections, projections_of
from lora.linear import LoRALinear

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def targets(unet):
    """[(name, in, out)] of the attention projections in `unet`, fused or not, in its own order.

    Raises UserError when one of TARGETS is nowhere in it, when it was injected already, or when a projection is not a
    plain linear layer.
    """
    found = []
    for name, module in _bases(unet):
        if isinstance(module, LoRALinear):
            raise UserError(f"{name} has an adapter already; inject once, or load the UNet again")
        if not isinstance(module, nn.Linear):
            raise UserError(f"{name} is of type {type(module).__name__}: only a linear layer can be adapted")
        names = projections_of(name)
        found += [(projection, module.in_features, module.out_features // len(names)) for projection in names]
    for target in TARGETS:
        if not any(name.endswith(f".{target}") for name, _, _ in found):
            raise UserError(f"{type(unet).__name__} has no {target}: not a UNet with attention as SDXL's")
    return found


def inject(unet, rank, alpha, seed=0):
    """Freeze `unet`, put a LoRALinear around each of its attention projections, and return the Adapters.

    Call it when the UNet is on its device, because moving it afterwards would part the layers from their vector.
    """
    widest = max(min(inside, out) for _, inside, out in targets(unet))
    if rank > widest:
        raise UserError(f"rank {rank} is more than the widest layer's {widest}: no longer low-rank; use a smaller one")
    unet.requires_grad_(False)
    fuse_projections(unet)
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoRALinear(base, rank, alpha, generator, parts=len(projections_of(name))) for name, base in _bases(unet)
    }
    for name, layer in layers.items():
        unet.set_submodule(name, layer)
    return Adapters(layers, rank, alpha)


def _bases(unet):
    """[(name, layer)] of all layers that compute a projection, or several side by side."""
    wanted = tuple(f".{last}" for last in (*TARGETS, *SIDE_BY_SIDE))
    return [(name, module) for name, module in unet.named_modules() if name.endswith(wanted)]
