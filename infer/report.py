"""RUN/compare/report.html: what a comparison and its training showed, in one file that needs no network.

The page is infer/report.html, a string.Template with these names for its parts:

    $title $summary   the run's name; the base, the LoRA, its trigger word
    $sections         pictures, held-out loss, curves, scores, settings, commands: each where there is something to show
    $note             what was done to the pictures
    $policy           a content policy by which nothing is loaded, and nothing but the page's own script runs

It reads well without JavaScript, which enlarges the pictures, shows a curve's values and copies commands.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from string import Template

from PIL import Image

from data.cache import cache_folder, read_began, read_manifest
from data.common.disk import atomic_write, sha256_file
from data.common.errors import UserError
from data.common.flags import Train
from data.common.words import many
from infer.chart import Curve, chart, means, number, thinned
from infer.markup import join, tag

BOUND = 18 * 2**20  # bytes of the page's pictures; with what base64 adds, the page still fits into an e-mail
AS_IT_IS = 48 * 2**10  # a PNG up to this size goes in as it is
SIDES = (16383, 1024, 768, 512, 384, 256, 128)  # pixels, the longest that WebP has first
HELD_OUT = ("difference", "standard_error", "base_loss", "train_difference", "train_standard_error", "pictures")
PLACES = {"output_dir", "cache_dir", "network_weights", "restart"}  # settings that say nothing to anybody else


def write_report(run):
    """Write RUN/compare/report.html of the report.json, pictures and scores.json that lie beside it. -> its path.

    Of the training that RUN holds it tells only where a LoRA of the report is one of that training's files.
    """
    folder = run / "compare"
    report = json.loads((folder / "report.json").read_bytes())
    if "rows" not in report:
        raise UserError(f"{folder / 'report.json'}: of an earlier version; run python -m infer again")
    training = _training(run, report["rows"])
    pictures, note = _embedded(folder, [name for row in report["rows"] for name in row["pictures"]])
    title = run.resolve().name
    sections = [
        *_grids(report, pictures),
        _held_out(training),
        _curves(training),
        _scores(folder),
        _settings(report, training),
        _commands(report, training, run),
    ]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Template(template).substitute(
        title=join([title]),
        summary=_summary(report, training),
        sections=join(filter(None, sections), "\n"),
        note=note,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
    path = folder / "report.html"
    with atomic_write(path, "w") as file:
        file.write(page)
    return path


# ---- What the training left behind


def _training(run, rows):
    """{"manifest", "settings", "steps", "best"} of the training in `run`; None where no row's LoRA comes from there.

    The manifest is None where the cache was deleted since.
    """
    loras = [(run / Path(row["lora"]["file"]).name, row["lora"]["sha256"]) for row in rows if row["lora"]]
    began = read_began(run)
    if not began or not any(path.is_file() and sha256_file(path) == sha256 for path, sha256 in loras):
        return None
    cache = cache_folder(run)
    return dict(
        manifest=read_manifest(cache) if (cache / "manifest.json").exists() else None,
        settings=began["identity"],
        steps=_steps(run / "metrics.jsonl"),
        best=(run / "lora-best.safetensors").exists(),
    )


def _steps(path):
    """The lines of metrics.jsonl, in the order of their steps. What is no such line, or half of one, is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            step = json.loads(line)
            if type(step["step"]) is int:
                found[step["step"]] = step
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return [found[step] for step in sorted(found)]


def _points(steps, name):
    """[(step, value)] of one of the numbers, where it is one."""
    return [(step["step"], step[name]) for step in steps if _is_number(step.get(name))]


def _measured(steps):
    """[(step, held_out)] of the steps after which the held-out loss was measured, and is finite."""
    found = [(step["step"], step["held_out"]) for step in steps if isinstance(step.get("held_out"), dict)]
    return [(step, held_out) for step, held_out in found if all(_is_number(held_out.get(name)) for name in HELD_OUT)]


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


# ---- Pictures


