"""A pipeline, or a VAE, in one .safetensors file with SGM's names, as checkpoints are passed around.

Its components' tensors get diffusers' names by diffusers' own converters. A file has no configs and no vocabularies;
those are another model's (files.Model).
"""

import functools
import os
import re

from data.common.disk import naming
from data.common.errors import UserError
from data.common.words import many
from data.models import tensors

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
IN_CHANNELS = "model.diffusion_model.input_blocks.0.0.weight"
SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")
LORA = re.compile(r"^lora_|[._]lora[._]|lora_(up|down|A|B)\b")
# Names that only files of another kind have, and what those are. A name that ends with a dot begins such names.
_BARE = "a UNet without the rest, in ComfyUI's names; take the whole checkpoint"
OTHERS = {
    "edm_mean": "an EDM model, which noises in another way",
    "edm_vpred.sigma_max": "an EDM model, which noises in another way",
    "conditioner.embedders.0.model.": "SDXL's refiner",
    "cond_stage_model.transformer.": "a Stable Diffusion 1 model",
    "cond_stage_model.model.": "a Stable Diffusion 2 model",
    "model.diffusion_model.double_blocks.": "a Flux model",
    "double_blocks.": "a Flux model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model",
    "control_model.": "a ControlNet",
    "diffusion_model.": _BARE,
    "input_blocks.": _BARE,
    "unet.": "weights in diffusers' names; put them into folders as diffusers has them, or give the folder",
    "down_blocks.": "a UNet in diffusers' names; put it into a folder unet/ next to the other parts",
}


def is_file(name):
    """Whether a model's name means one file, and not a folder or a hub id. Raises UserError for a pickle."""
    if "://" in name:
        raise UserError(f"{name}: an address; download the file first, and name it here")
    if name.lower().endswith(PICKLES) and (os.path.exists(name) or not _could_be_on_the_hub(name)):
        raise UserError(f"{name}: a pickle, which may run anything; convert it to {SUFFIX}")
    if not name.lower().endswith(SUFFIX) and os.path.isfile(name):
        raise UserError(f"{name}: not a {SUFFIX} file; a folder in diffusers' layout or such a file is needed")
    return name.lower().endswith(SUFFIX) and not os.path.isdir(name)


def _could_be_on_the_hub(name):
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def components(path):
    """Which components the file has. Raises UserError saying what it is instead of SDXL, or what makes it unusable."""
    return frozenset(_facts(*_seen(path)))


def has_marker(path, name):
    """Whether the file has an empty tensor of this name, by which a checkpoint tells how it was trained."""
    return name in _header(*_seen(path))


def check_unet(path, config):
    """Raise UserError when the file's UNet has not the transformer blocks that a UNet's config says: a distilled one.

    Its tensors are not read. The block's other shapes are held against the config when it is loaded.
    """
    prefix, found = PREFIXES["unet"], set()
    for name in _header(*_seen(path)):
        if name.startswith(prefix) and ".transformer_blocks." in name:
            place, _, rest = name.removeprefix(prefix).partition(".transformer_blocks.")
            found.add((place, int(rest.partition(".")[0])))
    wanted = set(_transformer_blocks(config))
    if found != wanted:
        place, _ = min(found ^ wanted)
        counts = (sum(p == place for p, _ in blocks) for blocks in (found, wanted))
        has, should = counts
        raise UserError(
            f"{path}: its UNet has {many(has, 'transformer block')} at {place} and {should} are expected: a distilled "
            "model; give it as a folder in diffusers' layout, with its own configs"
        )


