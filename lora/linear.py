"""READ 1. A linear layer with a low-rank update beside it.

    y = W x + b + scale · (alpha / rank) · B (A x)          LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3

W and b are frozen, of any dtype, possibly quantised: only their output is used. A and B are what training changes.
With out × in weights in W, the update has rank × (in + out): 0.08 million in place of 1.6 for SDXL's 1280 × 1280 at rank 32.

The products with A and B are so thin that a GPU spends its time on starting them. So there are as few as can be, and their
gradients are written out by hand: nothing is added or scaled in a kernel of its own.
"""

from functools import partial

import torch
from torch import nn

from lora.aside import aside


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable update.

    Args:
        base: nn.Linear or anything with its attributes `in_features`, `out_features` and a forward; frozen here.
        rank: r, inner size of the update.
        alpha: the update is scaled by alpha / rank; the rank itself, the usual choice, leaves it as it is.
        generator: for A's first values; drawn on the CPU, so that they are the same on every device.
        parts: P, how many projections of one input `base` computes side by side, as q, k and v; each has its own update.

    A (P·r, in) starts normal with standard deviation 1/r, B (P, out/P, r) at zero: the first output is the base's own.
    Both have the base's dtype, in which the products are cheap; `inject.Adapters` holds what training steps in fp32.
    """

    def __init__(self, base, rank, alpha, generator=None, parts=1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.scale = 1.0  # set at run time: 1 is the trained strength, 0 leaves the base bit for bit
        dtype = base.weight.dtype if base.weight.is_floating_point() else base.compute_dtype  # of bitsandbytes' 4 bits
        A = torch.randn(parts * rank, base.in_features, generator=generator) / rank
        self.A = nn.Parameter(A.to(base.weight.device, dtype))
        self.B = nn.Parameter(
            torch.zeros(parts, base.out_features // parts, rank, device=base.weight.device, dtype=dtype)
        )

    @property
    def scaling(self):
        """The factor in front of B A."""
        return self.scale * self.alpha / self.rank

    def forward(self, x):
        """x (..., in) -> (..., out), in the dtype that the base returns for it."""
        if self.scale == 0:  # skipped, not multiplied by 0: 0 · inf is NaN
            return self.base(x)
        rows, h = _Down.apply(x.flatten(0, -2), self.A)  # (N, in), (N, P·r)
        y = _Up.apply(self.base(rows), h, self.B, self.scaling)  # (N, out)
        return y.view(*x.shape[:-1], -1)

    def delta(self):
        """(out, in) fp32: what the update adds to W at the present scale."""
        A = self.A.float().view(len(self.B), self.rank, -1)
        return self.scaling * (self.B.float() @ A).flatten(0, 1)

    @torch.no_grad()
    def merge(self):
        """W += (alpha / rank) B A, and the plain base layer back. One way: W + d is rounded, and less d not W any more."""
        if not self.base.weight.is_floating_point():
            raise TypeError(f"cannot merge into {self.base.weight.dtype} weights; load the base unquantised")
        self.base.weight.copy_((self.base.weight.float() + self.delta()).to(self.base.weight.dtype))
        return self.base


class _Down(torch.autograd.Function):
    """x (N, in), A (P·r, in) -> x again, and h = x Aᵀ (N, P·r).

    The base reads the x that comes out, so that its gradient dx passes here, and what A adds to it goes into the same memory:
    dx + dh A for x, dhᵀ x for A. Autograd alone would make two tensors, and a third for their sum.
    """

    @staticmethod
    def forward(ctx, x, A):
        ctx.save_for_backward(x, A)
        ctx.set_materialize_grads(False)  # no zeros in place of a dx that nobody computes
        same = x.view_as(x)
        if not ctx.needs_input_grad[0]:  # text, which nothing trainable comes before: the base needs no backward either
            ctx.mark_non_differentiable(same)
        return same, x @ A.T

    @staticmethod
    def backward(ctx, dx, dh):
        x, A = ctx.saved_tensors
        dA = aside(torch.mm, dh.T, x)
        return dx.addmm_(dh, A) if ctx.needs_input_grad[0] else None, dA


class _Up(torch.autograd.Function):
    """y (N, out), h (N, P·r), B (P, out/P, r) -> y_p + scaling · h_p B_pᵀ for each part p, in y's own memory.

    Backward: dy stays as it is for y, scaling · dy_p B_p for h_p, scaling · dy_pᵀ h_p for B_p.
    """

    @staticmethod
    def forward(ctx, y, h, B, scaling):
        ctx.save_for_backward(h, B)
        ctx.scaling = scaling
        _by_part(y, B).baddbmm_(_by_part(h, B), B.mT, alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        h, B = ctx.saved_tensors
        dy, dh = dy.contiguous(), torch.empty_like(h)
        _by_part(dh, B).baddbmm_(_by_part(dy, B), B, beta=0, alpha=ctx.scaling)
        product = partial(torch.baddbmm, beta=0, alpha=ctx.scaling)  # beta = 0: B is not read
        dB = aside(product, B, _by_part(dy, B).mT, _by_part(h, B))
        return dy, dh, dB, None


def _by_part(rows, B):
    """(N, P·n) -> (P, N, n), a view."""
    return rows.unflatten(-1, (len(B), -1)).transpose(0, 1)
