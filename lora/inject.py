"""READ 2. Where the updates go: every attention projection of the UNet, everything else frozen.

In SDXL these are to_q, to_k, to_v and to_out.0 of 140 attentions: 560 layers, 1,451,520 × rank trainable numbers.
"""

import math

import torch
from torch import nn

from data.safe import UserError
from lora.linear import LoRALinear

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ALIGN = 256  # elements: bitsandbytes quantises optimizer state in blocks of 256, and no block may span two tensors


class Adapters:
    """The adapted layers of one UNet, and all their numbers as one flat fp32 vector.

    layers   {name in the UNet: LoRALinear}, in the UNet's order
    vector   nn.Parameter (n,): every A and B is a view into it, every gradient a view into `vector.grad`

    So there is one parameter to clip, to unscale, to step, to save and to reduce over GPUs, one kernel each, where 1,120
    small tensors would cost 1,120 launches. Backward accumulates into the views in place; `zero_grad` keeps them views.
    """

    def __init__(self, layers, rank, alpha):
        self.layers, self.rank, self.alpha = layers, rank, alpha
        parts = [p for layer in layers.values() for p in (layer.A, layer.B)]
        sizes = [math.ceil(p.numel() / ALIGN) * ALIGN for p in parts]
        self.vector = nn.Parameter(torch.zeros(sum(sizes), device=parts[0].device))
        self.vector.grad = torch.zeros_like(self.vector)
        for part, values, grads in zip(parts, self.vector.detach().split(sizes), self.vector.grad.split(sizes)):
            home = values[: part.numel()].view_as(part)
            home.copy_(part.detach())
            part.data = home
            part.grad = grads[: part.numel()].view_as(part)

    def zero_grad(self):
        self.vector.grad.zero_()  # in place: set to None, the views would be lost

    def set_scale(self, scale):
        """Strength of the update, 1 as trained; 0 gives the base bit for bit."""
        for layer in self.layers.values():
            layer.scale = scale

    def parameters_count(self):
        """Trainable numbers, without the padding in `vector`."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers.values())


def targets(unet):
    """[(name, layer)] of the attention projections in `unet`, in its own order.

    Raises UserError when one of TARGETS is nowhere in it, or when it was injected already.
    """
    found = [(n, m) for n, m in unet.named_modules() if n.endswith(tuple(f".{t}" for t in TARGETS))]
    for name, module in found:
        if isinstance(module, LoRALinear):
            raise UserError(f"{name} has an adapter already; inject once, or load the UNet again")
    for target in TARGETS:
        if not any(name.endswith(f".{target}") for name, _ in found):
            raise UserError(f"{type(unet).__name__} has no {target}: not a UNet with attention as SDXL's")
    return found


def inject(unet, rank, alpha, seed=0):
    """Freeze `unet`, swap its attention projections for LoRALinear, and return the Adapters.

    Call it when the UNet is on its device: moving it afterwards would tear the views from the vector.
    """
    found = targets(unet)
    widest = max(min(base.in_features, base.out_features) for _, base in found)
    if rank > widest:
        raise UserError(f"rank {rank} is more than the widest layer's {widest}: no longer low-rank; use a smaller one")
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {name: LoRALinear(base, rank, alpha, generator) for name, base in found}
    for name, layer in layers.items():
        unet.set_submodule(name, layer)
    return Adapters(layers, rank, alpha)


def merge(unet, adapters):
    """Write every update into its base weight and put the plain layers back. One way; `adapters` is spent."""
    for name, layer in adapters.layers.items():
        unet.set_submodule(name, layer.merge())
    adapters.layers = {}
