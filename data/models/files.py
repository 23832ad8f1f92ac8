"""A hub id, a local folder or one file -> where each component of the model is, its config and its tensors.

What is not there is downloaded once; what cannot be found is named.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from data.common.disk import DISK_ERRORS, READ_ONLY
from data.common.errors import UserError, out_of_memory
from data.common.fields import check_fields, read_json
from data.common.system import need_memory
from data.models import single
from data.models.schema import CONFIGS, check_together
from data.models.tensors import mapped

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
# Whose configs and vocabularies a single file gets where nobody names others: JSON and text, some 4 MB.
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLAGS = {"vae": "--pretrained_vae_model_name_or_path or --model_config"}  # that supply what a single file lacks


def dtype_name(mixed_precision):
    """The name in torch of the dtype that a value of --mixed_precision stands for."""
    return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[mixed_precision]


def vae_model(name, variant, configs):
    """A VAE that is named next to a model. configs: for a file, the model whose VAE has the same config.

    Raises UserError for a file without one.
    """
    if single.is_file(name) and "vae" not in single.components(name):
        raise UserError(f"{name}: no VAE in it; name a file or folder that has one, or leave the flag out")
    return Model(name, None, variant, configs)


def torch_dtype(mixed_precision):
    """That dtype."""
    import torch

    return getattr(torch, dtype_name(mixed_precision))


@dataclass(frozen=True)
class Component:
    """One component of a model on disk.

    name     one of COMPONENTS, or "model_index"
    folder   of its config, and of its files unless they are in `single`
    variant  from_pretrained's: "fp16", or None for plain file names
    single   the one file that holds its weights among others
    told     fields of its config that a flag or the single file says otherwise, {name: value}
    """

    name: str
    folder: Path
    variant: str | None = None
    single: Path | None = None
    told: dict | None = None

    def config(self):
        """Its config, with what missing fields mean. Raises UserError naming a field that breaks the schema."""
        file, table = CONFIGS[self.name]
        found = read_json(self.folder / file, ADVICE)
        return check_fields(table, found | self.told if self.told else found, self.folder / file, ADVICE)

    def files(self):
        """Its files besides the config: the weights, or the vocabulary."""
        if self.single:
            return [self.single]
        if self.name in STEMS:
            return _weights(self.folder, self.variant)
        words = [self.folder / name for name in VOCABULARY if self.name.startswith("tokenizer")]
        return [path for path in words if path.is_file()]

    def weights(self):
        """{name in diffusers: tensor}, mapped and not read. Raises UserError when a file is damaged."""
        from safetensors import SafetensorError

        try:
            if self.single:
                return single.weights(self.single, self.name, self.config())
            return {name: tensor for file in self.files() for name, tensor in mapped(file).items()}
        except SafetensorError as error:
            raise UserError(f"{self}: its weights are damaged ({error}); download the model again") from None

    def __str__(self):
        """Where its weights are, for messages."""
        return f"{self.single}: {self.name}" if self.single else str(self.folder)


@dataclass(frozen=True)
class Model:
    """An SDXL pipeline, or a VAE published alone: in diffusers' layout, or in one .safetensors file.

    name      a local folder, a hub id or a file
    revision  a branch, tag or commit on the hub
    variant   the weights to prefer, "fp16"; a component that has none of this variant gives its plain ones
    config    for a file: the model whose configs and vocabularies it has, and what weights it lacks; None: SDXL's own
              configs and vocabularies
    prediction_type, rescale_betas_zero_snr
              what the scheduler's config says otherwise; None and False: nothing
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool = False

    def component(self, name):
        """-> the Component of this name, one of COMPONENTS.

        Raises UserError naming the model when it is nowhere to be found, or lacks the component or its weights.
        """
        if single.is_file(self.name):
            return self._in_the_file(name)
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

    def _in_the_file(self, name):
        there, described = single.components(self.name), self._described(name, self._root([]))
        if name not in STEMS:
            return described
        if name in there:
            return replace(described, single=Path(self.name))
        others = Model(self.config, None, self.variant) if self.config else None
        variants = (self.variant, None)
        if others and (not others.is_local() or any(_weights(Path(self.config) / name, v) for v in variants)):
            return others.component(name)
        nor = f", nor in {self.config}" if others else ""
        flag = FLAGS.get(name, "--model_config")
        raise UserError(f"{self.name}: no {name} in it{nor}; name a model that has one with {flag}")

    def schedule(self):
        """What the UNet predicts and how its noise ends, and who says so, in words."""
        told = {field: who for field, (_, who) in self.told().items()}
        config = self.component("scheduler").config()
        kind = f"{config['prediction_type']} ({told.get('prediction_type', 'by its scheduler_config.json')})"
        if not config["rescale_betas_zero_snr"]:
            return f"the UNet predicts {kind}"
        who = told.get("rescale_betas_zero_snr", "by its scheduler_config.json")
        return f"the UNet predicts {kind}; zero terminal SNR ({who})"

    def told(self):
        """What the scheduler's config is overruled by, {field: (value, who says so)}."""
        found = {}
        if single.is_file(self.name):
            if single.has_marker(self.name, "v_pred"):
                found["prediction_type"] = "v_prediction", "by the file's tensor v_pred"
            if single.has_marker(self.name, "ztsnr"):
                found["rescale_betas_zero_snr"] = True, "by the file's tensor ztsnr"
        if self.prediction_type:
            found["prediction_type"] = self.prediction_type, "by --prediction_type"
        if self.rescale_betas_zero_snr:
            found["rescale_betas_zero_snr"] = True, "by --rescale_betas_zero_snr"
        return found

    def _described(self, name, root):
        """The component with its config, but perhaps without its weights."""
        folder = root if name == "model_index" or _is_alone(name, root) else root / name
        if not folder.is_dir():
            raise UserError(f"{self.configs()}: no {name}/ in it; {ADVICE}")
        told = {field: value for field, (value, _) in self.told().items()} if name == "scheduler" else None
        return Component(name, folder, told=told)

    def configs(self):
        """The folder or hub id that has the configs."""
        return self.config or SDXL if single.is_file(self.name) else self.name

    def has(self, name):
        """Whether the component is in the model, which is a folder or a file here."""
        if single.is_file(self.name):
            return name not in STEMS or name in single.components(self.name)
        root = Path(self.name)
        return name == "model_index" or _is_alone(name, root) or (root / name).is_dir()

    def is_local(self):
        """Whether it is a folder or a file here, which may change, and not a commit of the hub, which cannot."""
        return Path(self.name).is_dir() or single.is_file(self.name)

    def check(self):
        """Raise UserError when a config says something that this program does not compute, or two do not fit together.

        It reads the configs alone, so that it costs milliseconds and no download of weights. The VAE is left out,
        because another one may be used.
        """
        root = self._root([])
        configs = {name: self._described(name, root).config() for name in CONFIGS if name != "vae"}
        check_together(self.name, configs["unet"], configs["text_encoder"], configs["text_encoder_2"])
        if single.is_file(self.name):
            for name in ("unet", "text_encoder", "text_encoder_2"):
                self.component(name)
            if "unet" in single.components(self.name):
                single.check_unet(self.name, configs["unet"])

    def pinned(self):
        """The same model under a name that keeps its meaning: an absolute path, or the hub id at the fetched commit."""
        config = str(Path(self.config).resolve()) if self.config and Path(self.config).is_dir() else self.config
        if self.is_local():
            return replace(self, name=str(Path(self.name).resolve()), revision=None, config=config)
        return replace(self, revision=self._root([]).name)

    def index(self):
        """The content of model_index.json."""
        return self.component("model_index").config()

    def unet_config(self):
        """The UNet's config, for which its weights need not be there."""
        return self._described("unet", self._root([])).config()

    def public_name(self):
        """The name that may be published: the hub id, or a folder's or file's own name without the path to it."""
        return Path(self.name).resolve().name if self.is_local() else self.name

    def _root(self, patterns):
        """The local folder, or the hub's snapshot with all configs, all vocabularies and the files of `patterns`."""
        name = self.configs()
        if Path(name).is_dir():
            return Path(name)
        if Path(name).is_file():
            raise UserError(f"--model_config {name}: a file; a folder in diffusers' layout or a hub id is needed")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        small = ["model_index.json", "config.json"]
        small += [f"{component}/*.{kind}" for component in COMPONENTS for kind in ("json", "txt")]
        try:
            return Path(snapshot_download(name, revision=self.revision, allow_patterns=small + patterns))
        except HFValidationError:
            way = self._way_out()
            raise UserError(f"{name}: neither a folder nor a file here, nor a hub id like {SDXL}{way}") from None
        except OSError as error:  # huggingface_hub's errors about networks, permissions and being offline all are one
            if error.errno in DISK_ERRORS:
                raise
            if error.errno in READ_ONLY:
                raise UserError(
                    f"{name}: not a folder here, and cannot be downloaded to {error.filename} ({error.strerror}); "
                    "name a folder for downloads with HF_HOME"
                ) from None
            reason = next(iter(str(error).split("\n")), "")
            raise UserError(
                f"{name}: not a folder here, and not from the hub: {type(error).__name__}: {reason}{self._way_out()}"
            ) from None

    def _way_out(self):
        """What else a file's configs and vocabularies can come from."""
        if not single.is_file(self.name):
            return ""
        return f"; {self.name} needs its JSON and text files: name a folder that has them with --model_config"


def load(kind, component, dtype, device, prepare=None):
    """A diffusers model (kind: UNet2DConditionModel, AutoencoderKL) from its Component, straight to the device.

    The model is built without memory and filled from the mapped file, because from_pretrained without accelerate first
    makes 10 GB of random fp32 numbers for SDXL's UNet, more than a free Colab machine has. prepare(model) makes changes
    while the weights are still in the mapped file; made on the device, they would leave holes in its memory.
    """
    import torch

    config, weights = component.config(), component.weights()
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
        copied = sum(
            tensor.numel() for tensor in weights.values() if torch.device(device).type == "cpu" or tensor.dtype != dtype
        )
        need_memory(copied * dtype.itemsize, f"{component}: to load its weights")
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).split("\n")[-1].strip()
        raise UserError(f"{component}: its weights are damaged or do not fit its config ({reason})") from None
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
