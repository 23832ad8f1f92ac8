"""READ 1. One linear layer with a low-rank update beside it.

    y = W x + b + (alpha / rank) · B (A x)          LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3

W and b are frozen, of any dtype, possibly quantised: only their output is used. A and B are what training changes.
With out × in weights in W, the update has rank × (in + out): 0.05 million in place of 1.6 for SDXL's 1280 × 1280 at rank 20.
"""

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable update.

    Args:
        base: nn.Linear or anything with its attributes `in_features`, `out_features` and a forward; frozen here.
        rank: r, inner size of the update.
        alpha: the update is scaled by alpha / rank, so that changing the rank does not change the size of a step.
        generator: for A's first values; drawn on the CPU, so that they are the same on every device.

    A (r, in) starts normal with standard deviation 1/r, B (out, r) starts at zero: the first output is the base's own.
    Both are fp32 whatever the base is: an fp16 weight of 1.0 cannot take a step of 1e-4.
    """

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.scale = 1.0  # set at run time: 1 is the trained strength, 0 leaves the base bit for bit
        device = base.weight.device
        self.A = nn.Parameter((torch.randn(rank, base.in_features, generator=generator) / rank).to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def scaling(self):
        """The factor in front of B A."""
        return self.scale * self.alpha / self.rank

    def forward(self, x):
        """x (..., in) -> (..., out), in the dtype that the base returns for it."""
        y = self.base(x)
        if self.scale == 0:  # skipped, not multiplied by 0: 0 · inf is NaN
            return y
        # A and B are cast to the activations' dtype, which is where the product is cheap; their gradients come back in fp32.
        h = F.linear(x, self.A.to(x.dtype))  # (..., r)
        return y + self.scaling * F.linear(h, self.B.to(h.dtype)).to(y.dtype)

    def delta(self):
        """(out, in) fp32: what the update adds to W at the present scale."""
        return self.scaling * (self.B.float() @ self.A.float())

    @torch.no_grad()
    def merge(self):
        """W += (alpha / rank) B A, and the plain base layer back. One way: in fp16, (W + d) - d changes 2 % of the weights."""
        if not self.base.weight.is_floating_point():
            raise TypeError(f"cannot merge into {self.base.weight.dtype} weights; load the base unquantised")
        self.base.weight.copy_((self.base.weight.float() + self.delta()).to(self.base.weight.dtype))
        return self.base
