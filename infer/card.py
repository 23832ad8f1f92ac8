"""The model card of a published run: what it is, how to use it, how it was made. Text from facts, without a network.

https://huggingface.co/docs/hub/model-cards says what the fields at its head mean; `template:sd-lora` shows the pictures
of `widget` as a gallery.
"""

import re
import shlex
from dataclasses import dataclass, fields

from data.common.errors import one_line
from data.common.flags import Infer, Train
from data.common.words import many
from lora.contents import Contents

TAGS = [
    "text-to-image",
    "diffusers",
    "lora",
    "template:sd-lora",
    "stable-diffusion-xl",
    "stable-diffusion-xl-diffusers",
]
LICENSES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++"
}  # a LoRA is bound to its base's; others: not known
# Settings that say nothing about what was learned.
NOT_SHOWN = {"restart", "push_to_hub", "private", "num_train_epochs", "checkpointing_steps", "validation_steps"}
NOT_SHOWN |= {"vram_gib", "gradient_checkpointing", "no_cuda_graph"}


@dataclass(frozen=True)
class Facts:
    """What a card is made of. Nothing in it is a place on this machine."""

    repository: str  # USER/NAME
    weights: Contents  # of lora.safetensors
    files: tuple  # paths in the repository
    step: int | None = None  # after which the weights were saved
    gallery: tuple = ()  # (prompt, path in the repository) of pictures that lora.safetensors made
    identity: dict | None = None  # of RUN/run.json: the settings, and "base"
    held_out: tuple = ()  # (step, what metrics.jsonl says of the held-out loss), in order
    report: dict | None = None  # compare/report.json
    scores: dict | None = None  # compare/scores.json

    @property
    def base(self):
        """The base's hub id; None where it is a folder or a file of somebody's machine."""
        base = str((self.identity or {}).get("base"))
        return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base, re.ASCII) else None

    @property
    def trigger(self):
        return on_one_line(self.weights.metadata.get("modelspec.trigger_phrase") or "") or None

    @property
    def settings(self):
        """{name: value} of the training's settings: numbers, switches, and words that a flag offers. A free text may be
        a path of this machine or somebody's caption."""
        found = {}
        for f in fields(Train):
            value = (self.identity or {}).get(f.name, f.default)
            if isinstance(value, str) and value not in (f.metadata["choices"] or ()):
                continue
            if f.name not in NOT_SHOWN and isinstance(value, (bool, int, float, str)):
                found[f.name] = value
        return found


