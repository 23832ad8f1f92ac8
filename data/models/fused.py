"""Frozen models that compute the same with fewer kernels and fewer saved activations. Skip it on a first reading.

Three operations of SDXL's UNet, two of them its VAE's as well, cost more memory traffic than their arithmetic is worth:

    GEGLU          value · gelu(gate), the two halves of a projection (Shazeer 2020, https://arxiv.org/abs/2002.05202)
    group norm     and the SiLU after it (Wu & He 2018, https://arxiv.org/abs/1803.08494, eq. 1 and 2)
    bias           of a convolution, for which PyTorch reads and writes the whole image once more

Here the first two keep only their input for the backward, which computes the rest again, and the bias is added by the
group norm or the addition that reads the image next. With Triton each is one function of our own (triton_kernels.py).
Images are channels_last then, because the GPU's convolutions want them so, and nothing is copied to change that.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from data.common.safe import UserError


def fuse(model, compiled):
    """Swap modules of a frozen UNet or VAE for those below, which use triton_kernels.py where `compiled`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GEGLU):
            model.set_submodule(name, FusedGEGLU(module, compiled))
        elif isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            model.set_submodule(name, FusedResnet(module, compiled))
        elif isinstance(module, Downsample2D) and module.padding == 0:
            model.set_submodule(name, _without_copy(module.conv))
        elif isinstance(module, Transformer2DModel) and module.use_linear_projection:
            model.set_submodule(name, FusedTransformer(module, compiled))
        elif isinstance(module, (UNet2DConditionModel, Encoder)):
            module.conv_norm_out, module.conv_act = FusedGroupNorm(module.conv_norm_out, True, compiled), nn.Identity()
    for encoder in (m for m in model.modules() if isinstance(m, Encoder)):
        blocks = encoder.down_blocks
        before = [encoder.conv_in, *(block.downsamplers[0] for block in blocks[:-1])]
        for conv, block in zip(before, blocks):
            block.resnets[0].take_bias(conv)
    if compiled:
        model.to(memory_format=torch.channels_last)


def works(device):
    """None where Triton can compile for `device`, else the reason why it cannot."""
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):  # Triton ended its support of Turing, the T4, with 3.2
        return f"{torch.cuda.get_device_name(device)} is older than what Triton compiles for"
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (apt install gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Triton needs Python's headers (apt install python3-dev)"
    return None


def wanted(setting, device):
    """Whether to use Triton's kernels under --compile auto, on or off. Raises UserError where `on` is impossible."""
    reason = works(device)
    if reason and setting == "on":
        raise UserError(f"--compile on: {reason}; leave it at auto")
    if reason and setting == "auto" and device.type == "cuda":
        print(f"{reason}: PyTorch's own kernels are used")
    return setting != "off" and not reason


class FusedGEGLU(nn.Module):
    """Replaces diffusers' GEGLU."""

    def __init__(self, geglu, compiled):
        super().__init__()
        self.proj, self.compiled = geglu.proj, compiled

    def forward(self, x):
        return _GEGLU.apply(self.proj(x), _kernels(self.compiled))


class FusedGroupNorm(nn.Module):
    """Group norm of x + shift, and SiLU after it where `silu`; shift (C,) or (B, C) has no gradient."""

    def __init__(self, norm, silu, compiled):
        super().__init__()
        self.norm, self.silu, self.compiled = norm, silu, compiled

    def forward(self, x, shift=None):
        n = self.norm
        return _GroupNorm.apply(x, shift, n.weight, n.bias, n.num_groups, n.eps, self.silu, _kernels(self.compiled))


class FusedResnet(nn.Module):
    """Replaces diffusers' ResnetBlock2D, as SDXL configures it."""

    def __init__(self, block, compiled):
        super().__init__()
        self.norm1, self.norm2 = (FusedGroupNorm(norm, True, compiled) for norm in (block.norm1, block.norm2))
        self.conv1, self.conv2, self.conv_shortcut = block.conv1, block.conv2, block.conv_shortcut or nn.Identity()
        self.time_emb_proj, self.compiled = block.time_emb_proj, compiled
        self.bias0, self.bias1, self.bias2 = None, _take_bias(self.conv1), _take_bias(self.conv2)
        if block.conv_shortcut:
            self.bias2 = _frozen(self.bias2 + _take_bias(self.conv_shortcut))

    def take_bias(self, conv):
        """Add the bias of `conv` here, because `conv` makes this block's x and no other module reads it."""
        self.bias0 = _take_bias(conv)
        self.bias2 = _frozen(self.bias2 + self.conv_shortcut(self.bias0[None, :, None, None]).flatten())

    def forward(self, x, temb=None):
        shift = self.bias1
        if temb is not None:  # a VAE has no timesteps
            shift = shift + self.time_emb_proj(F.silu(temb))
        h = self.conv2(self.norm2(self.conv1(self.norm1(x, self.bias0)), shift))
        return _Add.apply(self.conv_shortcut(x), h, self.bias2, _kernels(self.compiled))


class FusedTransformer(nn.Module):
    """Replaces diffusers' Transformer2DModel, as SDXL configures it.

    It needs no copy, because a channels_last image is a list of tokens already.
    """

    gradient_checkpointing = False  # both set by the UNet's enable_gradient_checkpointing
    _gradient_checkpointing_func = None

    def __init__(self, transformer, compiled):
        super().__init__()
        self.norm = FusedGroupNorm(transformer.norm, False, compiled)
        self.proj_in, self.proj_out = transformer.proj_in, transformer.proj_out
        self.transformer_blocks = transformer.transformer_blocks

    def forward(self, x, encoder_hidden_states=None, **unused):
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, h w, C)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, None, encoder_hidden_states)
            else:
                tokens = block(tokens, None, encoder_hidden_states)
        return (x + self.proj_out(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2),)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, kernels):
        ctx.save_for_backward(p)
        ctx.kernels = kernels
        return kernels.geglu(p)

    @staticmethod
    def backward(ctx, dy):
        return ctx.kernels.geglu_backward(dy, *ctx.saved_tensors), None


