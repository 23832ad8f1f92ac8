"""Adapters <-> one .safetensors file that diffusers, ComfyUI, A1111, Forge, sd-scripts and OneTrainer all load.

The keys are kohya's with SGM block names: `lora_unet_` + path, then `.lora_down.weight` (A, rank × in),
`.lora_up.weight` (B, out × rank) and a 0-dim `.alpha`. Other spellings load in one tool and are ignored, silently, by
the others.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from data.common.disk import atomic_write
from data.common.errors import NumbersError, UserError
from lora.inject import inject, targets

_BLOCKS = {  # diffusers' (i, j) -> SGM's flat numbering, for two layers per block as in SDXL
    "down_blocks": lambda i, j: f"input_blocks.{3 * i + j + 1}.1",
    "up_blocks": lambda i, j: f"output_blocks.{3 * i + j}.1",
}


def key(name):
    """Name of a layer in diffusers' UNet -> its name in the file.

    >>> key("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0")
    'lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0'
    """
    name = re.sub(
        r"^(down_blocks|up_blocks)\.(\d+)\.attentions\.(\d+)", lambda m: _BLOCKS[m[1]](int(m[2]), int(m[3])), name
    )
    name = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", name)
    return "lora_unet_" + name.replace(".", "_")


def export(adapters, path, base, resolution):
    """Write the adapters, fp16, to `path` (a Path); the same weights under the same file name give the same bytes.

    base: the model they were trained on, a hub id or a fingerprint, never a local path. resolution: pixels a side.
    Raises NumbersError naming the layer when a weight is not finite, in fp32 or as fp16.
    """
    tensors = {}
    for name, (A, B) in adapters.projections().items():
        for part, weight in (("lora_down", A), ("lora_up", B)):
            half = weight.to("cpu", torch.float16).contiguous()
            if not half.isfinite().all():
                raise NumbersError(
                    f"{name}.{part} is not finite in fp16: {path} was not written; lower --learning_rate"
                )
            tensors[f"{key(name)}.{part}.weight"] = half
        tensors[f"{key(name)}.alpha"] = torch.tensor(float(adapters.alpha))
    metadata = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": path.stem,
        # A1111 hides a file that has metadata without a version that begins with sdxl_
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_alpha": f"{adapters.alpha:g}",
        "ss_network_dim": str(adapters.rank),
        "ss_network_module": "networks.lora",
        "ss_output_name": path.stem,
        "ss_sd_model_name": base,
    }
    with atomic_write(path) as file:
        file.write(_with_metadata(safetensors.torch.save(tensors), metadata))


def _with_metadata(blob, metadata):
    """Put metadata into a safetensors blob, sorted, because the library's own way writes it in random order."""
    (size,) = struct.unpack("<Q", blob[:8])
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(blob[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text + blob[8 + size :]


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds, read once, so that the digest is of what is loaded."""

    path: Path
    tensors: dict
    metadata: dict
    sha256: str


def read(path):
    """-> Weights. Raises UserError when it is not a safetensors file; nothing in a pickle is ever run."""
    try:
        blob = Path(path).read_bytes()
        tensors = safetensors.torch.load(blob)
        (size,) = struct.unpack("<Q", blob[:8])
        metadata = json.loads(blob[8 : 8 + size]).get("__metadata__", {})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; python -m train writes RUN/lora.safetensors") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error})") from None
    return Weights(Path(path), tensors, metadata, hashlib.sha256(blob).hexdigest())


def load(unet, weights):
    """Inject the adapters of `weights` into `unet`. -> Adapters

    Everything is checked before the UNet is touched. Raises UserError naming the file and the key: keys of another
    architecture or tool, a missing partner, a wrong shape, several ranks or alphas, numbers that are not finite.
    """
    rank, alpha = _check(weights.path, weights.tensors, targets(unet))
    adapters = inject(unet, rank, alpha)
    for name, (A, B) in adapters.projections().items():
        A.copy_(weights.tensors[f"{key(name)}.lora_down.weight"])
        B.copy_(weights.tensors[f"{key(name)}.lora_up.weight"])
    adapters.refresh()
    return adapters


def _check(path, stored, found):
    """-> (rank, alpha) of a file that fits the projections `found` exactly."""
    shapes = {}  # key: its shape with -1 for the rank
    for name, inside, out in found:
        shapes[f"{key(name)}.lora_down.weight"] = (-1, inside)
        shapes[f"{key(name)}.lora_up.weight"] = (out, -1)
        shapes[f"{key(name)}.alpha"] = ()
    if foreign := sorted(set(stored) - set(shapes)):
        raise UserError(
            f"{path}: {foreign[0]} and {len(foreign) - 1} more keys fit no attention projection of this UNet"
        )
    if missing := sorted(set(shapes) - set(stored)):
        raise UserError(f"{path}: {missing[0]} and {len(missing) - 1} more are missing")
    ranks, alphas = set(), set()
    for name, shape in shapes.items():
        tensor = stored[name]
        if tensor.dim() != len(shape) or any(want not in (-1, got) for want, got in zip(shape, tensor.shape)):
            wanted = " × ".join("rank" if n == -1 else str(n) for n in shape) or "a number"
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, this UNet wants {wanted}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds something that is not a finite number")
        ranks.update(got for want, got in zip(shape, tensor.shape) if want == -1)
        if shape == ():
            alphas.add(tensor.item())
    if len(ranks) > 1 or len(alphas) > 1:
        raise UserError(f"{path}: ranks {sorted(ranks)} and alphas {sorted(alphas)}; one of each can be loaded")
    (rank,), (alpha,) = ranks, alphas
    if rank < 1 or math.isclose(alpha, 0):
        raise UserError(f"{path}: rank {rank} with alpha {alpha} has no effect")
    return rank, alpha
