"""Where a model's files are: a hub id or a local folder -> one local folder per part, downloaded once, named when missing."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from data.common.safe import DISK_ERRORS, UserError, need_memory, out_of_memory, sha256_file

# Parts that have weights, and their files' stem as diffusers and transformers name it.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


@dataclass(frozen=True)
class Part:
    """One part of a model on disk. `variant` is what from_pretrained wants: "fp16", or None for plain names."""

    folder: Path
    variant: str | None = None

    def config(self, name="config.json"):
        return _read_json(self.folder / name)

    def fingerprint(self):
        """16 hex digits over the content: renaming the folder changes nothing, changing one weight does."""
        small = [
            p for p in self.folder.iterdir() if p.suffix in (".json", ".txt") and not p.name.endswith("index.json")
        ]
        files = sorted(small) + _weights(self.folder, self.variant)
        return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Model:
    """An SDXL pipeline, or a VAE published alone, in diffusers' layout.

    name      a local folder or a hub id
    revision  branch, tag or commit on the hub
    variant   take weights of this variant where there are some, else the plain ones
    """

    name: str
    revision: str | None = None
    variant: str | None = None

    def part(self, part):
        """-> Part for "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2" or "scheduler".

        Raises UserError naming the model: neither a folder nor on the hub, without this part, or without its weights.
        """
        root = self._root([])
        alone = part == "vae" and not (root / "vae").is_dir() and (root / "config.json").is_file()
        folder = root if alone else root / part
        if not folder.is_dir():
            raise UserError(f"{self.name}: no {part}/ in it; an SDXL model in diffusers' layout is needed")
        if part not in STEMS:
            return Part(folder)
        for variant in dict.fromkeys((self.variant, None)):
            self._root([str(p.relative_to(root)) for p in _patterns(folder, variant, STEMS[part])])
            if _weights(folder, variant):
                return Part(folder, variant)
        raise UserError(f"{self.name}: no {STEMS[part]}.safetensors in {folder.name}/; download the model again")

    def pinned(self):
        """The same model by a name that does not move: an absolute path, or the hub id at the commit that was fetched."""
        if Path(self.name).is_dir():
            return Model(str(Path(self.name).resolve()), None, self.variant)
        return Model(self.name, self._root([]).name, self.variant)

    def index(self):
        """model_index.json."""
        return _read_json(self._root([]) / "model_index.json")

    def public_name(self):
        """What may be published: the hub id, or a fingerprint of the UNet in place of a local path."""
        return f"local-{self.part('unet').fingerprint()}" if Path(self.name).is_dir() else self.name

    def _root(self, patterns):
        """The folder itself, or the hub's snapshot with the files of `patterns` and all configs and vocabularies in it."""
        if Path(self.name).is_dir():
            return Path(self.name)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        small = ["model_index.json", "config.json", *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt"))]
        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=small + patterns))
        except HFValidationError:
            raise UserError(
                f"{self.name}: neither a folder here nor a hub id like stabilityai/stable-diffusion-xl-base-1.0"
            ) from None
        except OSError as error:  # every network, permission and offline error of huggingface_hub is one
            if error.errno in DISK_ERRORS:
                raise
            reason = next(iter(str(error).split("\n")), "")
            raise UserError(
                f"{self.name}: not a folder here, and not from the hub: {type(error).__name__}: {reason}"
            ) from None


def load(kind, part, dtype, device, prepare=None):
    """A diffusers model (UNet2DConditionModel, AutoencoderKL) from its Part, straight to the device.

    Built without memory and filled from the mapped file: from_pretrained without accelerate first makes 10 GB of random
    fp32 numbers for SDXL's UNet, more than a free Colab machine has. prepare(model): changes to make while the weights are
    in the mapped file; made on the device they would leave holes in its memory.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = kind.from_config(part.config())
    weights = {}
    try:
        for file in _weights(part.folder, part.variant):
            weights |= load_file(file)
        copied = sum(
            tensor.numel() for tensor in weights.values() if torch.device(device).type == "cpu" or tensor.dtype != dtype
        )
        need_memory(copied * dtype.itemsize, f"{part.folder}: to load its weights")
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).split("\n")[-1].strip()
        raise UserError(f"{part.folder}: its weights are damaged or do not fit its config ({reason})") from None
    if prepare:
        prepare(model)
    return model.to(device).eval().requires_grad_(False)


def torch_dtype(mixed_precision):
    """--mixed_precision -> torch's dtype: no is fp32."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


PARTS = (*STEMS, "tokenizer", "tokenizer_2", "scheduler")


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not there or damaged ({error}); an SDXL model in diffusers' layout is needed"
        ) from None


def _patterns(folder, variant, stem):
    """One file `stem.fp16.safetensors`, or shards `stem.fp16-00001-of-00002.safetensors`."""
    suffix = f".{variant}" if variant else ""
    return [folder / f"{stem}{suffix}{shard}.safetensors" for shard in ("", "-*-of-*")]


def _weights(folder, variant):
    return sorted(
        f for stem in set(STEMS.values()) for p in _patterns(folder, variant, stem) for f in folder.glob(p.name)
    )
