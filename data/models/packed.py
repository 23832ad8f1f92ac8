"""A frozen UNet's largest weights in 4 bits, for a GPU with little memory. Skip it on a first reading.

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3): 64 neighbours of a weight have one scale, their
largest magnitude in fp32, and each is the nearest of 16 numbers times it, the quantiles of a normal distribution: 4.5
bits in place of 16. The format and its two functions are bitsandbytes', those of its Linear4bit.

Nothing computes in 4 bits. A weight is unpacked whenever its layer is computed, forward, again where the forward is
repeated, and backward, and dropped right away: time in place of memory. Packed are the linear layers of the
transformers, 2.2 of SDXL's 2.6 billion weights; convolutions, norms and embeddings stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import nn

from data.common.imports import COMPILER, without

BLOCK = 64  # neighbours that have one scale
KIND = "nf4"


def pack(model, device):
    """Swap the linear layers that `layers` names for packed ones on `device`, one after the other.

    So the device never holds more than one of them unpacked; the largest comes first, because what it leaves free there
    holds the next ones. Call it after all that changes a weight, as fuse_projections does.
    """
    for name, linear in sorted(layers(model), key=lambda found: found[1].weight.numel(), reverse=True):
        model.set_submodule(name, PackedLinear(linear, device))


def layers(model):
    """[(name, layer)] of the linear layers in the transformers of a UNet."""
    every = model.named_modules()
    return [(name, part) for name, part in every if isinstance(part, nn.Linear) and ".attentions." in f".{name}"]


def bytes_of(model, dtype, packed):
    """Bytes that the weights of a UNet take in `dtype`, with the layers above packed or not."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    in_4_bits = sum(layer.weight.numel() for _, layer in layers(model)) * packed
    return (numbers - in_4_bits) * dtype.itemsize + in_4_bits // 2 + in_4_bits // BLOCK * 4


class PackedLinear(nn.Linear):
    """Replaces a frozen nn.Linear; `weight` is unpacked anew each time that it is asked for."""

    def __init__(self, linear, device):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        with without(*COMPILER):
            from bitsandbytes.functional import quantize_4bit
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(device)
        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=KIND)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", state.absmax)
        self.dtype, self.bias = weight.dtype, linear.bias

    @property
    def weight(self):
        """(out, in), in the dtype that the layer had before."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.absmax, shape, blocksize=BLOCK, quant_type=KIND, dtype=self.dtype)
        return dequantize_4bit(self.packed, state)

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
