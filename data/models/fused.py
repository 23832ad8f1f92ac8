"""Frozen models that compute the same with fewer kernels and fewer saved activations. Skip it on a first reading.

Four kinds of places in SDXL's UNet cost more memory traffic than their arithmetic is worth, two of them in its VAE too:

    layer norm     and the addition before it (Ba et al. 2016, https://arxiv.org/abs/1607.06450)
    GEGLU          value · gelu(gate), halves of one projection (Shazeer 2020, https://arxiv.org/abs/2002.05202)
    group norm     then SiLU (Wu & He 2018, https://arxiv.org/abs/1803.08494, eq. 1 and 2)
    bias           of a convolution, for which PyTorch reads and writes the whole image once more

Here GEGLU and the norms keep their input alone for the backward, which computes the rest again. A sum is normalised
as it is made, and its gradients are added up as the norm's is made. A bias is added by the group norm or the addition
that reads the image next. On a GPU each is a function of our own (kernels.py), images are channels_last, as the GPU's
convolutions want them, and nothing is copied to change that.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from data.models import kernels


def fuse(model, device):
    """Swap the modules of a frozen UNet or VAE, which will compute on `device`, for those below."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GEGLU):
            model.set_submodule(name, FusedGEGLU(module))
        elif isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            model.set_submodule(name, FusedResnet(module))
        elif isinstance(module, Downsample2D) and module.padding == 0:
            model.set_submodule(name, _without_copy(module.conv))
        elif isinstance(module, Transformer2DModel) and module.use_linear_projection:
            model.set_submodule(name, FusedTransformer(module))
        elif isinstance(module, (UNet2DConditionModel, Encoder)):
            module.conv_norm_out, module.conv_act = FusedGroupNorm(module.conv_norm_out, True), nn.Identity()
    for encoder in (m for m in model.modules() if isinstance(m, Encoder)):
        blocks = encoder.down_blocks
        before = [encoder.conv_in, *(block.downsamplers[0] for block in blocks[:-1])]
        for conv, block in zip(before, blocks):
            block.resnets[0].take_bias(conv)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)


class FusedGEGLU(nn.Module):
    """Replaces diffusers' GEGLU."""

    def __init__(self, geglu):
        super().__init__()
        self.proj = geglu.proj

    def forward(self, x):
        return _GEGLU.apply(self.proj(x))


class FusedGroupNorm(nn.Module):
    """Group norm of x + shift, and SiLU after it where `silu`; shift (C,) or (B, C) has no gradient."""

    def __init__(self, norm, silu):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(self, x, shift=None):
        n = self.norm
        return _GroupNorm.apply(x, shift, n.weight, n.bias, n.num_groups, n.eps, self.silu)


class FusedResnet(nn.Module):
    """Replaces diffusers' ResnetBlock2D, as SDXL configures it."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2 = (FusedGroupNorm(norm, True) for norm in (block.norm1, block.norm2))
        self.conv1, self.conv2, self.conv_shortcut = block.conv1, block.conv2, block.conv_shortcut or nn.Identity()
        self.time_emb_proj = block.time_emb_proj
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
        return _Add.apply(self.conv_shortcut(x), h, self.bias2)


class FusedTransformer(nn.Module):
    """Replaces diffusers' Transformer2DModel, as SDXL configures it.

    It needs no copy, because a channels_last image is a list of tokens already.
    """

    gradient_checkpointing = False  # both set by the UNet's enable_gradient_checkpointing
    _gradient_checkpointing_func = None

    def __init__(self, transformer):
        super().__init__()
        self.norm, self.proj_in = FusedGroupNorm(transformer.norm, False), transformer.proj_in
        self.transformer_blocks = nn.ModuleList(FusedBlock(block) for block in transformer.transformer_blocks)
        self.proj_out = transformer.proj_out

    def forward(self, x, encoder_hidden_states=None, **unused):
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, h w, C)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, encoder_hidden_states)
            else:
                tokens = block(tokens, encoder_hidden_states)
        return (x + self.proj_out(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2),)


class FusedBlock(nn.Module):
    """Instead of diffusers' BasicTransformerBlock, as SDXL configures it."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1, self.attn2, self.ff = block.attn1, block.attn2, block.ff

    def forward(self, x, text):
        x, normal = _add_norm(self.norm1, x)
        x, normal = _add_norm(self.norm2, x, self.attn1(normal))
        x, normal = _add_norm(self.norm3, x, self.attn2(normal, text))
        return x + self.ff(normal)


def _add_norm(norm, x, y=None):
    """-> x + y, and its layer norm"""
    return _AddLayerNorm.apply(x, y, norm.weight, norm.bias, norm.eps)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return _functions(p).geglu(p)

    @staticmethod
    def backward(ctx, dy):
        return _functions(dy).geglu_backward(dy, *ctx.saved_tensors)


class _AddLayerNorm(torch.autograd.Function):
    """x, y -> x + y, and its layer norm; without y, x itself and its norm. The affine weights are frozen."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, eps):
        total, out, *statistics = _functions(x).add_layer_norm(x, y, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, *statistics)
        return total.view_as(total), out

    @staticmethod
    def backward(ctx, dtotal, dout):
        dx = _functions(dout).add_layer_norm_backward(dtotal, dout, *ctx.saved_tensors)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None


class _GroupNorm(torch.autograd.Function):
    """The affine weights are frozen, so only the input has a gradient."""

    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps, silu):
        y, *statistics = _functions(x).group_norm(x, shift, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, shift, *statistics, weight, bias)
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        return _functions(dy).group_norm_backward(dy, *ctx.saved_tensors, *ctx.settings), *[None] * 6


class _Add(torch.autograd.Function):
    """x + y + bias. The bias is frozen."""

    @staticmethod
    def forward(ctx, x, y, bias):
        return _functions(x).add(x, y, bias)

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None


def _functions(x):
    """Whose functions compute with x: ours on NVIDIA's GPUs, PyTorch's elsewhere."""
    return kernels if x.is_cuda and torch.version.cuda else Plain


class Plain:
    """The functions and their gradients in PyTorch's kernels, for a CPU; ours are tested against them."""

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
    def add_layer_norm(x, y, weight, bias, eps):
        """x, y (..., C) -> x + y (y may be None), its norm, and for the backward mean and 1/σ"""
        total = x if y is None else x + y
        return total, *torch.native_layer_norm(total, weight.shape, weight, bias, eps)

    @staticmethod
    def add_layer_norm_backward(dtotal, dout, total, weight, bias, mean, rstd):
        wanted = [True, False, False]
        return (
            dtotal
            + torch.ops.aten.native_layer_norm_backward(
                dout.contiguous(), total, weight.shape, mean, rstd, weight, bias, wanted
            )[0]
        )

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
