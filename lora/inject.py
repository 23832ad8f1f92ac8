"""READ 2. Where the updates go: every attention projection of the UNet, everything else frozen.

In SDXL these are to_q, to_k, to_v and to_out.0 of 140 attentions: 560 projections, 1,451,520 × rank trainable numbers.
Those of one input stand side by side in one layer (lora/attention.py): a self-attention's to_q, to_k, to_v in to_qkv, a
cross-attention's to_k, to_v in to_kv.
"""

import math

import torch
from torch import nn

from data.common.safe import UserError
from lora.attention import SIDE_BY_SIDE, fuse_projections, split_projections
from lora.linear import LoRALinear

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ALIGN = 256  # elements: bitsandbytes quantises optimizer state in blocks of 256, and no block may span two tensors


class Adapters:
    """The adapted layers of one UNet, and all their numbers as one flat fp32 vector.

    fp32, trained      vector, vector.grad               masters: views of the vector in the shapes of A and B
                       refresh ↓   ↑ add_gradients
    the base's dtype   copies of both, flat as well      parameters: every layer's A and B, views of the copy

    One vector is stepped, clipped and saved by one kernel each, where 1,120 small tensors would cost 1,120 launches. The
    copies are what layers compute with; an fp16 weight of 1.0 cannot take a step of 1e-4, the vector can.
    layers: {name in the UNet: LoRALinear}, in the UNet's order.
    """

    def __init__(self, layers, rank, alpha):
        self.layers, self.rank, self.alpha = layers, rank, alpha
        self.parameters = [p for layer in layers.values() for p in (layer.A, layer.B)]
        sizes = [math.ceil(p.numel() / ALIGN) * ALIGN for p in self.parameters]
        self.vector = nn.Parameter(torch.zeros(sum(sizes), device=self.parameters[0].device))
        self.vector.grad = torch.zeros_like(self.vector)
        self._copies, self._grads = (torch.zeros_like(self.vector, dtype=self.parameters[0].dtype) for _ in range(2))
        self.masters = self._views(self.vector.detach(), sizes)
        self._grad_views = self._views(self._grads, sizes)
        for parameter, master, copy in zip(self.parameters, self.masters, self._views(self._copies.detach(), sizes)):
            master.copy_(parameter.detach())
            parameter.data = copy
        self.refresh()

    def _views(self, flat, sizes):
        """Pieces of `flat` with the shapes of the parameters."""
        return [piece[: p.numel()].view_as(p) for piece, p in zip(flat.split(sizes), self.parameters)]

    @torch.no_grad()
    def add_gradients(self, gradients):
        """Add the gradients of `parameters`, of one backward, to the vector's."""
        torch._foreach_copy_(self._grad_views, gradients)
        self.vector.grad.add_(self._grads)

    @torch.no_grad()
    def refresh(self):
        """The layers' copies follow the vector; its gradient starts again at zero."""
        self._copies.copy_(self.vector)
        self.vector.grad.zero_()

    def projections(self):
        """{name of a projection in diffusers' UNet: (A (r, in), B (out, r))}: the fp32 numbers, views into the vector."""
        found, masters = {}, iter(self.masters)
        for name, A, B in zip(self.layers, masters, masters):
            for projection, a, b in zip(_projections(name), A.split(self.rank), B):
                found[projection] = (a, b)
        return found

    def set_scale(self, scale):
        """Strength of the update, 1 as trained; 0 gives the base bit for bit."""
        for layer in self.layers.values():
            layer.scale = scale

    def parameters_count(self):
        """Trainable numbers, without the padding in `vector`."""
        return sum(p.numel() for p in self.parameters)


def targets(unet):
    """[(name, in, out)] of the attention projections in `unet`, fused or not, in its own order.

    Raises UserError when one of TARGETS is nowhere in it, or when it was injected already.
    """
    found = []
    for name, module in _bases(unet):
        if isinstance(module, LoRALinear):
            raise UserError(f"{name} has an adapter already; inject once, or load the UNet again")
        names = _projections(name)
        found += [(projection, module.in_features, module.out_features // len(names)) for projection in names]
    for target in TARGETS:
        if not any(name.endswith(f".{target}") for name, _, _ in found):
            raise UserError(f"{type(unet).__name__} has no {target}: not a UNet with attention as SDXL's")
    return found


def inject(unet, rank, alpha, seed=0):
    """Freeze `unet`, swap its attention projections for LoRALinear, and return the Adapters.

    Call it when the UNet is on its device: moving it afterwards would tear the copies from their vector.
    """
    widest = max(min(inside, out) for _, inside, out in targets(unet))
    if rank > widest:
        raise UserError(f"rank {rank} is more than the widest layer's {widest}: no longer low-rank; use a smaller one")
    unet.requires_grad_(False)
    fuse_projections(unet)
    generator = torch.Generator().manual_seed(seed)
    layers = {n: LoRALinear(base, rank, alpha, generator, len(_projections(n))) for n, base in _bases(unet)}
    for name, layer in layers.items():
        unet.set_submodule(name, layer)
    return Adapters(layers, rank, alpha)


@torch.no_grad()
def merge(unet, adapters):
    """Write every update into its base weight and put diffusers' own layers back. One way; `adapters` is spent."""
    for name, layer in adapters.layers.items():
        unet.set_submodule(name, layer.merge())
    split_projections(unet)
    adapters.layers = {}


def _bases(unet):
    """[(name, layer)] of all that computes a projection, or several side by side."""
    wanted = tuple(f".{last}" for last in (*TARGETS, *SIDE_BY_SIDE))
    return [(name, module) for name, module in unet.named_modules() if name.endswith(wanted)]


def _projections(name):
    """Names of the projections that the layer `name` computes: x.to_kv -> x.to_k, x.to_v; x.to_q itself."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in SIDE_BY_SIDE.get(last, (last,))]
