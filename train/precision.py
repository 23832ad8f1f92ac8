"""In which precision the base's weights are held, decided before they are loaded.

    plain   as --mixed_precision says
    nf4     the weights of its transformers' linear layers in 4 bits (data/models/packed.py)

A run keeps its base's precision, because what is learned fits the weights that it was learned on.
"""

import importlib.util
import math

import torch
from diffusers import UNet2DConditionModel

from data import check
from data.models.packed import bytes_of
from lora.inject import targets
from train import plan
from train.optimizer import bytes_of_a_weight

# What a picture needs where every block is recomputed, counted in tensors (width of the UNet's first level, h, w): the
# inputs of SDXL's blocks are 35 of them, 11 what one block computes, and 5 the holes that the plan counts on.
ACTIVATIONS = 51
WORKSPACES = 3 * 2**25  # bytes that the libraries of matrix products take


def of_the_base(settings, config, shapes, dtype, device):
    """-> "plain" or "nf4": what --base_precision says; without it nf4 where the GPU's memory allows nothing else.

    config: the UNet's. shapes: the cache's, (2, 4, h, w) of each bucket. The memory is estimated, because
    the plan, which measures it, needs the weights.
    """
    if settings.base_precision or device.type != "cuda":
        return settings.base_precision or "plain"
    there, beside = check.room(settings.vram_gib, device, check.LIBRARIES + plan.GRAPH * len(shapes))
    needed = least(settings, config, shapes, dtype, "plain")
    if needed <= there or not importlib.util.find_spec("bitsandbytes"):
        return "plain"
    print(
        f"memory: the base in {str(dtype).removeprefix('torch.')} would need {(needed + beside) / 2**30:.1f} GiB with "
        f"every block recomputed, {(there + beside) / 2**30:.1f} are there: --base_precision nf4",
        flush=True,
    )
    return "nf4"


def least(settings, config, shapes, dtype, base_precision):
    """Bytes of GPU memory, estimated, that training takes where every block is recomputed, without CUDA's own."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    trained = settings.rank * sum(inside + out for _, inside, out in targets(unet, settings.lora_layers))
    of_a_weight = 8 + 3 * dtype.itemsize  # the vector and its gradient; copies in the base's dtype, as they are summed
    of_a_weight += bytes_of_a_weight(settings)
    pixels = settings.train_batch_size * max(math.prod(shape[-2:]) for shape in shapes)
    activations = ACTIVATIONS * config["block_out_channels"][0] * pixels * dtype.itemsize
    return bytes_of(unet, dtype, base_precision) + trained * of_a_weight + activations + WORKSPACES + plan.UNUSED