def _embedded(folder, names):
    """-> ({name: (data URI, width, height of the PNG)}, a sentence on what was done to the pictures).

    All pictures together have at most BOUND bytes; where they would have more, the first of SIDES is taken that fits.
    """
    for side in SIDES:
        found = {name: _embed(folder / name, side) for name in dict.fromkeys(names)}
        if sum(len(uri) for uri, _, _ in found.values()) <= BOUND * 4 // 3:
            break
    note = "The pictures in this page are WebP of quality 90 where the PNG files beside it are large."
    if any(max(size) > side for _, *size in found.values()):
        note = f"The pictures in this page were made smaller, {side} pixels a side, and are WebP of quality 90; "
        note += "the PNG files beside it have their full size."
    elif all(uri.startswith("data:image/png") for uri, _, _ in found.values()):
        note = "The pictures in this page are the PNG files beside it, bit for bit."
    return found, note


def _embed(path, side):
    """-> (data URI of a picture whose longest side is at most `side`, width and height of the file's own)."""
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as picture:
        size = picture.size
        if len(content) > AS_IT_IS or max(size) > side:
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            small, kind = io.BytesIO(), "webp"
            picture.convert("RGB").save(small, "WEBP", quality=90, method=2)
            content = small.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *size


def _grids(report, pictures):
    """The prompts' pictures, and those of the unrelated prompts under a heading of their own."""
    rows, prompts = report["rows"], report["prompts"]
    unrelated = report.get("unrelated_prompts") or []
    columns = max(len(prompts), len(unrelated), min(len(rows), 5))  # many rows: smaller, so that more are in sight
    yield _section("Pictures", _intro(rows), _grid(prompts, 0, rows, pictures, columns))
    if unrelated:
        leaked = "These prompts do not name what was trained: what changes here has leaked."
        changes = [
            f"{row['label']} {number(_mean(row['mean_pixel_change'][len(prompts) :]))} "
            f"(with the concept {number(_mean(row['mean_pixel_change'][: len(prompts)]))})"
            for row in rows
            if row["mean_pixel_change"]
        ]
        if changes:
            leaked += f" Mean change of a pixel against the base, of 255: {'; '.join(changes)}."
        yield _section("Without the concept", leaked, _grid(unrelated, len(prompts), rows, pictures, columns))


def _intro(rows):
    return (
        f"Every prompt from the same noise: {', '.join(row['label'] for row in rows)}. "
        "Choose a picture to see it at full size, and to flip between them in place."
    )


def _grid(prompts, first, rows, pictures, wide):
    """A column for each prompt, with a picture for each row.

    first: the index of the first prompt's pictures. wide: for how many columns the pictures should be small enough.
    """
    columns = []
    for i, prompt in enumerate(prompts, first):
        shots = []
        for row in rows:
            uri, width, height = pictures[row["pictures"][i]]
            about = f"{number(row['mean_pixel_change'][i])} of 255 away from the base" if row["lora"] else ""
            alt = f"{prompt or '(no prompt)'} ({row['label']})"
            image = tag("img", src=uri, alt=alt, width=width, height=height)
            label = tag("bdi", row["label"], class_="label", aria_hidden="true")
            kind = "shot lora" if row["lora"] else "shot"
            link = dict(href=row["pictures"][i], data_label=row["label"], data_about=about)
            shots.append(tag("a", image, label, class_=kind, **link))
        heading = tag("h3", prompt or "(no prompt)", dir="auto")
        columns.append(tag("li", heading, *shots, style=f"grid-row: span {len(rows) + 1}"))
    return tag("ul", *columns, class_="grid", style=f"--columns: {wide}")


# ---- Numbers


def _held_out(training):
    """The loss on held-out pictures against the base's: what it says in words, a curve, and a table."""
    measured = _measured(training["steps"]) if training else []
    if not measured:
        return None
    best_step, best = min(measured, key=lambda found: found[1]["difference"])
    held_out = [(step, found["difference"]) for step, found in measured]
    trained = [(step, found["train_difference"]) for step, found in measured]
    curves = [
        Curve("trained on", trained, "other", tuple(found["train_standard_error"] for _, found in measured)),
        Curve("held out", held_out, "main", tuple(found["standard_error"] for _, found in measured)),
    ]
    bands = [f"{band['from']:,}\N{EN DASH}{band['to']:,}" for band in measured[0][1]["bands"]]
    head = ["step", "held out", "trained on", *(f"t {band}" for band in bands)]
    body = [
        (
            [
                join([f"{step:,}", tag("span", "lowest", class_="badge") if step == best_step else ""]),
                _against(found, "difference", "standard_error"),
                _against(found, "train_difference", "train_standard_error"),
                *(_against(band, "difference", "standard_error") for band in found["bands"]),
            ],
            step == best_step,
        )
        for step, found in measured
    ]
    words = tag("div", *(tag("p", sentence) for sentence in _verdict(measured, best_step, best, training["best"])))
    figure = chart("Loss against the base's", curves, zero=True)
    return _section(
        "Held-out pictures",
        "The LoRA's loss minus the base's, on the same noise: below zero it has learned. ± is the standard error; "
        "t is a band of timesteps, the larger the noisier.",
        tag("div", figure, words, class_="beside"),
        _table(head, body),
    )


