"""Every flag of the commands, once: its name, default and meaning on one line. Standard library only.

The names are those of diffusers' training scripts. A flag given to the wrong command is answered with the right one.
"""

import argparse
import difflib
import os
import types
import typing
from dataclasses import MISSING, dataclass, field, fields

from data.common.errors import UserError, is_text


def flag(default, meaning, choices=None, at_least=None, at_most=None, above=None, positional=False):
    """A dataclass field that is also a command-line flag. Its bounds are checked before anything is loaded.

    positional: it is given by its place, without its name.
    """
    bounds = dict(choices=choices, at_least=at_least, at_most=at_most, above=above)
    return field(default=default, metadata=dict(meaning=meaning, positional=positional, **bounds))


def spelled(f):
    """What a field is called on the command line: --rank, or RUN where its place says what it is."""
    return f.name.upper() if f.metadata["positional"] else f"--{f.name}"


MOST = 10**9  # of whole numbers that nothing else bounds: a slipped key must not become a step that never ends
FP32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the least and the largest that is computed with
DASHES = "‐‑‒–—―−－"  # what editors, chats and web pages make of - and --
PRECISIONS = ("no", "fp16", "bf16")
BASES = ("plain", "nf4")  # plain, and what data/models/packed.py's FORMATS has
PREDICTIONS = ("epsilon", "v_prediction")
TRACKERS = ("tensorboard", "wandb")  # their packages' names; what train/trackers.py's KINDS has
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LAYERS = ("attn", "attn-mlp")  # what lora/inject.py's TARGETS has


@dataclass(frozen=True)
class Precompute:
    """python -m data.precompute: pictures and captions -> RUN/cache"""

    output_dir: str = flag(MISSING, "the run's folder; the cache goes to its cache/")
    pretrained_model_name_or_path: str = flag(
        MISSING, "SDXL model: a hub id, a folder in diffusers' layout or one .safetensors file"
    )
    model_config: str | None = flag(
        None, "for a file: the model whose configs and vocabularies it has, and what weights it lacks; default: SDXL's"
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another VAE instead of the model's own: a hub id, a folder or a .safetensors file"
    )
    prediction_type: str | None = flag(
        None, "what the UNet predicts; default: as the model's scheduler or file says", choices=PREDICTIONS
    )
    rescale_betas_zero_snr: bool = flag(
        False, "noise up to zero terminal SNR, where the model's scheduler or file does not say so itself"
    )
    revision: str | None = flag(None, "the model's branch, tag or commit on the hub")
    variant: str | None = flag(
        None, "weights variant; default: fp16 where the model has one, unless --mixed_precision no"
    )
    dataset_name: str | None = flag(None, "a dataset on the hub, or a folder written by datasets' save_to_disk")
    train_data_dir: str | None = flag(
        None,
        "a folder of images with metadata.jsonl, with a .txt or .caption next to each, or in folders like 10_red fox",
    )
    image_column: str = flag("image", "the dataset's column of images")
    caption_column: str = flag("text", "the dataset's column of captions")
    instance_prompt: str | None = flag(
        None, "a trigger word: the caption of pictures that have none, and in front of the others that lack it"
    )
    shuffle_caption: bool = flag(
        False, "cache each caption with its comma-separated tags in several orders, of which training draws one"
    )
    keep_tokens: int = flag(
        0,
        "with --shuffle_caption the first N tags stay in front, not counting a trigger word before them",
        at_least=0,
        at_most=1000,
    )
    caption_variants: int | None = flag(
        None, "orders of each caption with --shuffle_caption, its own among them; default: 8", at_least=2, at_most=1000
    )
    max_token_length: int = flag(75, "tokens that are read of a caption, in chunks of 75", choices=(75, 150, 225))
    max_train_samples: int | None = flag(None, "take only the first N rows", at_least=1, at_most=MOST)
    resolution: int = flag(
        1024,
        "side of the square that images are resized and cropped to, pixels, a multiple of 64",
        at_least=64,
        at_most=2**13,
    )
    buckets: bool = flag(
        False, "keep proportions: buckets up to 2:1 of about resolution² pixels, in steps of 64, instead of the square"
    )
    random_flip: bool = flag(False, "cache each image mirrored as well; training draws one of the two")
    validation_fraction: float = flag(
        0.0, "hold this share of the pictures out of training, chosen by content", at_least=0, at_most=0.5
    )
    validation_prompt: tuple[str, ...] = flag(
        (), "prompts, 16 at most, that training draws at its saves, into RUN/samples"
    )
    skip_bad: bool = flag(
        False, "leave out rows that cannot be used, and list them in the manifest, instead of stopping"
    )
    explain: bool = flag(False, "say what would be encoded and why, and do nothing")
    seed: int = flag(42, "the orders of --shuffle_caption are functions of it", at_least=0, at_most=2**63 - 1)
    mixed_precision: str = flag("fp16", "what the VAE and the text encoders compute in", choices=PRECISIONS)
    cache_dir: str | None = flag(None, "the cache's folder, for several runs on one cache; default: RUN/cache")


