"""READ 1. LoRA: a frozen linear layer, and next to it a low-rank update that is trained.

    y = W x + b + (alpha / rank) · B (A x)          Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3

W and b are frozen. A maps the input down to `rank` numbers and B maps those up to the output, so the update has
rank · (in + out) weights instead of the in · out of W: 0.08 million instead of 1.6 for SDXL's 1280 × 1280 at rank 32.
"""

import torch
from torch import nn

from lora import products


def lora(x, base, A, B, scaling):
    """The equation as it is in the paper: x (N, in), A (rank, in), B (out, rank) -> y (N, out).

    Nothing calls it but a test, which holds LoRALinear, the same in fewer kernels, to its output and gradients.
    """
    h = x @ A.T  # (N, rank)
    update = h @ B.T  # (N, out)
    return base(x) + scaling * update


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable update.

    Args:
        base: the nn.Linear that is adapted; it is frozen here.
        rank: r, the inner size of the update.
        alpha: the update is scaled by alpha / rank; alpha = rank, the usual choice, leaves it as it is.
        generator: draws A's first values, on the CPU, so that they are the same on every device.
        parts: P, how many projections of one input `base` computes side by side, 3 for q, k and v; each has an update
            of its own. Read it with P = 1 first: A is (r, in) then, and B (1, out, r).

    A (P·r, in) starts normal with standard deviation 1/r and B (P, out/P, r) at zero, so the first output is the base's
    own. Both have the base's dtype, because products in half precision are cheap. They are copies: the weights that the
    optimizer changes are fp32 and stand in `adapters.Adapters`, which copies them here after every step.
    """

    def __init__(self, base, rank, alpha, generator=None, parts=1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.scale = 1.0  # set at run time: 1 is the trained strength, 0 leaves the base bit for bit
        like_base = dict(device=base.weight.device, dtype=base.weight.dtype)
        A = torch.randn(parts * rank, base.in_features, generator=generator) / rank
        self.A = nn.Parameter(A.to(**like_base))
        self.B = nn.Parameter(torch.zeros(parts, base.out_features // parts, rank, **like_base))

    @property
    def scaling(self):
        """The factor in front of B A."""
        return self.scale * self.alpha / self.rank

    def forward(self, x):
        """x (..., in) -> y (..., out)"""
        if self.scale == 0:  # skipped instead of multiplied by 0, because 0 · inf is NaN
            return self.base(x)
        # products.py is these two lines' gradients by hand, and can be skipped; `rows` is x as rows (N, in)
        rows, h = products.down(x.flatten(0, -2), self.A)  # h = A x (N, P·r)
        y = products.up(self.base(rows), h, self.B, self.scaling)  # W x + b + scaling · B h, (N, out)
        return y.view(*x.shape[:-1], -1)