def _verdict(measured, best_step, best, has_best):
    """What the held-out numbers say, in sentences."""
    share = f", {-best['difference'] / best['base_loss']:.1%} of it" if best["base_loss"] else ""
    change = "below" if best["difference"] < 0 else "above"
    yield (
        f"Lowest at step {best_step:,}: on {many(best['pictures'], 'held-out picture')} the loss is "
        f"{abs(best['difference']):.4f} ± {best['standard_error']:.4f} {change} the base's{share}."
    )
    last_step, last = measured[-1]
    gap = last["difference"] - last["train_difference"]
    error = math.hypot(last["standard_error"], last["train_standard_error"])
    if gap > 2 * error:
        yield (
            f"At step {last_step:,} the pictures that were trained on do better than held-out ones by {gap:.4f} ± "
            f"{error:.4f}: that part is remembered, not learned."
        )
    else:
        yield f"At step {last_step:,} pictures that were trained on do no better than held-out ones."
    rise = last["difference"] - best["difference"]
    if rise > 2 * math.hypot(last["standard_error"], best["standard_error"]):
        yield f"Since step {best_step:,} the held-out loss has risen by {rise:.4f}: an earlier save is the better one."
    if has_best:
        yield "The save with the lowest held-out loss is lora-best.safetensors."


def _against(found, difference, error):
    if not _is_number(found[difference]) or not _is_number(found[error]):
        return "not finite"
    return join([f"{found[difference]:.4f}".replace("-", "\N{MINUS SIGN}"), tag("small", f" ± {found[error]:.4f}")])