def _transformer_blocks(config):
    """(place, index) of each, in SGM's names, of a UNet with diffusers' config of three levels and two layers."""
    depth = config["transformer_layers_per_block"]
    depth = [depth] * 3 if type(depth) is int else depth
    up = config["reverse_transformer_layers_per_block"] or depth[::-1]
    if config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
        yield from (("middle_block.1", n) for n in range(_of(depth[-1], -1)))
    for level, (kind, blocks) in enumerate(zip(config["down_block_types"], depth)):
        if "CrossAttn" in kind:
            yield from ((f"input_blocks.{3 * level + j + 1}.1", n) for j in range(2) for n in range(_of(blocks, j)))
    for level, (kind, blocks) in enumerate(zip(config["up_block_types"], up)):
        if "CrossAttn" in kind:
            yield from ((f"output_blocks.{3 * level + j}.1", n) for j in range(3) for n in range(_of(blocks, j)))


def _of(blocks, j):
    return blocks if type(blocks) is int else blocks[j]


def weights(path, name, config):
    """{diffusers' name: tensor} of the component `name`, mapped. config: the component's own, as diffusers has it."""
    from diffusers.loaders import single_file_utils as sgm

    if name == "unet":
        return sgm.convert_ldm_unet_checkpoint(tensors.mapped(path, PREFIXES[name]), config)
    if name == "text_encoder":
        return sgm.convert_ldm_clip_checkpoint(tensors.mapped(path, PREFIXES[name]))
    if name == "text_encoder_2":
        prefix = PREFIXES[name]
        return sgm.convert_open_clip_checkpoint(None, tensors.mapped(path, prefix), prefix)
    prefix = _vae_prefix(_header(*_seen(path)))
    found = tensors.mapped(path, prefix)
    if any(".down_blocks." in key for key in found):
        return {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    return sgm.convert_ldm_vae_checkpoint(found, config)


def _seen(path):
    """The path, and what tells whether the file behind it is the same one that was looked at before."""
    with naming(path):
        facts = os.stat(path)
    return str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino


@functools.lru_cache(maxsize=8)
def _header(path, *_):
    try:
        return tensors.header(path)[0]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable {SUFFIX} file ({error})") from None


@functools.lru_cache(maxsize=8)
def _facts(path, *seen):
    """{component: its tensors' facts} of a file that can be used."""
    header, found = _header(path, *seen), {}
    if shard := SHARD.search(path):
        raise UserError(f"{path}: one of {int(shard[1])} shards; give the folder that they lie in, or a whole file")
    if any(map(LORA.search, header)):
        raise UserError(f"{path}: a LoRA; an SDXL model is needed")
    for name, what in OTHERS.items():
        if name in header or name[-1] == "." and any(key.startswith(name) for key in header):
            raise UserError(f"{path}: {what}" + ("" if ";" in what else "; an SDXL model is needed"))
    for name, prefix in PREFIXES.items():
        prefix = _vae_prefix(header) if name == "vae" else prefix
        facts = {key: fact for key, fact in header.items() if prefix is not None and key.startswith(prefix)}
        if facts:
            found[name] = facts
    if not found:
        raise UserError(f"{path}: no part of an SDXL model in its {many(len(header), 'tensor')}")
    channels = header[IN_CHANNELS].shape[1:2] if IN_CHANNELS in header else (4,)
    if channels != (4,):
        what = "an inpainting model" if channels == (9,) else "a model that edits pictures or does something else"
        raise UserError(f"{path}: its UNet has {channels[0]} input channels instead of 4: {what}")
    for facts in found.values():
        for key, fact in facts.items():
            scaled = key.endswith((".scale_weight", ".scale_input", "scaled_fp8", ".weight_scale"))
            if scaled or fact.dtype not in FLOATS and not key.endswith("position_ids"):
                raise UserError(f"{path}: {key} ({fact.dtype}) is of quantised weights; take a file in fp16 or fp32")
    return found


def _vae_prefix(header):
    """What the names of the file's VAE begin with; None where it has none."""
    if any(key.startswith(PREFIXES["vae"]) for key in header):
        return PREFIXES["vae"]
    return "" if "encoder.conv_in.weight" in header and "decoder.conv_out.weight" in header else None