class _GroupNorm(torch.autograd.Function):
    """The affine weights are frozen, so only the input has a gradient."""

    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps, silu, kernels):
        y, mean, rstd = kernels.group_norm(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, shift, mean, rstd, weight, bias)
        ctx.kernels, ctx.numbers = kernels, (groups, eps, silu)
        return y

    @staticmethod
    def backward(ctx, dy):
        return ctx.kernels.group_norm_backward(dy, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


class _Add(torch.autograd.Function):
    """x + y + bias. The bias is frozen."""

    @staticmethod
    def forward(ctx, x, y, bias, kernels):
        return kernels.add(x, y, bias)

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None, None


class Plain:
    """The three functions and their gradients by PyTorch's own kernels."""

    @staticmethod
    def geglu(p):
        """p (..., 2 n), value and gate -> (..., n)"""
        value, gate = p.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def geglu_backward(dy, p):
        value, gate = p.chunk(2, dim=-1)
        dp = torch.empty_like(p)
        dvalue, dgate = dp.chunk(2, dim=-1)
        torch.mul(dy, F.gelu(gate), out=dvalue)
        torch.ops.aten.gelu_backward.grad_input(dy * value, gate, grad_input=dgate)
        return dp

    @staticmethod
    def group_norm(x, shift, weight, bias, groups, eps, silu):
        """x (B, C, h, w) -> y, and what the backward needs: mean and 1/σ, (B, groups) each"""
        x = _shifted(x, shift)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)
        return F.silu(y, inplace=True) if silu else y, mean, rstd

    @staticmethod
    def group_norm_backward(dy, x, shift, mean, rstd, weight, bias, groups, eps, silu):
        x = _shifted(x, shift)
        if silu:
            dy = torch.ops.aten.silu_backward(dy, F.group_norm(x, groups, weight, bias, eps))
        return torch.ops.aten.native_group_norm_backward(
            dy.contiguous(), x.contiguous(), mean, rstd, weight, *_sizes(x), groups, [True, False, False]
        )[0]

    @staticmethod
    def add(x, y, bias):
        """x, y (B, C, h, w), bias (C,) -> x + y + bias"""
        return _shifted(y, bias).add_(x)


def _shifted(x, shift):
    return x if shift is None else x + shift[..., None, None]


def _take_bias(conv):
    """The convolution's bias, which is taken away from it."""
    bias, conv.bias = conv.bias, None
    return bias


def _without_copy(conv):
    """`conv` changed to replace the VAE's Downsample2D, which copies the image to add a last row and column of zeros.

    It makes the same sums with zeros at all four edges and a kernel of 4 × 4 whose first row and column are zero.
    """
    conv.weight = _frozen(F.pad(conv.weight, (1, 0, 1, 0)))
    conv.kernel_size, conv.padding = (4, 4), (1, 1)
    return conv


def _frozen(tensor):
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _sizes(x):
    return len(x), x.shape[1], x.shape[2] * x.shape[3]


def _kernels(compiled):
    if not compiled:
        return Plain
    from data.models.files import triton_kernels

    return triton_kernels