@dataclass(frozen=True)
class Train:
    """python -m train: RUN/cache -> RUN/lora.safetensors; run again, it goes on where it stopped"""

    output_dir: str = flag(MISSING, "the run's folder: reads cache/, writes state/, metrics.jsonl and lora.safetensors")
    train_batch_size: int = flag(1, "images per micro-step", at_least=1, at_most=2**12)
    gradient_accumulation_steps: int = flag(4, "micro-steps per optimizer step", at_least=1, at_most=2**12)
    max_train_steps: int | None = flag(500, "optimizer steps in all", at_least=1, at_most=MOST)
    num_train_epochs: int | None = flag(
        None,
        "epochs instead of steps; of both flags the last one on the command line counts",
        at_least=1,
        at_most=MOST,
    )
    learning_rate: float = flag(1e-4, "peak learning rate", above=0)
    lr_scheduler: str = flag("constant", "learning-rate schedule", choices=SCHEDULES)
    lr_warmup_steps: int = flag(0, "steps of linear warm-up (every schedule but constant)", at_least=0, at_most=MOST)
    lr_num_cycles: int | None = flag(
        None, "cycles of cosine_with_restarts, each from the peak to 0; default: 3", at_least=2, at_most=MOST
    )
    rank: int = flag(32, "rank r of the update B A", at_least=1, at_most=1280)
    lora_alpha: float | None = flag(None, "the update is scaled by alpha / rank; default: the rank", above=0)
    lora_layers: str = flag(
        "attn",
        "attn: the UNet's attention projections; attn-mlp: feed-forwards, proj_in, proj_out too",
        choices=LAYERS,
    )
    network_weights: str | None = flag(
        None, "a new run starts from this LoRA file; rank, alpha and layers are the file's"
    )
    snr_gamma: float | None = flag(None, "min-SNR loss weighting, 5 is the paper's; default: off", above=0)
    noise_offset: float = flag(0.0, "adds this share of a constant per channel to the noise", at_least=0)
    proportion_empty_prompts: float = flag(
        0.0, "share of captions replaced by the model's unconditional embedding", at_least=0, at_most=1
    )
    seed: int = flag(42, "all randomness is a function of (seed, step, slot)", at_least=0, at_most=2**63 - 1)
    mixed_precision: str = flag(
        "fp16", "base weights and activations; LoRA weights are fp32 always", choices=PRECISIONS
    )
    base_precision: str | None = flag(
        None,
        "plain: the base as --mixed_precision says; nf4: its linear weights in 4 bits; default: nf4 where all else is "
        "too large",
        choices=BASES,
    )
    vram_gib: float | None = flag(
        None,
        "GPU memory to stay within, GiB, all that CUDA holds counted; as little as possible is recomputed; default: "
        "what is free",
        above=0,
    )
    gradient_checkpointing: bool = flag(
        False, "recompute every block's activations: the least memory, about a third slower"
    )
    no_cuda_graph: bool = flag(
        False, "start every kernel from Python instead of replaying a captured graph: slower, for debugging"
    )
    deterministic: bool = flag(
        False, "the same command gives the same bits on a GPU as well, as it does on a CPU; slower"
    )
    use_8bit_adam: bool = flag(False, "bitsandbytes AdamW8bit, where it is installed, instead of torch's AdamW")
    adam_weight_decay: float = flag(1e-2, "AdamW weight decay", at_least=0)
    max_grad_norm: float = flag(1.0, "gradient clipping by norm", above=0)
    cache_dir: str | None = flag(None, "the cache's folder; default: the one the run began with, else RUN/cache")
    restart: bool = flag(False, "move what the run has to RUN/earlier-N and start at step 0")
    checkpointing_steps: int = flag(100, "save state and weights every N steps", at_least=1, at_most=MOST)
    validation_steps: int | None = flag(
        None, "look at what was learned every N steps, besides at every save", at_least=1, at_most=MOST
    )
    report_to: tuple[str, ...] | None = flag(
        None,
        "show numbers, pictures and settings there as well: in RUN/tensorboard, at wandb.ai or both",
        choices=TRACKERS,
    )
    push_to_hub: bool = flag(
        False,
        "publish the run after the last step, as python -m infer.publish; whether it may is asked before the first",
    )
    hub_model_id: str | None = flag(None, "the repository on the hub, USER/NAME; NAME alone is your own")
    private: bool = flag(False, "make the repository private; one that is there and public is refused")


