"""What drawing takes of a GPU's memory, estimated from configs, and how it is made to fit before weights are loaded.

Given up one after the other, each only where all before it is not enough:

    tiles    the VAE decodes a picture in squares that overlap; it differs a little from one that was decoded whole
    blocks   of the UNet stay in RAM, as few as will do, and come to the GPU one by one (infer/streamed.py): the same
             bits in more time

The two halves of classifier-free guidance are never parted: at 1024² a tile of the decoder takes more than both.
"""

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from data.common.errors import MachineError
from lora.inject import targets

TILE = 512  # pixels: the side of the squares that a larger picture is decoded in, a quarter of each over its neighbour
# Tensors of the widest kind that are alive at once, in SDXL's UNet and in its VAE's decoder; drawing() counts them.
IN_THE_UNET, IN_THE_DECODER = 24, 6
SPARE = 2**28  # bytes for the libraries' workspaces, and for holes between tensors
PLACES = 2  # on the GPU for blocks that stay in RAM: one computes, one arrives


@dataclass(frozen=True)
class Fit:
    """How a picture is drawn. blocks: names of the UNet's that stay in RAM, in the order of a forward."""

    tiles: bool = False
    blocks: tuple = ()


def fit(unet, vae, resolution, dtype, loras, there, beside):
    """-> the Fit that takes the least time and no more than `there` bytes, which is said in one line.

    unet, vae: configs. resolution: the picture's side, pixels. dtype: the UNet's. loras: [lora.contents.Contents], of
    which one at a time is in the UNet. beside: bytes that are held next to `there`, for the words alone. Raises
    MachineError with the smallest --vram_gib that would do.
    """
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(unet)
    sizes = {name: _bytes(model.get_submodule(name), dtype) for name in blocks(model)}
    weights, lora = _bytes(model, dtype), max((of_a_lora(model, contents, dtype) for contents in loras), default=0)
    tiles = weights + lora + drawing(unet, vae, resolution, dtype, tiles=False) > there
    rest = lora + drawing(unet, vae, resolution, dtype, tiles)
    for count in range(len(sizes) + 1):
        chosen = _spread(tuple(sizes), count)
        needed = weights + in_exchange([sizes[name] for name in chosen]) + rest
        if needed <= there:
            break
    else:
        smallest = math.ceil((needed + beside) / 2**30 * 100) / 100
        raise MachineError(
            f"the memory is too small: at least --vram_gib {smallest:.2f} is needed, with the UNet's blocks in RAM, "
            f"and {(there + beside) / 2**30:.2f} are there; end other programs, or draw smaller pictures"
        )
    parts = ["the VAE decodes in tiles, which changes pictures a little"] if tiles and resolution > TILE else []
    parts += [f"{count} of {len(sizes)} blocks of the UNet stay in RAM, which takes time"] if count else []
    told = "; ".join(parts) or "enough for all"
    print(
        f"memory: {(there + beside) / 2**30:.2f} GiB, predicted peak {(needed + beside) / 2**30:.2f}, "
        f"{beside / 2**30:.2f} of both for CUDA itself and other programs; {told}",
        flush=True,
    )
    return Fit(tiles, chosen)


def blocks(unet):
    """Names of a UNet's resnets and transformer blocks, in the order of a forward. They hold most of its weights."""
    names = {module: name for name, module in unet.named_modules()}
    for level in filter(None, (*unet.down_blocks, unet.mid_block, *unet.up_blocks)):  # some models have no middle
        attentions = dict(level.named_children()).get("attentions", ())
        for resnet, attention in zip_longest(level.resnets, attentions):
            yield names[resnet]
            for block in attention.transformer_blocks if attention else ():
                yield names[block]


def _spread(names, count):
    """`count` of the names, as far from one another as possible, so that each arrives while those between compute."""
    return tuple(names[i * len(names) // count] for i in range(count))


def in_exchange(sizes):
    """Bytes that the GPU holds more, most often less, when blocks of these sizes are in RAM: their places, not them."""
    return PLACES * max(sizes, default=0) - sum(sizes)


def of_a_lora(unet, contents, dtype):
    """Bytes that a LoRA takes in the UNet: numbers and gradients in fp32, both in `dtype`, and A and B as drawn."""
    numbers = contents.rank * sum(inside + out for _, inside, out in targets(unet, contents.kind))
    return numbers * (8 + 3 * dtype.itemsize)


def drawing(unet, vae, resolution, dtype, tiles=True):
    """Bytes of GPU memory that drawing takes besides the UNet's weights, estimated and rather too many.

    unet, vae: configs. resolution: the picture's side, pixels. dtype: the UNet's. tiles: whether a larger picture than
    TILE is decoded in tiles.

    The UNet computes two latents at once, with the prompt and without it, and keeps nothing for a backward. Counted in
    tensors (2, 320, h, w), as wide as its first level, 13 are alive in its last level, where it needs the most: skip
    connections, the input with one of them, and their norm. The decoder computes one tile, of which 3 tensors (1, 256,
    TILE, TILE) are alive. Copies in another layout and a convolution's workspace may take as many again, so that almost
    twice as many are counted. A VAE that overflows in half precision is decoded in fp32.
    One comes after the other, so the larger of the two counts, and the decoder's weights.
    """
    upcast = vae["force_upcast"] and dtype == torch.float16
    bytes_of_vae = 4 if upcast else dtype.itemsize
    latent = (resolution // 2 ** (len(vae["block_out_channels"]) - 1)) ** 2
    in_unet = IN_THE_UNET * 2 * unet["block_out_channels"][0] * latent * dtype.itemsize
    side = min(resolution, TILE) if tiles else resolution
    in_decoder = IN_THE_DECODER * vae["block_out_channels"][1] * side**2 * bytes_of_vae
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoencoderKL.from_config(vae).decoder.parameters())
    return weights * bytes_of_vae + max(in_unet, in_decoder) + SPARE


def _bytes(module, dtype):
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
