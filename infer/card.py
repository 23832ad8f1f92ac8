"""The model card of a published run: what it is, how to use it, how it was made. Text from facts, without a network.

https://huggingface.co/docs/hub/model-cards says what the fields at its head mean; `template:sd-lora` shows the pictures
of `widget` as a gallery.
"""

import re
import shlex
from dataclasses import dataclass

from data.common.errors import one_line
from data.common.words import many
from infer import told
from lora.contents import Contents

TAGS = ["text-to-image", "diffusers", "lora", "template:sd-lora"]
TAGS += ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
# A LoRA is bound to its base's; others are not known here.
LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}


@dataclass(frozen=True)
class Facts:
    """What a card is made of. Nothing in it is a place on this machine."""

    repository: str  # USER/NAME
    run: str  # the name of the run's folder
    weights: Contents  # of lora.safetensors
    files: tuple  # paths in the repository
    step: int | None = None  # after which the weights were saved
    gallery: tuple = ()  # (prompt, path in the repository) of pictures that lora.safetensors made
    training: told.Training | None = None  # whose weights they are
    command: str | None = None  # that drew the pictures
    scores: tuple = ((), ())  # a table, as told.scores gives it

    @property
    def base(self):
        """The base's hub id; None where it is a folder or a file of somebody's machine."""
        base = str(self.training and self.training.settings.get("base"))
        return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base, re.ASCII) else None

    @property
    def trigger(self):
        return on_one_line(self.weights.metadata.get("modelspec.trigger_phrase") or "") or None


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
    return f"""## How to use it

With diffusers:

{_fenced(code, "python")}

Elsewhere: download [lora.safetensors]({download}), name it `{name}.safetensors` and put it

- for ComfyUI into `models/loras`; the node *Load LoRA* goes between the checkpoint and the sampler;
- for A1111 and Forge into `models/Lora`; write `<lora:{name}:1>` in the prompt.

The number is its strength: 0 is the base, 1 as it was trained, between them a weaker effect, and above 1 a stronger one
until pictures break. Where it takes over too much of the picture, 0.6 to 0.8 is the usual remedy."""


def _made(facts):
    """The commands, with PICTURES and BASE for what is on somebody's machine, and the settings."""
    if not facts.training:
        return None
    commands = [_precompute(facts), told.train_command(facts.training, facts.run), facts.command or ""]
    changed, default = map(told.in_words, told.settings(facts.training))
    return (
        f"## How it was made\n\n{_fenced(chr(10).join(commands).rstrip())}\n\n"
        "PICTURES stands for the training's pictures and captions, which are not here.\n\n"
        f"{_table(('setting', 'value'), (changed | default).items())}"
    )


def _precompute(facts):
    words = ["--output_dir", f"runs/{facts.run}", "--pretrained_model_name_or_path", facts.base or "BASE"]
    words += ["--train_data_dir", "PICTURES"]
    resolution = re.fullmatch(r"(\d+)x\1", facts.weights.metadata.get("modelspec.resolution", ""))
    words += ["--resolution", resolution[1]] if resolution else []
    words += ["--instance_prompt", one_line(facts.trigger)] if facts.trigger else []
    return shlex.join(["python", "-m", "data.precompute", *words])


def _held_out(facts):
    if not facts.training or not facts.training.held_out:
        return None
    return f"## On pictures that it was not trained on\n\n{' '.join(told.verdict(facts.training))}"


def _scores(facts):
    columns, rows = facts.scores
    return f"## Scores\n\n{_table(['', *columns], rows)}" if columns else None


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(one_line(cell).replace('|', ' ') for cell in line)} |" for line in lines)


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