def _curves(training):
    steps = training["steps"] if training else []
    charts = []
    if loss := _points(steps, "loss"):
        count = max(1, len(loss) // 25)
        smooth = Curve(f"mean of {count}", thinned(means(loss, count)))
        charts.append(chart("Loss", [Curve("each step", thinned(loss), "faint"), smooth]))
    if rate := _points(steps, "lr"):
        charts.append(chart("Learning rate", [Curve("learning rate", thinned(rate))], zero=True))
    scale = _points(steps, "loss_scale")
    if len({y for _, y in scale}) > 1:
        charts.append(chart("Loss scale", [Curve("loss scale", thinned(scale))], zero=True))
    return _section("Training", None, tag("div", *charts, class_="charts")) if charts else None


def _scores(folder):
    """scores.json, whatever it measures: {"base": {measure: number}, "lora": …}, and {measure: {"base": number, …}}."""
    if not (folder / "scores.json").exists():
        return None
    columns, rows = {}, {}  # {column: {measure: number}}, and {measure: {column: number}}
    for name, value in json.loads((folder / "scores.json").read_bytes()).items():
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
    shown = lambda value: f"{value:,.3f}".replace("-", "\N{MINUS SIGN}") if _is_number(value) else ""  # noqa: E731
    body = [
        ([measure.replace("_", " "), *(shown(values.get(name)) for name in columns)], False)
        for measure, values in rows.items()
    ]
    return _section("Scores", None, _table(["", *columns], body)) if columns else None


# ---- Settings


def _summary(report, training):
    """The base, the LoRA, its trigger word and its pictures, as a list of name and value."""
    rows = [row for row in report["rows"] if row["lora"]]
    facts = {"Base": report["base"]}
    if rows:
        lora = rows[0]["lora"]
        facts["LoRA"] = f"rank {lora['rank']}, alpha {lora['alpha']:g}"
        if steps := list(dict.fromkeys(f"{row['lora']['step']:,}" for row in rows if row["lora"].get("step"))):
            facts["Step" if len(steps) == 1 else "Steps"] = ", ".join(steps)
        facts["Strength"] = ", ".join(dict.fromkeys(f"{row['scale']:g}" for row in rows))
    if training and training["manifest"]:
        manifest = training["manifest"]
        if manifest["instance_prompt"]:
            facts["Trigger word"] = manifest["instance_prompt"]
        held_out = f", {manifest['held_out']:,} held out" if manifest["held_out"] else ""
        facts["Trained on"] = many(manifest["rows"] - manifest["held_out"], "picture") + held_out
    return tag("dl", *(_fact(*fact) for fact in facts.items()), class_="facts")


def _fact(name, value):
    return tag("div", tag("dt", name), tag("dd", tag("bdi", value)))


def _settings(report, training):
    height, width = report["resolution"]
    sampler = {
        "size": f"{width} × {height}",
        "--num_inference_steps": report["num_inference_steps"],
        "--guidance_scale": report["guidance_scale"],
        "--seed": report["seed"],
        "--negative_prompt": report["negative_prompt"],
    }
    sampler["seconds a picture"] = number(report["median_s_per_picture"])
    sampler["peak of GPU memory"] = f"{report['peak_gib']:.1f} GiB" if report["peak_gib"] else None
    parts = [tag("div", tag("h3", "Sampler"), _facts(sampler))]
    if training:
        changed, default = {}, {}
        for f in fields(Train):
            if f.name not in PLACES and f.name in training["settings"]:
                value = training["settings"][f.name]
                (default if value == f.default else changed)[f"--{f.name}"] = value
        more = tag("details", tag("summary", f"{len(default)} more, as they are by default"), _facts(default))
        parts.insert(0, tag("div", tag("h3", "Training"), _facts(changed), more))
    return _section("Settings", None, tag("div", *parts, class_="settings"))


def _facts(values):
    shown = {True: "yes", False: "no"}
    facts = {name: shown[v] if isinstance(v, bool) else v for name, v in values.items() if v is not None}
    facts = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in facts.items()}
    return tag("dl", *(_fact(name, value) for name, value in facts.items()))


def _commands(report, training, run):
    commands = {}
    if training:
        commands["Train"] = _train_command(training["settings"], run.resolve().name)
    if report.get("command"):
        commands["Draw these pictures"] = without_places(report["command"], run)
    boxes = [
        tag(
            "div",
            tag("h3", name),
            tag("button", "Copy", type="button", class_="copy", hidden=True),
            tag("pre", tag("code", command)),
            class_="command",
        )
        for name, command in commands.items()
    ]
    return _section("Commands", None, *boxes) if boxes else None


def without_places(command, run):
    """The command line with runs/NAME for the run's folder, and for other absolute paths the name at their end.

    Where something lies on this machine helps nobody else, and often tells a name.
    """
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


def _train_command(settings, title):
    """python -m train with the flags that differ from their defaults, a line each. The run lies in runs/ there."""
    lines = [f"python -m train --output_dir {shlex.quote(f'runs/{title}')}"]
    for f in fields(Train):
        value = settings.get(f.name, f.default)
        if f.name in PLACES or value == f.default or f.default is MISSING or value is None:
            continue
        if f.name == "max_train_steps" and settings.get("num_train_epochs"):
            continue  # they were counted from the epochs
        words = [] if value is True else value if isinstance(value, list) else [value]
        lines.append(" ".join([f"--{f.name}", *(shlex.quote(str(word)) for word in words)]))
    if settings.get("network_weights"):
        lines.append("--network_weights FILE.safetensors")
    return " \\\n  ".join(lines)


# ---- Shapes of HTML


def _section(heading, intro, *content):
    """A heading, a sentence below it where there is one, and the content."""
    return tag("section", tag("h2", heading), tag("p", intro, class_="intro") if intro else "", *content)


def _table(head, body):
    """body: [(cells, whether the row stands out)]; the first cell of each names the row."""
    rows = [
        tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:]), class_=best and "best")
        for cells, best in body
    ]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    return tag("div", tag("table", head, tag("tbody", *rows)), class_="wide", tabindex=0)


def _mean(values):
    return sum(values) / len(values)
