"""The two thin products of a LoRA layer, with their gradients written by hand. Skip it on a first reading.

    h = A x                     down
    y += scaling · B h          up

A has 32 rows where W has 1280, so these products take a GPU less time than starting them does. That is why there are as
few kernels as can be: nothing is scaled or added in a kernel of its own, neither forward nor backward, where autograd
would take seven kernels for what takes four here.
"""

from functools import partial

import torch

from lora.aside import aside


def down(x, A):
    """x (N, in), A (P·r, in) -> x again, for the base layer to read, and h = x Aᵀ (N, P·r)."""
    return _Down.apply(x, A)


def up(y, h, B, scaling):
    """y (N, out), h (N, P·r), B (P, out/P, r) -> y_p + scaling · h_p B_pᵀ for each part p, in y's own memory."""
    return _Up.apply(y, h, B, scaling)


class _Down(torch.autograd.Function):
    """Gradients: dx + dh A for x, where dx is what the base layer's backward gives, and dhᵀ x for A.

    The base reads the x that comes out of here, so its dx arrives here, and dh A is added into the same memory.
    Autograd alone would make one tensor of dx, one of dh A and a third of their sum.

    PyTorch's manual forbids a backward to write into a gradient that arrives, because others may still read it. Nobody
    else can here. The x that comes out has one reader, the base layer, so what arrives is what the base's backward
    returned and nothing that was summed or shared. That demands one thing of the base: its backward returns new memory,
    as the matrix product of an nn.Linear does. A base that passes its gradient on (nn.Identity, a layer that adds its
    input to its output) must not be adapted, because dx would be dy itself, which the layers around still read.
    """

    @staticmethod
    def forward(ctx, x, A):
        ctx.save_for_backward(x, A)
        ctx.set_materialize_grads(False)  # no zeros instead of a dx that nobody computes
        same = x.view_as(x)
        if not ctx.needs_input_grad[0]:  # text: nothing before it is trained, so the base needs no backward either
            ctx.mark_non_differentiable(same)
        return same, x @ A.T

    @staticmethod
    def backward(ctx, dx, dh):
        x, A = ctx.saved_tensors
        dA = aside(torch.mm, torch.empty_like(A), dh.T, x)
        return dx.addmm_(dh, A) if ctx.needs_input_grad[0] else None, dA


class _Up(torch.autograd.Function):
    """Gradients: dy as it is for y, scaling · dy_p B_p for h_p, scaling · dy_pᵀ h_p for B_p."""

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
        product = partial(torch.baddbmm, beta=0, alpha=ctx.scaling)  # with beta=0, B only lends its shape
        dB = aside(product, torch.empty_like(B), B, _by_part(dy, B).mT, _by_part(h, B))
        return dy, dh, dB, None


def _by_part(rows, B):
    """(N, P·n) -> (P, N, n), a view."""
    return rows.unflatten(-1, (len(B), -1)).transpose(0, 1)
