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
import re
from pathlib import Path
from statistics import fmean
from string import Template

from PIL import Image

from data.cache import cache_folder, read_manifest
from data.common.disk import atomic_write, sha256_file
from data.common.errors import UserError
from data.common.words import many
from infer import told
from infer.chart import chart, minus
from infer.markup import join, tag
from train.curves import is_number, panels, series, steps_axis, words

BOUND = 18 * 2**20  # bytes of the page's pictures; with what base64 adds, the page still fits into an e-mail
AS_IT_IS = 48 * 2**10  # a PNG up to this size goes in as it is
SIDES = (16383, 1024, 768, 512, 384, 256, 128)  # pixels, the longest that WebP has first


def write_report(run):
    """Write RUN/compare/report.html of the report.json, pictures and scores.json that lie beside it. -> its path.

    Of the training that RUN holds it tells only where a LoRA of the report is one of that training's files.
    """
    folder = run / "compare"
    report = json.loads((folder / "report.json").read_bytes())
    if "rows" not in report:
        raise UserError(f"{folder / 'report.json'}: of an earlier version; run python -m infer again")
    training = told.training(run) if _is_of(run, report["rows"]) else None
    pictures, note = _embedded(folder, [name for row in report["rows"] for name in row["pictures"]])
    title = run.resolve().name
    sections = [
        *_grids(report, pictures),
        _held_out(training),
        _curves(training),
        _scores(folder),
        _settings(report, training),
        _commands(report, training, title),
    ]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Template(template).substitute(
        title=join([title]),
        summary=_summary(report, training and _manifest(run)),
        sections=join(filter(None, sections), "\n"),
        note=note,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
    path = folder / "report.html"
    with atomic_write(path, "w") as file:
        file.write(page)
    return path


def _is_of(run, rows):
    """Whether one of the rows' LoRAs is a file of the training in `run`."""
    loras = [(run / Path(row["lora"]["file"]).name, row["lora"]["sha256"]) for row in rows if row["lora"]]
    return any(path.is_file() and sha256_file(path) == sha256 for path, sha256 in loras)


def _manifest(run):
    """The manifest of the run's cache; None where it was deleted since."""
    cache = cache_folder(run)
    return read_manifest(cache) if (cache / "manifest.json").exists() else None


# ---- Pictures


def _embedded(folder, names):
    """-> ({name: (data URI, width, height of the PNG)}, a sentence on what was done to the pictures).

    All pictures together have at most BOUND bytes; where they would have more, the first of SIDES is taken that fits.
    """
    for side in SIDES:
        found = {name: _embed(folder / name, side) for name in dict.fromkeys(names)}
        if sum(len(uri) for uri, _, _ in found.values()) <= BOUND * 4 // 3:
            break
    note = "WebP of quality 90 where the PNG files beside it are large"
    if any(max(size) > side for _, *size in found.values()):
        note = f"WebP of quality 90, made smaller, {side} pixels a side; the PNG files beside it have their full size"
    elif all(uri.startswith("data:image/png") for uri, _, _ in found.values()):
        note = "the PNG files beside it, bit for bit"
    return found, f"The pictures in this page are {note}."


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
    intro = (
        f"Every prompt from the same noise: {', '.join(row['label'] for row in rows)}. "
        "Choose a picture to see it at full size, and to flip between them in place."
    )
    yield _section("Pictures", intro, _grid(prompts, 0, rows, pictures, columns))
    if unrelated:
        leaked = "These prompts do not name what was trained: what changes here has leaked."
        changes = [
            f"{row['label']} {words(fmean(row['mean_pixel_change'][len(prompts) :]))} "
            f"(with the concept {words(fmean(row['mean_pixel_change'][: len(prompts)]))})"
            for row in rows
            if row["mean_pixel_change"]
        ]
        if changes:
            leaked += f" Mean change of a pixel against the base, of 255: {'; '.join(changes)}."
        yield _section("Without the concept", leaked, _grid(unrelated, len(prompts), rows, pictures, columns))


def _grid(prompts, first, rows, pictures, wide):
    """A column for each prompt, with a picture for each row.

    first: the index of the first prompt's pictures. wide: for how many columns the pictures should be small enough.
    """
    columns = []
    for i, prompt in enumerate(prompts, first):
        shots = []
        for row in rows:
            uri, width, height = pictures[row["pictures"][i]]
            about = f"{words(row['mean_pixel_change'][i])} of 255 away from the base" if row["lora"] else ""
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
    if not training or not training.held_out:
        return None
    best_step, _ = told.lowest(training.held_out)
    bands = [f"{band['from']:,}\N{EN DASH}{band['to']:,}" for band in training.held_out[0][1]["bands"]]
    head = ["step", "held out", "trained on", *(f"t {band}" for band in bands)]
    body = [
        (
            [
                join([f"{step:,}", tag("span", "lowest", class_="badge") if step == best_step else ""]),
                _against(found["difference"], found.get("standard_error")),
                _against(found["train_difference"], found.get("train_standard_error")),
                *(_against(band.get("difference"), band.get("standard_error")) for band in found["bands"]),
            ],
            step == best_step,
        )
        for step, found in training.held_out
    ]
    figure = _charts([dict(step=step, held_out=found) for step, found in training.held_out])
    said = tag("div", *(tag("p", sentence) for sentence in told.verdict(training)))
    return _section(
        "Held-out pictures",
        "The LoRA's loss minus the base's, on the same noise: below zero it has learned. ± is the standard error; "
        "t is a band of timesteps, the larger the noisier.",
        tag("div", *figure, said, class_="beside"),
        _table(head, body),
    )


def _charts(lines):
    """A figure of each panel that lines of metrics.jsonl have."""
    found = [series(lines)]
    return [chart(panel, steps_axis(found)) for panel in panels(found)]


def _against(difference, error):
    if not is_number(difference):
        return "not finite"
    return join([minus(f"{difference:.4f}"), tag("small", f" ± {error:.4f}") if is_number(error) else ""])


def _curves(training):
    charts = _charts([line | dict(held_out=None) for line in training.lines]) if training else []
    return _section("Training", None, tag("div", *charts, class_="charts")) if charts else None


def _scores(folder):
    columns, rows = told.scores(folder)
    body = [([measure, *map(minus, texts)], False) for measure, *texts in rows]
    return _section("Scores", None, _table(["", *columns], body)) if columns else None


# ---- Settings


def _summary(report, manifest):
    """The base, the LoRA, its trigger word and its pictures, as a list of name and value."""
    rows = [row for row in report["rows"] if row["lora"]]
    facts = {"Base": report["base"]}
    if rows:
        kinds = dict.fromkeys(f"rank {row['lora']['rank']}, alpha {row['lora']['alpha']:g}" for row in rows)
        facts["LoRA"] = "; ".join(kinds)
        if steps := list(dict.fromkeys(f"{row['lora']['step']:,}" for row in rows if row["lora"].get("step"))):
            facts["Step" if len(steps) == 1 else "Steps"] = ", ".join(steps)
        facts["Strength"] = ", ".join(dict.fromkeys(f"{row['scale']:g}" for row in rows))
    if manifest:
        if manifest["instance_prompt"]:
            facts["Trigger word"] = manifest["instance_prompt"]
        held_out = f", {manifest['held_out']:,} held out" if manifest["held_out"] else ""
        facts["Trained on"] = many(manifest["rows"] - manifest["held_out"], "picture") + held_out
    return _facts(facts, class_="facts")


def _facts(values, class_=None):
    facts = told.in_words(values).items()
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", tag("bdi", text))) for name, text in facts), class_=class_)


def _settings(report, training):
    height, width = report["resolution"]
    sampler = {
        "size": f"{width} × {height}",
        "--num_inference_steps": report["num_inference_steps"],
        "--guidance_scale": report["guidance_scale"],
        "--seed": report["seed"],
        "--negative_prompt": report["negative_prompt"],
    }
    sampler["seconds a picture"] = words(report["median_s_per_picture"])
    sampler["peak of GPU memory"] = f"{report['peak_gib']:.1f} GiB" if report["peak_gib"] else None
    parts = [tag("div", tag("h3", "Sampler"), _facts(sampler))]
    if training:
        changed, default = map(told.in_words, told.settings(training))
        more = tag("details", tag("summary", f"{len(default)} more, as they are by default"), _facts(default))
        parts.insert(0, tag("div", tag("h3", "Training"), _facts(changed), more))
    return _section("Settings", None, tag("div", *parts, class_="settings"))


def _commands(report, training, name):
    commands = {"Train": training and told.train_command(training, name), "Draw these pictures": report.get("command")}
    boxes = [
        tag(
            "div",
            tag("h3", name),
            tag("button", "Copy", type="button", class_="copy", hidden=True),
            tag("pre", tag("code", command)),
            class_="command",
        )
        for name, command in commands.items()
        if command
    ]
    return _section("Commands", None, *boxes) if boxes else None


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
