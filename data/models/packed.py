"""A frozen UNet's largest weights in few bits, for a GPU with little memory. Skip it on a first reading.

nf4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3): 64 neighbours of a weight have one scale, their
largest magnitude in fp32, and each is the nearest of 16 numbers times it, the quantiles of a normal distribution: 4.5
bits in place of 16. The format and its two functions are bitsandbytes', those of its Linear4bit.

Nothing computes in these bits. A weight is unpacked whenever its layer is computed, forward, again where the forward is
repeated, and backward, and dropped right away: time in place of memory. Packed are the linear layers of the
transformers, 2.2 of SDXL's 2.6 billion weights; convolutions, norms and embeddings stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data.common.imports import COMPILER, without

BLOCK = 64  # neighbours that have one scale


@dataclass(frozen=True)
class Format:
    """How a weight (out, in) is packed."""

    bits: float  # of a number, with its share of the scales
    pack: Callable  # weight -> packed, scales
    unpack: Callable  # packed, scales, (out, in), dtype -> weight


def to_nf4(weight):
    with without(*COMPILER):
        from bitsandbytes.functional import quantize_4bit
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def from_nf4(packed, scales, shape, dtype):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(scales, torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state)


FORMATS = {"nf4": Format(4.5, to_nf4, from_nf4)}  # by --base_precision


def pack(model, device, base_precision):
    """Swap the linear layers that `layers` names for packed ones on `device`, one after the other.

    So the device never holds more than one of them unpacked; the largest comes first, because what it leaves free there
    holds the next ones. Call it after all that changes a weight, as fuse_projections does.
    """
    for name, linear in sorted(layers(model), key=lambda found: found[1].weight.numel(), reverse=True):
        model.set_submodule(name, PackedLinear(linear, device, FORMATS[base_precision]))


def layers(model):
    """[(name, layer)] of the linear layers in the transformers of a UNet."""
    every = model.named_modules()
    return [(name, part) for name, part in every if isinstance(part, nn.Linear) and ".attentions." in f".{name}"]


def bytes_of(model, dtype, base_precision):
    """Bytes that the weights of a UNet take in `dtype`, the layers above packed as `base_precision` says."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if base_precision == "plain":
        return numbers * dtype.itemsize
    packed = sum(layer.weight.numel() for _, layer in layers(model))
    return (numbers - packed) * dtype.itemsize + int(packed * FORMATS[base_precision].bits / 8)


class PackedLinear(nn.Linear):
    """Replaces a frozen nn.Linear; `weight` is unpacked anew each time that it is asked for."""

    def __init__(self, linear, device, format):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, format
        packed, scales = format.pack(linear.weight.detach().to(device))
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.dtype, self.bias = linear.weight.dtype, linear.bias

    @property
    def weight(self):
        """(out, in), in the dtype that the layer had before."""
        return self.format.unpack(self.packed, self.scales, (self.out_features, self.in_features), self.dtype)

    def forward(self, x):
        return _Packed.apply(x, self)


class _Packed(torch.autograd.Function):
    """nn.Linear's product and its gradient, which keep nothing: autograd's own would keep the unpacked weight."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.weight, None
