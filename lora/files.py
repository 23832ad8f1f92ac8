"""Adapters <-> one .safetensors file that diffusers, ComfyUI, A1111, Forge, sd-scripts and OneTrainer all load.

The keys are kohya's with SGM block names: `lora_unet_` + path, then `.lora_down.weight` (A, rank × in),
`.lora_up.weight` (B, out × rank) and a 0-dim `.alpha`. Other spellings, which load in one tool and are ignored,
silently, by the others, are read (lora/contents.py) and never written.

`python -m lora.files FILE` prints what a file is.
"""

import hashlib
import json
import math
import re
import struct
import sys
from dataclasses import dataclass

import safetensors.torch
import torch

from data.common import safe
from data.common.disk import atomic_write
from data.common.errors import NumbersError, UserError, one_line, printable
from data.common.words import many
from lora.contents import Contents, key, look


@dataclass(frozen=True)
class Origin:
    """Where weights come from; what their file says about it."""

    title: str  # the run's
    base: str  # the model's hub id, or a folder's or file's own name, never a path
    resolution: int  # pixels a side
    fingerprint: str | None = None  # of the base's UNet (data/models/identity.py), where it is known
    prediction_type: str = "epsilon"  # or v_prediction
    zero_snr: bool = False  # whether the noise schedule ends in pure noise
    trigger_phrase: str | None = None  # that calls for what was learned
    base_precision: str = "plain"  # or nf4, in which its weights were held


def export(adapters, path, origin):
    """Write the adapters, fp16, to `path` (a Path); the same weights of the same Origin give the same bytes.

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
    of_v = origin.prediction_type == "v_prediction"
    metadata = {
        "barelora_base_fingerprint": origin.fingerprint,
        "barelora_base_precision": None if origin.base_precision == "plain" else origin.base_precision,
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",  # its names of blocks
        "modelspec.prediction_type": "v" if of_v else "epsilon",
        "modelspec.resolution": f"{origin.resolution}x{origin.resolution}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": printable(origin.title),
        "modelspec.trigger_phrase": origin.trigger_phrase,
        # A1111 hides a file that has metadata without a version that begins with sdxl_
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_alpha": f"{adapters.alpha:g}",
        "ss_network_dim": str(adapters.rank),
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": printable(origin.base),
        "ss_v_parameterization": str(of_v),
        "ss_zero_terminal_snr": str(origin.zero_snr),
    }
    blob = safetensors.torch.save(tensors)
    with atomic_write(path) as file:
        file.write(_with_metadata(blob, {name: value for name, value in metadata.items() if value}))


def _with_metadata(blob, metadata):
    """Put metadata into a safetensors blob, sorted, because the library's own way writes it in random order.

    sshs_model_hash, by which A1111 and Civitai know a file again, is the sha256 of all that follows the header.
    """
    (size,) = struct.unpack("<Q", blob[:8])
    metadata = metadata | {"sshs_model_hash": hashlib.sha256(blob[8 + size :]).hexdigest()}
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(blob[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text + blob[8 + size :]


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds, read once, so that the digest is of what is loaded."""

    contents: Contents
    tensors: dict
    sha256: str
    bytes: int


def read(path):
    """-> Weights. Raises UserError when it is no LoRA that can be loaded; nothing in a pickle is ever run."""
    contents = look(path)
    try:
        blob = contents.path.read_bytes()
        tensors = safetensors.torch.load(blob)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error})") from None
    for layer in contents.layers.values():
        for name in (layer.A, layer.B):
            if not tensors[name].float().isfinite().all():
                raise UserError(f"{path}: {name} holds something that is not a finite number")
    return Weights(contents, tensors, hashlib.sha256(blob).hexdigest(), len(blob))