def card(facts):
    """-> the text of README.md"""
    parts = [f"---\n{_head(facts)}\n---", f"# {facts.repository.split('/')[1]}", "<Gallery />", _what_it_is(facts)]
    parts += [_pictures(facts), _trigger(facts), _use(facts), _made(facts), _held_out(facts), _scores(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(facts):
    from huggingface_hub import ModelCardData

    widget = [{"text": on_one_line(prompt) or "-", "output": {"url": path}} for prompt, path in facts.gallery]
    return ModelCardData(
        base_model=facts.base,
        library_name="diffusers",
        license=LICENSES.get(facts.base),
        tags=TAGS,
        instance_prompt=facts.trigger,
        widget=widget or None,
    ).to_yaml()


def _what_it_is(facts):
    weights, steps = facts.weights, facts.step
    base = (
        f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "an SDXL model that is not on the hub"
    )
    trained = f", trained for {many(steps, 'step')} with barelora" if steps else ""
    words = f"A LoRA of rank {weights.rank}, alpha {weights.alpha:g}, for {base}{trained}."
    if weights.prediction_type == "v_prediction":
        words += " Its base predicts v; it does not work on one that predicts noise."
    return words


def _pictures(facts):
    if "compare/grid.png" in facts.files:
        more = ", and more of it in `compare/report.html`" if "compare/report.html" in facts.files else ""
        return f"![base above, LoRA below](compare/grid.png)\n\nThe base above, the LoRA below, the same noise{more}."
    samples = [path for path in facts.files if path.startswith("samples/")]
    return "\n".join(f"![drawn at the end of the training]({path})" for path in samples)


def _trigger(facts):
    return facts.trigger and f"## Trigger word\n\nWrite {_code(facts.trigger)} in the prompt."


def _use(facts):
    user, name = facts.repository.split("/")
    prompt = one_line(facts.gallery[0][0] if facts.gallery else "a picture", 200)
    if facts.trigger and facts.trigger not in prompt:
        prompt = f"{one_line(facts.trigger, 200)}, {prompt}"
    base = facts.base or "THE BASE MODEL"
    code = (
        "import torch\n"
        "from diffusers import StableDiffusionXLPipeline  # pip install diffusers transformers accelerate peft\n\n"
        f'pipe = StableDiffusionXLPipeline.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")\n'
        f'pipe.load_lora_weights("{facts.repository}", weight_name="lora.safetensors")\n'
        f'pipe({prompt!r}, cross_attention_kwargs={{"scale": 1.0}}).images[0].save("picture.png")'
    )
    download = f"https://huggingface.co/{facts.repository}/resolve/main/lora.safetensors"
    best = "lora-best.safetensors" in facts.files
    return f"""## How to use it

With diffusers:

{_fenced(code, "python")}

Elsewhere: download [lora.safetensors]({download}), name it `{name}.safetensors` and put it

- for ComfyUI into `models/loras`; the node *Load LoRA* goes between the checkpoint and the sampler;
- for A1111 and Forge into `models/Lora`; write `<lora:{name}:1>` in the prompt.

The number is its strength: 0 is the base, 1 as it was trained, between them a weaker effect, and above 1 a stronger one
until pictures break. Where it takes over too much of the picture, 0.6 to 0.8 is the usual remedy.{
        " `lora-best.safetensors` is the save with the lowest held-out loss." if best else ""
    }"""


def _made(facts):
    """The commands, with RUN, PICTURES and BASE for what are places on somebody's machine, and the settings."""
    if not facts.identity:
        return None
    declared = {f.name: f.default for f in fields(Train)}
    flags = {name: value for name, value in facts.settings.items() if value != declared[name]}
    commands = [_precompute(facts), f"python -m train --output_dir RUN{_words(flags)}"]
    if facts.identity.get("network_weights"):
        commands[-1] += " --network_weights LORA"
    commands += [_infer(facts.report)] if facts.report else []
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.settings.items())
    return (
        f"## How it was made\n\n{_fenced(chr(10).join(commands))}\n\n"
        f"PICTURES stands for the training's pictures and captions, which are not here.\n\n"
        f"| setting | value |\n|---|---|\n{rows}"
    )


def _precompute(facts):
    flags = dict(pretrained_model_name_or_path=facts.base or "BASE", train_data_dir="PICTURES")
    resolution = re.fullmatch(r"(\d+)x\1", facts.weights.metadata.get("modelspec.resolution", ""))
    flags |= dict(resolution=resolution[1]) if resolution else {}
    flags |= dict(instance_prompt=one_line(facts.trigger)) if facts.trigger else {}
    return f"python -m data.precompute --output_dir RUN{_words(flags)}"


def _infer(report):
    declared = {f.name: f.default for f in fields(Infer)}
    plain = {name: value for name, value in report.items() if isinstance(value, (int, float, str))}
    flags = {name: value for name, value in plain.items() if name in declared and value != declared[name]}
    prompts = "".join(
        f" --{flag} {' '.join(map(shlex.quote, report[name]))}"
        for flag, name in (("prompt", "prompts"), ("unrelated_prompt", "unrelated_prompts"))
        if report.get(name)
    )
    return f"python -m infer --output_dir RUN{prompts}{_words(flags)}"


def _words(flags):
    """{name: value} as it is typed, with a space in front."""
    words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return "".join(f" {word}" for word in words)


def _held_out(facts):
    if not facts.held_out:
        return None
    best = min(facts.held_out, key=lambda measured: measured[1]["difference"])
    rows = {"best": best, "last": facts.held_out[-1]}
    lines = [
        f"| {name} | {step:,} | {found['difference']:+.4f} ± {found['standard_error']:.4f} |"
        for name, (step, found) in rows.items()
    ]
    pictures = many(facts.held_out[-1][1]["pictures"], "picture")
    return (
        "## On pictures that it was not trained on\n\n"
        f"The loss with the LoRA minus the loss of the base, on {pictures} and the same noise, with its standard "
        "error. Below 0 is better than the base.\n\n"
        "| save | step | difference |\n|---|---|---|\n" + "\n".join(lines)
    )


def _scores(facts):
    """A table of the scores that the base and the LoRA both have."""
    base, tuned = ((facts.scores or {}).get(name) for name in ("base", "lora"))
    if not isinstance(base, dict) or not isinstance(tuned, dict):
        return None
    names = [name for name in tuned if all(isinstance(some.get(name), (int, float)) for some in (base, tuned))]
    cells = [[name.replace("|", " "), f"{base[name]:.2f}", f"{tuned[name]:.2f}"] for name in names]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"## Scores\n\n| | base | LoRA |\n|---|---|---|\n{lines}" if cells else None


def on_one_line(text):
    """As CLIP reads it. PyYAML does not read back some of the characters that end a line."""
    return " ".join(text.split())


def _fenced(text, language=""):
    """A block of code that no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text):
    """The text as code within a line."""
    text = one_line(text, 200)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
