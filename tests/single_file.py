"""A folder in diffusers' layout -> one .safetensors file with SGM's names, as checkpoints are passed around.

The names are those of Stability AI's generative-models (sgm/modules/diffusionmodules, sgm/modules/autoencoding) and of
open_clip, written down here on their own, not derived from the converters that the product uses.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
for i in range(3):
    for j in range(2):
        UNET[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
        UNET[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
    UNET[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
    for j in range(3):
        UNET[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
        UNET[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
    UNET[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{3 * i + 2}.2.conv"

VAE = {"encoder.conv_norm_out": "encoder.norm_out", "decoder.conv_norm_out": "decoder.norm_out"}
for half in ("encoder", "decoder"):
    VAE[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
    VAE[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
    VAE[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
for i in range(4):
    for j in range(3):
        VAE[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        VAE[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{3 - i}.block.{j}"
    VAE[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
    VAE[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{3 - i}.upsample"
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPEN_CLIP_LAYER |= {"self_attn.out_proj": "attn.out_proj"}


def _begins(name, table):
    """The name with the longest of the table's beginnings replaced."""
    for old in sorted(table, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return table[old] + name[len(old) :]
    return name


def unet(tensors):
    for name, tensor in tensors.items():
        new = _begins(name, UNET)
        if ".resnets." in name:
            head, tail = re.match(r"(.*?blocks\.\d+\.0|middle_block\.\d)\.(.*)", new).groups()
            new = f"{head}.{_begins(tail, RESNET)}"
        yield f"model.diffusion_model.{new}", tensor


def vae(tensors, prefix="first_stage_model."):
    for name, tensor in tensors.items():
        new = _begins(name, VAE).replace("conv_shortcut", "nin_shortcut")
        if ".attn_1." in new:
            head, tail = new.split(".attn_1.")
            new = f"{head}.attn_1.{_begins(tail, VAE_ATTENTION)}"
            if tensor.ndim == 2:  # SGM computes them as convolutions of one pixel
                tensor = tensor[:, :, None, None].contiguous()
        yield prefix + new, tensor


def text_encoder(tensors):
    for name, tensor in tensors.items():
        yield f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}", tensor


def text_encoder_2(tensors):
    tensors, prefix = (
        {name.removeprefix("text_model."): t for name, t in tensors.items()},
        "conditioner.embedders.1.model.",
    )
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            yield f"{prefix}text_projection", tensor.T.contiguous()
        elif name in OPEN_CLIP:
            yield prefix + OPEN_CLIP[name], tensor
        else:
            layer, rest = re.match(r"encoder\.layers\.(\d+)\.(.*)", name).groups()
            part = re.match(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
            if not part:
                yield f"{prefix}transformer.resblocks.{layer}.{_begins(rest, OPEN_CLIP_LAYER)}", tensor
            elif part[1] == "q":
                three = [tensors[f"encoder.layers.{layer}.self_attn.{p}_proj.{part[2]}"] for p in "qkv"]
                yield f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{part[2]}", torch.cat(three)
    yield f"{prefix}logit_scale", torch.tensor(4.6)


PARTS = dict(unet=unet, vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2)


def single_file(folder, path, parts=tuple(PARTS), change=lambda tensor: tensor, markers=()):
    """Write the model in `folder` into one file. change: of every tensor. markers: names of empty tensors beside."""
    found = {name: torch.empty(0) for name in markers}
    for part in parts:
        tensors = {}
        for file in sorted((Path(folder) / part).glob("*.safetensors")):
            tensors |= load_file(file)
        found |= {name: change(tensor) for name, tensor in PARTS[part](tensors)}
    save_file(found, path)
    return path


def configs(folder, out):
    """Copy the JSON and text files of a model, as --model_config wants them."""
    for file in Path(folder).rglob("*"):
        if file.suffix in (".json", ".txt"):
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (out / file.relative_to(folder)).write_bytes(file.read_bytes())
    assert json.loads((out / "model_index.json").read_text())
    return out
