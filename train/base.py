"""Where training computes, and the frozen base model there."""

import os

import torch
from diffusers import UNet2DConditionModel

from data import check
from data.common.errors import UserError
from data.models import fused, packed
from data.models.files import load
from lora.attention import fuse_projections


def prepare_device(settings):
    """-> where to compute, with the allocator and the kernels that training wants there."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer holes in the GPU's memory
    if settings.deterministic:  # only kernels that add in a fixed order; PyTorch raises where there is none
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every new tensor once more
    device = check.device()
    check.precision(settings.mixed_precision, device)
    return device


def load_unet(base, cache, dtype, device, base_precision):
    """The base model's UNet, frozen. Raises UserError when it is not of SDXL's kind or does not fit the cached text."""

    def prepare(unet):
        fuse_projections(unet)
        fused.fuse(unet, device)
        if base_precision != "plain":
            packed.pack(unet, device, base_precision)

    unet = load(UNet2DConditionModel, base.component("unet"), dtype, device, prepare)
    width, has = unet.config.cross_attention_dim, cache.manifest["text_shape"][1]
    if unet.config.addition_embed_type != "text_time" or width != has:
        raise UserError(
            f"{base.name}: its UNet wants text of width {width}, the cache has {has}; an SDXL model is needed"
        )
    return unet