@dataclass(frozen=True)
class Curves:
    """python -m train.metrics RUN …: the curves of RUN/metrics.jsonl, in the terminal and as a picture"""

    run: tuple[str, ...] = flag(MISSING, "the folders of one to eight runs", positional=True)
    output: str | None = flag(None, "the picture, a .png; default: the first run's RUN/curves.png")


@dataclass(frozen=True)
class Infer:
    """python -m infer: base against LoRA from the same noise -> RUN/compare"""

    output_dir: str = flag(MISSING, "the run's folder; pictures go to its compare/")
    prompt: tuple[str, ...] = flag(MISSING, "one or more prompts")
    unrelated_prompt: tuple[str, ...] | None = flag(
        None, "prompts without what was trained: a group of their own, where what changes has leaked"
    )
    base_model: str | None = flag(None, "hub id, folder or file; default: the model that the run's cache names")
    model_config: str | None = flag(None, "for a --base_model that is a file, as precompute's")
    prediction_type: str | None = flag(None, "for a --base_model, as precompute's", choices=PREDICTIONS)
    rescale_betas_zero_snr: bool = flag(False, "for a --base_model, as precompute's")
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another VAE; default: the one that the run's cache names, or --base_model's own"
    )
    lora_path: tuple[str, ...] | None = flag(
        None, "LoRA files, or folders of them as a run's is, a row of pictures each; default: RUN/lora.safetensors"
    )
    negative_prompt: str | None = flag(None, "what to steer away from; default: the model's unconditional embedding")
    num_inference_steps: int = flag(25, "sampler steps", at_least=1, at_most=1000)
    guidance_scale: float = flag(5.0, "classifier-free guidance; 1 or less is off", at_least=0)
    lora_scale: tuple[float, ...] | None = flag(
        None, "strengths of a LoRA, a row each; 0 is the base, bit for bit; default: 1"
    )
    vram_gib: float | None = flag(
        None,
        "GPU memory to stay within, GiB, all that CUDA holds counted; where needed the VAE decodes in tiles, then "
        "blocks of the UNet stay in RAM; default: what is free",
        above=0,
    )
    seed: int = flag(42, "a prompt's noise is a function of (seed, prompt)", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class Publish:
    """python -m infer.publish: a run's weights, pictures, report and a model card -> the hub"""

    run: str = flag(MISSING, "the run's folder", positional=True)
    hub_model_id: str | None = flag(MISSING, "the repository on the hub, USER/NAME; NAME alone is your own")
    private: bool = flag(False, "make the repository private; one that is there and public is refused")


COMMANDS = {"data.precompute": Precompute, "train": Train, "train.metrics": Curves}
COMMANDS |= {"infer": Infer, "infer.publish": Publish}


def _is_file(name):
    return name is not None and (name.lower().endswith(".safetensors") or os.path.isfile(name))


USELESS = {  # flags that do nothing next to others: (whether it is so, what to say)
    Precompute: [
        (
            lambda s: s.train_data_dir and s.image_column != "image",
            "--image_column: does nothing next to --train_data_dir, whose pictures are files; leave it out",
        ),
        (
            lambda s: s.revision and os.path.exists(s.pretrained_model_name_or_path),
            "--revision: does nothing where --pretrained_model_name_or_path is a folder or a file; leave it out",
        ),
        (
            lambda s: (
                s.model_config
                and not _is_file(s.pretrained_model_name_or_path)
                and not _is_file(s.pretrained_vae_model_name_or_path)
            ),
            "--model_config: does nothing without a model or a VAE that is one .safetensors file; leave it out",
        ),
        *(
            (
                lambda s, name=name: not s.shuffle_caption and getattr(s, name) != getattr(Precompute, name),
                f"--{name}: does nothing without --shuffle_caption; leave it out, or shuffle",
            )
            for name in ("keep_tokens", "caption_variants", "seed")
        ),
    ],
    Train: [
        (
            lambda s: s.lr_warmup_steps and s.lr_scheduler == "constant",
            "--lr_warmup_steps: does nothing with --lr_scheduler constant; use constant_with_warmup",
        ),
        (
            lambda s: s.lr_num_cycles and s.lr_scheduler != "cosine_with_restarts",
            "--lr_num_cycles: does nothing without --lr_scheduler cosine_with_restarts; leave it out",
        ),
        (
            lambda s: s.vram_gib and s.gradient_checkpointing,
            "--vram_gib: does nothing next to --gradient_checkpointing, which recomputes everything; use one of them",
        ),
        (
            lambda s: s.push_to_hub and not s.hub_model_id,
            "--push_to_hub: where to? name a repository of yours with --hub_model_id USER/NAME",
        ),
        *(
            (
                lambda s, name=name: getattr(s, name) and not s.push_to_hub,
                f"--{name}: does nothing without --push_to_hub; leave it out, or push",
            )
            for name in ("hub_model_id", "private")
        ),
    ],
    Curves: [],
    Infer: [
        *(
            (
                lambda s, name=name: getattr(s, name) and not s.base_model,
                f"--{name}: does nothing without --base_model, because the run's cache says it; leave it out",
            )
            for name in ("model_config", "prediction_type", "rescale_betas_zero_snr")
        ),
        (
            lambda s: s.negative_prompt is not None and s.guidance_scale <= 1,
            "--negative_prompt: does nothing with a --guidance_scale of 1 or less; use a larger one, or leave it out",
        ),
        (
            lambda s: s.lora_scale and len(s.lora_scale) > 1 and 0 in s.lora_scale,
            "--lora_scale 0: does nothing next to others, because the base has a row of its own; leave it out",
        ),
        (
            lambda s: s.unrelated_prompt and set(s.unrelated_prompt) & set(s.prompt),
            "--unrelated_prompt: does nothing new where it is a --prompt as well; leave it out of one of the two",
        ),
    ],
    Publish: [],
}


ENDS = ("max_train_steps", "num_train_epochs")  # two ways to say how long a training is


class _LastCounts(argparse.Action):
    """Of the flags in ENDS the last one given counts, because presets have one of them already; the other is None."""

    def __call__(self, parser, namespace, value, option_string=None):
        for name in ENDS:
            setattr(namespace, name, value if name == self.dest else None)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage first, and the user needs the one line
        raise UserError(f"{message} (see --help)")


def parse(command, argv):
    """argv -> the command's frozen settings. Raises UserError naming a flag that is unknown, missing or wrong."""
    settings = COMMANDS[command]
    parser = _Parser(prog=f"python -m {command}", description=settings.__doc__, allow_abbrev=False)
    for f in fields(settings):
        parser.add_argument(f.name if f.metadata["positional"] else f"--{f.name}", **_argument(f))
    for word in argv:  # before argparse takes such a word for one more prompt
        _refuse_typographic(word)
        _refuse_token(word)
    values, unknown = parser.parse_known_args(argv)
    for word in unknown:
        raise UserError(_unknown(command, word.split("=")[0]))
    for f in fields(settings):
        _check(f, getattr(values, f.name))
    given = settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in vars(values).items()})
    for useless, line in USELESS[settings]:
        if useless(given):
            raise UserError(line)
    return given


