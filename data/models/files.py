"""A hub id or a local folder -> one local folder for each component of the model.

What is not there is downloaded once; what cannot be found is named.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from data.common.disk import check_readable
from data.common.safe import DISK_ERRORS, UserError, need_memory, out_of_memory, sha256_file

# Components that have weights, and the stem of their files' names in diffusers and transformers.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
COMPONENTS = (*STEMS, "tokenizer", "tokenizer_2", "scheduler")


def torch_dtype(mixed_precision):
    """The dtype that a value of --mixed_precision stands for."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


@dataclass(frozen=True)
class Component:
    """One component of a model on disk. `variant` is from_pretrained's: "fp16", or None for plain file names."""

    folder: Path
    variant: str | None = None

    def config(self, name="config.json"):
        return _read_json(self.folder / name)

    def fingerprint(self):
        """16 hex digits of the files' content: renaming the folder keeps them, changing one weight does not."""
        small = [
            p for p in self.folder.iterdir() if p.suffix in (".json", ".txt") and not p.name.endswith("index.json")
        ]
        files = sorted(small) + _weights(self.folder, self.variant)
        return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Model:
    """An SDXL pipeline, or a VAE published alone, in diffusers' layout.

    name      a local folder or a hub id
    revision  a branch, tag or commit on the hub
    variant   the weights to prefer, "fp16"; a component that has none of this variant gives its plain ones
    """

    name: str
    revision: str | None = None
    variant: str | None = None

    def component(self, name):
        """-> the Component of this name, one of COMPONENTS.

        Raises UserError naming the model when it is nowhere to be found, or lacks the component or its weights.
        """
        root = self._root([])
        alone = name == "vae" and not (root / "vae").is_dir() and (root / "config.json").is_file()
        folder = root if alone else root / name
        if not folder.is_dir():
            raise UserError(f"{self.name}: no {name}/ in it; an SDXL model in diffusers' layout is needed")
        if name not in STEMS:
            return Component(folder)
        for variant in dict.fromkeys((self.variant, None)):
            self._root([str(p.relative_to(root)) for p in _patterns(folder, variant, STEMS[name])])
            if _weights(folder, variant):
                return Component(folder, variant)
        raise UserError(f"{self.name}: no {STEMS[name]}.safetensors in {folder.name}/; download the model again")

    def pinned(self):
        """The same model under a name that keeps its meaning: an absolute path, or the hub id at the fetched commit."""
        if Path(self.name).is_dir():
            return Model(str(Path(self.name).resolve()), None, self.variant)
        return Model(self.name, self._root([]).name, self.variant)

    def index(self):
        """The content of model_index.json."""
        return _read_json(self._root([]) / "model_index.json")

    def public_name(self):
        """The name that may be published: the hub id, or the UNet's fingerprint instead of a local path."""
        return f"local-{self.component('unet').fingerprint()}" if Path(self.name).is_dir() else self.name

    def _root(self, patterns):
        """The local folder, or the hub's snapshot with all configs, all vocabularies and the files of `patterns`."""
        if Path(self.name).is_dir():
            return Path(self.name)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        small = ["model_index.json", "config.json"]
        small += [f"{component}/*.{kind}" for component in COMPONENTS for kind in ("json", "txt")]
        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=small + patterns))
        except HFValidationError:
            raise UserError(
                f"{self.name}: neither a folder here nor a hub id like stabilityai/stable-diffusion-xl-base-1.0"
            ) from None
        except OSError as error:  # huggingface_hub's errors about networks, permissions and being offline all are one
            if error.errno in DISK_ERRORS:
                raise
            reason = next(iter(str(error).split("\n")), "")
            raise UserError(
                f"{self.name}: not a folder here, and not from the hub: {type(error).__name__}: {reason}"
            ) from None


def load(kind, component, dtype, device, prepare=None):
    """A diffusers model (kind: UNet2DConditionModel, AutoencoderKL) from its Component, straight to the device.

    The model is built without memory and filled from the mapped file, because from_pretrained without accelerate first
    makes 10 GB of random fp32 numbers for SDXL's UNet, more than a free Colab machine has. prepare(model) makes changes
    while the weights are still in the mapped file; made on the device, they would leave holes in its memory.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = kind.from_config(component.config())
    weights = {}
    try:
        for file in _weights(component.folder, component.variant):
            check_readable(file)
            weights |= load_file(file)
        copied = sum(
            tensor.numel() for tensor in weights.values() if torch.device(device).type == "cpu" or tensor.dtype != dtype
        )
        need_memory(copied * dtype.itemsize, f"{component.folder}: to load its weights")
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).split("\n")[-1].strip()
        raise UserError(f"{component.folder}: its weights are damaged or do not fit its config ({reason})") from None
    if prepare:
        prepare(model)
    return model.to(device).eval().requires_grad_(False)


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not there or damaged ({error}); an SDXL model in diffusers' layout is needed"
        ) from None


def _patterns(folder, variant, stem):
    """Patterns of weight files: one file `stem.fp16.safetensors`, or shards `stem.fp16-00001-of-00002.safetensors`."""
    suffix = f".{variant}" if variant else ""
    return [folder / f"{stem}{suffix}{shard}.safetensors" for shard in ("", "-*-of-*")]


def _weights(folder, variant):
    return sorted(
        f for stem in set(STEMS.values()) for p in _patterns(folder, variant, stem) for f in folder.glob(p.name)
    )