def load(unet, weights, seed=0):
    """Inject the adapters of `weights` into `unet`. -> Adapters

    Everything is checked before the UNet is touched. Raises UserError naming the file and the key that fits no layer of
    this UNet. A layer that the file lacks has no update, which is said.
    """
    from lora.inject import inject  # diffusers is imported with it

    contents = weights.contents
    if missing := check(unet, contents):
        print(f"{contents.path}: {missing} layers are not in it; they stay as in the base")
    adapters = inject(unet, contents.rank, contents.alpha, seed, contents.kind)
    for name, (A, B) in adapters.projections().items():
        # Where the file has less than A and B hold, A is as drawn and B zero: no update, but one that can be trained.
        if layer := contents.layers.get(key(name)):
            A[: layer.rank] = weights.tensors[layer.A]
            scale = layer.alpha / layer.rank / (contents.alpha / contents.rank)  # 1 unless ranks or alphas differ
            B[:, : layer.rank] = weights.tensors[layer.B].float() * scale
    adapters.refresh()
    return adapters


def check(unet, contents):
    """Hold the layers of a file to those of a UNet. -> how many of them it lacks, "3 of 560"; None when it has all.

    Raises UserError naming the file and the key that fits no layer of this UNet, and when it has adapters already.
    """
    from lora.inject import targets

    shapes = {key(name): (inside, out) for name, inside, out in targets(unet, contents.kind)}
    for name, layer in contents.layers.items():
        if name not in shapes:
            raise UserError(f"{contents.path}: {layer.A} fits no layer of this UNet")
        inside, out = shapes[name]
        if layer.inside != inside:
            raise UserError(f"{contents.path}: {layer.A} is rank × {layer.inside}, this UNet wants rank × {inside}")
        if layer.out != out:
            raise UserError(f"{contents.path}: {layer.B} is {layer.out} × rank, this UNet wants {out} × rank")
    missing = shapes.keys() - contents.layers.keys()
    return f"{len(missing)} of {len(shapes)}" if missing else None


def main(argv):
    """python -m lora.files FILE: what a file of LoRA weights is, without its base and without a GPU."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python -m lora.files FILE")
    weights = read(argv[0])
    contents, layers = weights.contents, list(weights.contents.layers.values())
    ranks, alphas = sorted({layer.rank for layer in layers}), sorted({layer.alpha for layer in layers})
    fingerprint = f", its UNet's fingerprint {contents.fingerprint}" if contents.fingerprint else ""
    text = f", text of width {contents.text_width}" if contents.text_width else ""
    facts = {
        "base": f"{contents.base or 'not said'}{fingerprint}{text}",
        "layers": f"{len(layers)} of {contents.kind}",
        "rank": " to ".join(f"{rank}" for rank in dict.fromkeys((ranks[0], ranks[-1]))),
        "alpha": " to ".join(f"{alpha:g}" for alpha in dict.fromkeys((alphas[0], alphas[-1]))),
        "dtype": ", ".join(contents.dtypes),
        "file": f"{weights.bytes / 2**20:,.1f} MiB, sha256 {weights.sha256}",
    }
    print(contents.path)
    for name, value in facts.items():
        print(f"  {name:8}{one_line(value)}")
    print("norm of the update, √Σ ‖(alpha / rank) B A‖²")
    for block, (count, norm) in norms(weights).items():
        print(f"  {block:20}{norm:10.4g}  in {many(count, 'layer')}")
    print("metadata" if contents.metadata else "no metadata")
    for name, value in sorted(contents.metadata.items()):
        print(f"  {one_line(name, 60)}: {one_line(value, 100)}")


def norms(weights):
    """{block: (how many layers, the Frobenius norm of their updates together)}, in the order of a forward."""
    found = {}
    for name, layer in weights.contents.layers.items():
        A, B = (weights.tensors[stored].double() for stored in (layer.A, layer.B))
        # ‖B A‖² is the sum of BᵀB ∘ A Aᵀ, rank × rank, instead of out × in
        square = (layer.alpha / layer.rank) ** 2 * ((B.T @ B) * (A @ A.T)).sum().item()
        block = re.match(r"lora_unet_(\w+?_blocks?_\d+)", name)[1]
        count, total = found.get(block, (0, 0.0))
        found[block] = count + 1, total + max(0.0, square)
    # input, middle, output: the letters' order is that of a forward
    return {block: (count, math.sqrt(total)) for block, (count, total) in sorted(found.items())}


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