def _argument(f):
    default = {} if f.default is MISSING else dict(default=f.default)
    required = f.default is MISSING
    if f.type is bool:
        return dict(action="store_true", help=f.metadata["meaning"])
    if f.metadata["positional"]:
        several = dict(nargs="+") if f.type == tuple[str, ...] else {}
        return dict(metavar=spelled(f), help=f.metadata["meaning"], **several)
    optional = typing.get_args(f.type) if isinstance(f.type, types.UnionType) else (f.type,)
    kind = next(t for t in optional if t is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        default = {name: values if values is None else list(values) for name, values in default.items()}
        several = dict(type=typing.get_args(kind)[0], nargs="+", action="extend", choices=f.metadata["choices"])
        return dict(required=required, help=f.metadata["meaning"], **several, **default)
    shown = "" if f.default in (MISSING, None) else f" (default: {f.default})"
    return dict(
        type=kind,
        required=required,
        choices=f.metadata["choices"],
        action=_LastCounts if f.name in ENDS else "store",
        help=f.metadata["meaning"].replace("%", "%%") + shown,
        **default,
    )


def _refuse_typographic(word):
    name = word.split("=")[0].lstrip(DASHES + "-")
    if set(DASHES) & set(word[: word.index(name)]) and (meant := _nearest(name, _names(*COMMANDS))):
        raise UserError(f"{word}: begins with a typographic dash; write --{meant}")


def _refuse_token(word):
    """Not to be read is the best that can happen to a secret on a command line; it is not repeated either."""
    name = word.split("=")[0]
    if name.replace("-", "_") in ("__hub_token", "__token"):
        raise UserError(
            f"{name}: a token on the command line is seen by others and kept by the shell; set HF_TOKEN, or log in "
            "once with: hf auth login"
        )


def _names(*commands):
    return [f.name for command in commands for f in fields(COMMANDS[command]) if not f.metadata["positional"]]


def _nearest(name, names):
    """The one of `names` that a mistyped `name` probably means, or None."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), names, 1, cutoff=0.7)), None)


KOHYA = {  # what its users type: what is meant here
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "min_snr_gamma": "snr_gamma",
    "max_train_epochs": "num_train_epochs",
    "enable_bucket": "buckets",
    "flip_aug": "random_flip",
    "vae": "pretrained_vae_model_name_or_path",
    "v_parameterization": "prediction_type",
    "zero_terminal_snr": "rescale_betas_zero_snr",
}


def _unknown(command, word):
    word = "hf_…" if word.startswith("hf_") else word  # a token that slipped in is not printed
    name = word.lstrip("-")
    owner = next((other for other in COMMANDS if word in {f"--{name}" for name in _names(other)}), None)
    if owner:
        return f"{word} is a flag of python -m {owner}, not of python -m {command}"
    meant = KOHYA.get(name) or _nearest(name, _names(command)) or _nearest(name, _names(*COMMANDS))
    return f"{word}: no such flag of python -m {command}; {f'did you mean --{meant}?' if meant else 'see --help'}"


def _check(f, value):
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str) and not is_text(word):
            raise UserError(f"{spelled(f)} {ascii(word)}: not UTF-8")
        if word == "" and f.name not in ("prompt", "unrelated_prompt", "negative_prompt", "validation_prompt"):
            # It comes from a shell's variable that is not set, and as a path it would be the folder one is in.
            raise UserError(f"{spelled(f)}: empty")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            _check_number(f, number)


def _check_number(f, value):
    bounds = f.metadata
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{spelled(f)} {value}: must be a finite number")
    if isinstance(value, float) and value and not FP32[0] <= abs(value) <= FP32[1]:
        raise UserError(f"{spelled(f)} {value}: beyond fp32, which reaches from {FP32[0]:.2g} to {FP32[1]:.2g}")
    if bounds["at_least"] is not None and value < bounds["at_least"]:
        raise UserError(f"{spelled(f)} {value}: must be at least {bounds['at_least']}")
    if bounds["at_most"] is not None and value > bounds["at_most"]:
        raise UserError(f"{spelled(f)} {value}: must be at most {bounds['at_most']}")
    if bounds["above"] is not None and value <= bounds["above"]:
        raise UserError(f"{spelled(f)} {value}: must be above {bounds['above']}")
