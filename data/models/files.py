"""A hub id or a local folder -> one local folder for each component of the model.

What is not there is downloaded once; what cannot be found is named.
"""

from dataclasses import dataclass
from pathlib import Path

from data.common.disk import DISK_ERRORS, check_readable
from data.common.errors import UserError, out_of_memory
from data.common.fields import check_fields, read_json
from data.common.system import need_memory
from data.models.identity import fingerprint, identity
from data.models.schema import CONFIGS, check_together

# Components that have weights, and the stem of their files' names in diffusers and transformers.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
COMPONENTS = (*STEMS, "tokenizer", "tokenizer_2", "scheduler")
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
ADVICE = "an SDXL model in diffusers' layout is needed"


def dtype_name(mixed_precision):
    """The name in torch of the dtype that a value of --mixed_precision stands for."""
    return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[mixed_precision]


def torch_dtype(mixed_precision):
    """That dtype."""
    import torch

    return getattr(torch, dtype_name(mixed_precision))


@dataclass(frozen=True)
class Component:
    """One component of a model on disk. `variant` is from_pretrained's: "fp16", or None for plain file names."""

    name: str  # one of COMPONENTS, or "model_index"
    folder: Path
    variant: str | None = None

    def config(self):
        """Its config, with what missing fields mean. Raises UserError naming a field that breaks the schema."""
        file, table = CONFIGS[self.name]
        return check_fields(table, read_json(self.folder / file, ADVICE), self.folder / file, ADVICE)

    def files(self):
        """Its files besides the config: the weights, or the vocabulary."""
        if self.name in STEMS:
            return _weights(self.folder, self.variant)
        words = [self.folder / name for name in VOCABULARY if self.name.startswith("tokenizer")]
        return [path for path in words if path.is_file()]


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
        component = self._described(name, root)
        if name not in STEMS:
            return component
        folder = component.folder
        for variant in dict.fromkeys((self.variant, None)):
            self._root([str(p.relative_to(root)) for p in _patterns(folder, variant, STEMS[name])])
            if _weights(folder, variant):
                return Component(name, folder, variant)
        raise UserError(f"{self.name}: no {STEMS[name]}.safetensors in {folder.name}/; download the model again")

    def _described(self, name, root):
        """The component with its config, but perhaps without its weights."""
        folder = root if name == "model_index" or _is_alone(name, root) else root / name
        if not folder.is_dir():
            raise UserError(f"{self.name}: no {name}/ in it; {ADVICE}")
        return Component(name, folder)

    def has(self, name):
        """Whether the component is in the model, which is a folder here."""
        root = Path(self.name)
        return name == "model_index" or _is_alone(name, root) or (root / name).is_dir()

    def is_local(self):
        """Whether it is a folder here, which may change, and not a commit of the hub, which cannot."""
        return Path(self.name).is_dir()

    def check(self):
        """Raise UserError when a config says something that this program does not compute, or two do not fit together.

        It reads the configs alone, so that it costs milliseconds and no download of weights. The VAE is left out,
        because another one may be used.
        """
        root = self._root([])
        configs = {name: self._described(name, root).config() for name in CONFIGS if name != "vae"}
        check_together(self.name, configs["unet"], configs["text_encoder"], configs["text_encoder_2"])

    def pinned(self):
        """The same model under a name that keeps its meaning: an absolute path, or the hub id at the fetched commit."""
        if self.is_local():
            return Model(str(Path(self.name).resolve()), None, self.variant)
        return Model(self.name, self._root([]).name, self.variant)

    def index(self):
        """The content of model_index.json."""
        return self.component("model_index").config()

    def public_name(self, unet=None):
        """The name that may be published: the hub id, or instead of a local path the UNet's fingerprint.

        unet: the fingerprint, when it is known already.
        """
        if not self.is_local():
            return self.name
        return f"local-{unet or fingerprint(identity(self.component('unet')))}"

    def _root(self, patterns):
        """The local folder, or the hub's snapshot with all configs, all vocabularies and the files of `patterns`."""
        if self.is_local():
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

    config, weights = component.config(), {}
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
        for file in _weights(component.folder, component.variant):
            check_readable(file)
            weights |= load_file(file)
        copied = sum(
            tensor.numel() for tensor in weights.values() if torch.device(device).type == "cpu" or tensor.dtype != dtype
        )
        need_memory(copied * dtype.itemsize, f"{component.folder}: to load its weights")
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).split("\n")[-1].strip()
        raise UserError(f"{component.folder}: its weights are damaged or do not fit its config ({reason})") from None
    if prepare:
        prepare(model)
    return model.to(device).eval().requires_grad_(False)


def _is_alone(name, root):
    """Whether `root` is a VAE that was published without the rest of a pipeline."""
    return name == "vae" and not (root / "vae").is_dir() and (root / "config.json").is_file()


def _patterns(folder, variant, stem):
    """Patterns of weight files: one file `stem.fp16.safetensors`, or shards `stem.fp16-00001-of-00002.safetensors`."""
    suffix = f".{variant}" if variant else ""
    return [folder / f"{stem}{suffix}{shard}.safetensors" for shard in ("", "-*-of-*")]


def _weights(folder, variant):
    return sorted(
        f for stem in set(STEMS.values()) for p in _patterns(folder, variant, stem) for f in folder.glob(p.name)
    )
