"""What a run's files tell of how its LoRA was made and what it learned, for report.html and for the model card.

None of it is a place on this machine, which helps nobody else and often tells a name.
"""

import math
import os
import re
import shlex
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from data.cache import read_began
from data.common.fields import read_json
from data.common.flags import Train
from data.common.words import many
from train.curves import flat, is_number, read

# Settings that are places, or that say nothing about what was learned.
NOT_TOLD = {"output_dir", "cache_dir", "network_weights", "restart", "push_to_hub", "hub_model_id", "private"}
# Of a comparison: as it names them, and no file that somebody else put beside them.
PICTURE = re.compile(r"(baseline|finetuned(-[2-9]|-[1-9][0-9]+)?)_(0|[1-9][0-9]*)\.png")
NEEDED = {f"held_out/{name}" for name in ("difference", "base_loss", "train_difference", "pictures")}


@dataclass(frozen=True)
class Training:
    """settings: run.json's identity. lines: those of metrics.jsonl. has_best: is there a lora-best.safetensors?"""

    settings: dict
    lines: list = ()
    has_best: bool = False

    @cached_property
    def held_out(self):
        """[(step, what was measured on held-out pictures)], where all of NEEDED is finite and the bands are whole.

        Standard errors may be None: of one picture there is none.
        """
        lines = [line for line in self.lines if flat(line).keys() >= NEEDED and _whole(line["held_out"].get("bands"))]
        return [(line["step"], line["held_out"]) for line in lines]


def _whole(bands):
    return isinstance(bands, list) and all(
        isinstance(band, dict) and is_number(band.get("from")) and is_number(band.get("to")) for band in bands
    )


def training(run):
    """The Training of a run's folder; None where there was none."""
    began = read_began(run)
    return began and Training(began["identity"], read(run / "metrics.jsonl"), (run / "lora-best.safetensors").exists())


def settings(training):
    """-> ({flag: value} of what differs from its default, {flag: value} of the rest)"""
    changed, default = {}, {}
    for f in fields(Train):
        if f.name in training.settings and f.name not in NOT_TOLD:
            value = training.settings[f.name]
            (default if value == f.default else changed)[f"--{f.name}"] = value
    return changed, default


def in_words(values):
    """{name: value} -> {name: text}, without those that are None."""
    texts = {name: {True: "yes", False: "no"}[v] if isinstance(v, bool) else v for name, v in values.items()}
    return {name: ", ".join(v) if isinstance(v, list) else str(v) for name, v in texts.items() if v is not None}


def train_command(training, name):
    """python -m train with the flags that differ from their defaults, a line each. name: the run's, in runs/ there."""
    changed, _ = settings(training)
    if training.settings.get("num_train_epochs"):
        changed.pop("--max_train_steps", None)  # they were counted from the epochs
    lines = [f"python -m train --output_dir {shlex.quote(f'runs/{name}')}"]
    for flag, value in changed.items():
        words = [] if value is True else value if isinstance(value, list) else [value]
        if value is not None:
            lines.append(shlex.join([flag, *map(str, words)]))
    if training.settings.get("network_weights"):
        lines.append("--network_weights FILE.safetensors")
    return " \\\n  ".join(lines)


def without_places(command, run):
    """The command line with runs/NAME for the run's folder, and for other absolute paths the name at their end."""
    run, words = run.resolve(), []
    for word in shlex.split(command):
        flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if os.path.lexists(value):  # a prompt may begin with a slash too
            path = Path(value).resolve()
            if path.is_relative_to(run):
                value = (Path("runs", run.name) / path.relative_to(run)).as_posix()
            elif Path(value).is_absolute():
                value = path.name
        words.append(f"{flag}{equals}{value}")
    return shlex.join(words)


def lowest(held_out):
    """The (step, measured) of the lowest held-out loss."""
    return min(held_out, key=lambda found: found[1]["difference"])


def verdict(training):
    """What the held-out loss says, in sentences."""
    best_step, best = lowest(training.held_out)
    share = f", {-best['difference'] / best['base_loss']:.1%} of it" if best["base_loss"] else ""
    change = "below" if best["difference"] < 0 else "above"
    yield (
        f"Lowest at step {best_step:,}: on {many(best['pictures'], 'held-out picture')} the loss is "
        f"{abs(best['difference']):.4f}{spread(best)} {change} the base's{share}."
    )
    last_step, last = training.held_out[-1]
    errors = [found.get(name) for found in (last, best) for name in ("standard_error", "train_standard_error")]
    if not all(map(is_number, errors)):
        yield "How far the numbers of one picture alone may be off cannot be told."
    else:
        yield from _against_trained(last_step, last)
        rise = last["difference"] - best["difference"]
        if rise > 2 * math.hypot(last["standard_error"], best["standard_error"]):
            yield f"Since step {best_step:,} the held-out loss has risen by {rise:.4f}: an earlier save is better."
    if training.has_best:
        yield "The save with the lowest held-out loss is lora-best.safetensors."


def spread(found):
    """ " ± 0.0011", or nothing where there is no standard error."""
    error = found.get("standard_error")
    return f" ± {error:.4f}" if is_number(error) else ""


def _against_trained(step, found):
    gap = found["difference"] - found["train_difference"]
    error = math.hypot(found["standard_error"], found["train_standard_error"])
    if gap > 2 * error:
        yield (
            f"At step {step:,} the pictures that were trained on do better than held-out ones by {gap:.4f} ± "
            f"{error:.4f}: that part is remembered, not learned."
        )
    else:
        yield f"At step {step:,} pictures that were trained on do no better than held-out ones."


def scores(folder):
    """scores.json as a table, whatever it measures -> ([column], [[measure, text, …]]); ([], []) where there is none.

    It has columns, {"base": {measure: number}, "lora": …}, and rows, {measure: {"base": number, "lora": number}}.
    """
    columns, rows, path = {}, {}, folder / "scores.json"
    found = read_json(path, "delete it, or make it again") if path.exists() else {}
    for name, value in found.items():
        if not isinstance(value, dict):
            continue
        if {"base", "lora"} <= value.keys():
            rows[name] = value
        elif all(isinstance(inner, dict) for inner in value.values()):
            columns |= {f"{name} {inner}": numbers for inner, numbers in value.items()}
        else:
            columns[name] = value
    measures = dict.fromkeys(measure for numbers in columns.values() for measure in numbers)
    rows = {measure: {name: numbers.get(measure) for name, numbers in columns.items()} for measure in measures} | rows
    return list(columns), [
        [measure.replace("_", " "), *(f"{row[name]:,.3f}" if is_number(row.get(name)) else "" for name in columns)]
        for measure, row in rows.items()
    ]
