"""All LoRA weights of a model as one flat vector."""

import math

import torch
from torch import nn

from lora.attention import projections_of

ALIGN = 256  # elements: bitsandbytes quantises optimizer state in blocks of 256, and no block may span two tensors


class Adapters:
    """The adapted layers of one UNet, and all their weights as one flat fp32 vector.

        fp32, trained            vector, vector.grad        masters: views of the vector in the shapes of A and B
                                 refresh ↓   ↑ add_gradients
        the base's dtype         a copy of both             parameters: every layer's A and B, views of the copy

    One kernel steps, clips or saves the vector, where 1,120 small tensors would need 1,120 launches. The layers compute
    with the copy, because half precision is what a GPU is fast in; training steps the vector, because an fp16 weight of
    1.0 cannot take a step of 1e-4.

    layers: {name in the UNet: LoRALinear}, in the UNet's order.
    """

    def __init__(self, layers, rank, alpha):
        self.layers, self.rank, self.alpha = layers, rank, alpha
        self.parameters = [p for layer in layers.values() for p in (layer.A, layer.B)]
        lengths = [math.ceil(p.numel() / ALIGN) * ALIGN for p in self.parameters]
        self.vector = nn.Parameter(torch.zeros(sum(lengths), device=self.parameters[0].device))
        self.vector.grad = torch.zeros_like(self.vector)
        dtype = self.parameters[0].dtype
        self._copy = torch.zeros_like(self.vector, dtype=dtype)
        self._grad_copy = torch.zeros_like(self._copy)
        self.masters = self._views(self.vector.detach(), lengths)
        self._grad_views = self._views(self._grad_copy, lengths)
        for parameter, master, copy in zip(self.parameters, self.masters, self._views(self._copy, lengths)):
            master.copy_(parameter.detach())
            parameter.data = copy
        self.refresh()

    def _views(self, flat, lengths):
        """Pieces of `flat` in the shapes of the parameters."""
        return [piece[: p.numel()].view_as(p) for piece, p in zip(flat.split(lengths), self.parameters)]

    @torch.no_grad()
    def add_gradients(self, gradients):
        """Add the gradients of `parameters`, as one backward gives them, to the vector's gradient."""
        torch._foreach_copy_(self._grad_views, gradients)
        self.vector.grad.add_(self._grad_copy)

    @torch.no_grad()
    def refresh(self):
        """Let the layers compute with the vector as it is now."""
        self._copy.copy_(self.vector)

    def projections(self):
        """{name of a projection in diffusers' UNet: (A (r, in), B (out, r))}: fp32 views into the vector."""
        found, masters = {}, iter(self.masters)
        for name, A, B in zip(self.layers, masters, masters):
            for projection, a, b in zip(projections_of(name), A.split(self.rank), B):
                found[projection] = (a, b)
        return found

    def take_out(self, unet):
        """Undo lora.inject.inject: the layers of `unet` as they were, frozen, their projections still side by side.

        What holds the Adapters holds their memory.
        """
        for name, layer in self.layers.items():
            unet.set_submodule(name, layer.base)

    def set_scale(self, scale):
        """Set the strength of every update: 1 is as trained, 0 gives the base bit for bit."""
        for layer in self.layers.values():
            layer.scale = scale
