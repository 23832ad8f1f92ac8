"""report.html: what it shows is what the run holds, whatever the run's texts are, and what a browser makes of it."""

import base64
import io
import json
import random
import re
import shlex
import shutil
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, browser
from conftest import PIPELINE, PROMPTS, TOKEN, change_cache, settings
from PIL import Image

from data.common import flags
from data.common.disk import sha256_file
from data.common.errors import UserError
from infer import report
from infer.chart import HEIGHT, WIDTH, chart
from infer.markup import Html, join, tag
from infer.report import write_report
from infer.told import NOT_TOLD, Training, train_command, without_places
from train.curves import Axis, Curve, Panel

HOSTILE = (
    "<script>document.title = 'run'; window.ran = 1</script>",
    "\"><img src=x onerror='window.ran = 2'>' onmouseover=window.ran=3 x='",
    "</title></style></script><svg onload=window.ran=4>&amp;&lt;",
    "a cat\nin three\n\nlines \u202eesrever dna\u2066 שלום, مرحبا, 猫, 🦊 $title ${title} %s {0}",
    "no spaces " + "Donaudampfschifffahrt" * 15,
    "<!-- --> ]]> \x00\x1b[31m\x7f \ud800",
    "",
)


class Page(HTMLParser):
    """What a file of HTML holds: its elements with their attributes, and the texts in them."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img", "input"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def all(self, name, **attributes):
        return [a for n, a in self.elements if n == name and attributes.items() <= a.items()]

    def text(self):
        return "".join(text for name, text in self.texts if name not in ("style", "script"))


def colour(row, prompt):
    return (40 * row + 15, 20 * prompt + 5, 200)


def compared(
    run, prompts=("a fox", "a cat"), unrelated=(), labels=("base", "LoRA"), size=(16, 16), lora=None, draw=None, **more
):
    """Write RUN/compare as python -m infer does, each picture in a colour of its own. -> the page's path.

    lora: {"file", "sha256"} of the LoRA rows. draw(row, prompt) -> a picture.
    """
    folder = run / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    draw = draw or (lambda row, i: Image.new("RGB", size, colour(row, i)))
    lora = dict(file="x.safetensors", step=None, sha256="0" * 64, rank=4, alpha=6.0) | (lora or {})
    rows, count = [], len(prompts) + len(unrelated)
    for r, label in enumerate(labels):
        start = ["baseline", "finetuned"][r] if r < 2 else f"finetuned-{r}"
        names = [f"{start}_{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            draw(r, i).save(folder / name)
        changes = [10.0 * r + i for i in range(count)] if r else None
        rows.append(
            dict(label=label, lora=lora if r else None, scale=float(r > 0), pictures=names, mean_pixel_change=changes)
        )
    facts = dict(prompts=prompts, unrelated_prompts=unrelated, negative_prompt=None, base="some/base", seed=42)
    facts |= dict(num_inference_steps=2, guidance_scale=5.0, resolution=size, rows=rows)
    facts |= dict(command="python -m infer --prompt 'a fox'", median_s_per_picture=1.5, peak_gib=None)
    (folder / "report.json").write_text(json.dumps(facts | more))
    return write_report(run)


def measured(held_out, trained, error=0.001, **more):
    """A held-out measurement as a line of metrics.jsonl has it."""
    bands = [
        {"from": a, "to": a + 250, "difference": held_out * a / 500, "standard_error": error}
        for a in (0, 250, 500, 750)
    ]
    found = dict(difference=held_out, standard_error=error, loss=0.1 + held_out, base_loss=0.1, bands=bands)
    return found | dict(train_difference=trained, train_standard_error=error, pictures=24, seconds=3.1) | more


@pytest.fixture
def trained(cached, tmp_path):
    """A function that makes a run's folder that was trained, as far as a report looks: trained(lines, flags) -> run."""

    def make(lines=(), name="run", **given):
        run = tmp_path / name
        shutil.copytree(cached / "cache", run / "cache")
        (run / "lora.safetensors").write_bytes(b"weights")
        identity = asdict(settings("train", output_dir=str(run), **given)) | dict(cache="c" * 64, unet="u" * 16)
        (run / "run.json").write_text(json.dumps(dict(cache_dir=None, identity=identity)))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def its_own(run):
    return dict(file="lora.safetensors", sha256=sha256_file(run / "lora.safetensors"))


# ---- Texts


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_comes_out_of_html_as_it_went_in(text, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(tag("p", text, title=text, lang=Html(text)), encoding="utf-8")
    (_, attributes), *others = Page(path).elements
    read = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\ud800", "?"))
    assert not others and Page(path).text() == attributes["title"] == attributes["lang"] == read
    assert join([text, Html("<b>")], "<") == tag("p", text)[3:-4] + "&lt;<b>"


def test_hostile_texts_change_nothing_but_the_texts(trained):
    """Prompts, labels, a run's name and its trigger word: the page has the elements that it has with tame ones."""

    def page(name, prompts, label, word):
        run = trained([dict(step=1, loss=1.0, lr=1.0)], name)
        change_cache(run, instance_prompt=word)
        texts = dict(base=word, negative_prompt=word, command=word)
        return Page(compared(run, prompts[:4], prompts[4:], ("base", label), lora=its_own(run), **texts))

    tame = page("tame", ["a cat"] * len(HOSTILE), "LoRA", "fox")
    name = HOSTILE[1].replace("/", "")[:200]
    wild = page(name, list(HOSTILE), HOSTILE[0], HOSTILE[2])
    assert [element for element, _ in wild.elements] == [element for element, _ in tame.elements]
    assert [list(attributes) for _, attributes in wild.elements] == [
        list(attributes) for _, attributes in tame.elements
    ]
    assert not [key for _, attributes in wild.elements for key in attributes if key.startswith("on")]
    assert {a["src"][:11] for a in wild.all("img") if "src" in a} == {"data:image/"}
    assert all(a.get("href") is None or re.fullmatch(r"[a-z]+_\d+\.png", a["href"]) for a in wild.all("a"))
    for text in (*HOSTILE[:5], name):
        assert text in wild.text()


def test_a_page_names_no_place_of_this_machine_and_nothing_outside_it(run):
    """The run of the real commands, with a token in their environment."""
    text = (run.folder / "compare" / "report.html").read_text()
    for told in (text, (run.folder / "compare" / "report.json").read_text()):
        assert TOKEN not in told and str(run.folder.parent) not in told and str(PIPELINE.parent) not in told
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'"(data:image|\[\[)[^"]*"', "", text.split("<script>")[0]))
    page = Page(run.folder / "compare" / "report.html")
    assert all(prompt in page.text() for prompt in PROMPTS)
    assert "--lora_alpha6" in page.text() and "8 pictures" in page.text() and "rank 4, alpha 6" in page.text()
    assert "Learning rate" in page.text() and "everything on one page" in run.infer


# ---- Pictures


def shown(attributes):
    """The picture in an <img>."""
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1]))).convert("RGB")


def test_every_picture_is_at_its_place_and_described(tmp_path):
    """Columns are prompts, rows are as the report has them; the unrelated prompts come in a group of their own."""
    labels = ("base", "step 100", "step 200")
    page = Page(compared(tmp_path / "r", ("a fox", "a cat"), ("a house",), labels))
    pictures = [a for a in page.all("img") if "src" in a]
    wanted = [(row, i, prompt) for i, prompt in enumerate(("a fox", "a cat", "a house")) for row in range(3)]
    assert [p["alt"] for p in pictures] == [f"{prompt} ({labels[row]})" for row, _, prompt in wanted]
    assert [shown(p).getpixel((8, 8)) for p in pictures] == [colour(row, i) for row, i, _ in wanted]
    assert [a["class"] for a in page.all("a") if "class" in a] == ["shot", "shot lora", "shot lora"] * 3
    assert page.text().index("a cat") < page.text().index("has leaked") < page.text().index("a house")
    assert "step 100 12 (with the concept 10.5); step 200 22 (with the concept 20.5)" in page.text()
    assert "Without the concept" not in Page(compared(tmp_path / "s")).text()


def test_large_pictures_are_webp_and_all_together_stay_within_the_bound(tmp_path, monkeypatch):
    """Each way of going in is said: as it is, WebP, smaller."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 2, 256, 320, 3), np.uint8)
    draw = lambda row, i: Image.fromarray(noise[row, i])  # noqa: E731
    assert "bit for bit" in Page(compared(tmp_path)).text()
    page = Page(compared(tmp_path, draw=draw))
    for attributes, pixels in zip(
        [a for a in page.all("img") if "src" in a], (noise[r, i] for i in (0, 1) for r in (0, 1))
    ):
        assert attributes["src"].startswith("data:image/webp") and shown(attributes).size == (320, 256)
        assert (attributes["width"], attributes["height"]) == ("320", "256")
        small = [np.asarray(p.resize((40, 32), Image.Resampling.BOX), float) for p in (shown(attributes), draw(0, 0))]
        if pixels is noise[0, 0]:
            assert np.abs(small[0] - small[1]).mean() < 4
    assert "WebP of quality 90" in page.text() and "smaller" not in page.text()
    monkeypatch.setattr(report, "BOUND", 120_000)
    path = compared(tmp_path, draw=draw)
    assert path.stat().st_size < 120_000 * 4 / 3 + 60_000
    page = Page(path)
    assert "made smaller, 128 pixels a side" in page.text()
    assert {(shown(a).size, a["width"]) for a in page.all("img") if "src" in a} == {((128, 102), "320")}


# ---- Curves


def test_a_curve_is_drawn_where_its_values_are(tmp_path):
    """Read back from the drawing by its own ticks; error bars reach one standard error up and down."""
    steps, values, errors = [10, 40, 80], [-0.3, 0.1, 0.25], [0.05, 0.1, 0.02]
    path = tmp_path / "page.html"
    panel = Panel("a title", [Curve(0, "held out", steps, values, errors=errors)], Axis(-0.4, 0.3), 0)
    path.write_text(chart(panel, Axis(0, 80, least=1)))
    page = Page(path)
    labels = [text for name, text in page.texts if name == "text"]
    places = [(float(a["x"]), float(a["y"])) for a in page.all("text")]
    value = lambda label: float(label.replace("\N{MINUS SIGN}", "-").replace(",", ""))  # noqa: E731
    named = list(zip(labels, places, page.all("text")))
    (y_low, at_low), *_, (y_high, at_high) = [(value(t), y - 4) for t, (_, y), a in named if a["text-anchor"] == "end"]
    (x_low, left), *_, (x_high, right) = [(value(t), x) for t, (x, _), a in named if a["text-anchor"] == "middle"]
    y_of = lambda y: at_low + (y - y_low) / (y_high - y_low) * (at_high - at_low)  # noqa: E731
    x_of = lambda x: left + (x - x_low) / (x_high - x_low) * (right - left)  # noqa: E731
    drawn = [tuple(map(float, place.split(","))) for place in page.all("polyline")[0]["points"].split()]
    assert np.allclose(drawn, [(x_of(x), y_of(y)) for x, y in zip(steps, values)], atol=0.2)
    bars = [(float(a["y1"]), float(a["y2"])) for a in page.all("line") if "class" not in a]
    assert np.allclose(bars, [(y_of(y - e), y_of(y + e)) for y, e in zip(values, errors)], atol=0.2)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in [*drawn, *places])
    readings = json.loads(page.all("svg")[0]["data-points"])
    assert readings[1] == [pytest.approx(x_of(40), abs=0.2), "step 40: held out 0.1 ± 0.1"]


def test_what_a_pointer_shows_is_of_few_steps_and_of_all_curves(tmp_path):
    steps = list(range(1, 100_001))
    curves = [Curve(0, name, steps, [float(step) for step in steps]) for name in ("each step", "mean")]
    path = tmp_path / "page.html"
    path.write_text(chart(Panel("loss", curves, Axis(0, 1e5), 0), Axis(0, 100_000, least=1)))
    readings = json.loads(Page(path).all("svg")[0]["data-points"])
    assert 200 <= len(readings) <= 400 and readings[-1][1] == "step 100,000: each step 100,000, mean 100,000"
    assert path.stat().st_size < 100_000


def test_curves_of_a_training(trained):
    """Loss and learning rate; the loss scale where it moves."""
    lines = [dict(step=i, loss=1 / i, lr=i / 10, loss_scale=65536.0) for i in range(1, 31)]
    lines[4]["loss"] = None  # it was infinite
    run = trained(lines)
    page = Page(compared(run, lora=its_own(run)))
    titles = [text for name, text in page.texts if name == "strong"]
    assert titles == ["Loss", "Learning rate"]
    readings = json.loads(page.all("svg")[0]["data-points"])
    assert len(readings) == 29 and readings[-1][1] == f"step 30: loss {1 / 30:.3g}"
    lines[20]["loss_scale"] = 32768.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    titles = [text for name, text in Page(write_report(run)).texts if name == "strong"]
    assert titles == ["Loss", "Learning rate", "Loss scale"]


# ---- Numbers


@pytest.mark.parametrize(
    "differences, said, not_said",
    [
        ([(100, -0.02, -0.02), (200, -0.03, -0.0305)], ["Lowest at step 200", "no better than held-out"], ["risen"]),
        (
            [(100, -0.03, -0.03), (200, -0.02, -0.05)],
            ["Lowest at step 100", "by 0.0300 ± 0.0014", "risen by 0.0100"],
            [],
        ),
        ([(100, -0.03, -0.034)], ["by 0.0040 ± 0.0014: that part is remembered"], ["risen"]),
        ([(100, 0.01, 0.01)], ["0.0100 ± 0.0010 above the base's"], ["risen"]),
    ],
)
def test_what_the_held_out_loss_says(trained, differences, said, not_said):
    lines = [dict(step=step, loss=0.1, lr=1e-4) for step in range(1, 201)]
    for step, difference, on_trained in differences:
        lines[step - 1]["held_out"] = measured(difference, on_trained)
    run = trained(lines)
    page = Page(compared(run, lora=its_own(run)))
    for sentence in said:
        assert sentence in page.text()
    for sentence in not_said:
        assert sentence not in page.text()
    assert len(page.all("tr", **{"class": "best"})) == 1 and "lora-best" not in page.text()
    for _, difference, on_trained in differences:
        minus = lambda v: f"{v:.4f}".replace("-", "\N{MINUS SIGN}")  # noqa: E731
        assert f"{minus(difference)} ± 0.0010{minus(on_trained)} ± 0.0010" in page.text()
        assert f"{minus(difference * 1.5)} ± 0.0010" in page.text()  # the last band's
    change_cache(run, held_out=3, instance_prompt="ohwx")
    text = Page(write_report(run)).text()
    assert "Trigger wordohwx" in text and "5 pictures, 3 held out" in text
    (run / "lora-best.safetensors").write_bytes(b"")
    assert "is lora-best.safetensors" in Page(write_report(run)).text()


def test_a_measurement_that_is_not_finite_is_left_out(trained):
    lines = [
        dict(step=1, held_out=measured(-0.1, -0.1, difference=None)),
        dict(step=2, held_out=None),
        dict(step=3, held_out=[]),
    ]
    run = trained(lines)
    assert "Held-out" not in Page(compared(run, lora=its_own(run))).text()
    bands = [{"from": 0, "to": 250, "difference": None, "standard_error": 0.1}]
    (run / "metrics.jsonl").write_text(json.dumps(dict(step=4, held_out=measured(-0.1, -0.2, bands=bands))) + "\n")
    assert "not finite" in Page(write_report(run)).text()


def test_of_one_held_out_picture_the_numbers_are_told_without_an_error(trained):
    """A folder of 20 pictures with a twentieth held out is the usual one."""
    bands = [{"from": 0, "to": 250, "difference": -0.03, "standard_error": None}]
    alone = measured(-0.02, -0.04, None, bands=bands, pictures=1)
    run = trained([dict(step=step, held_out=alone) for step in (1, 2)])
    text = Page(compared(run, lora=its_own(run))).text()
    assert "on 1 held-out picture the loss is 0.0200 below the base's" in text
    assert "of one picture alone may be off cannot be told" in text and "±" in text  # which the introduction explains
    assert "None" not in text and "\N{MINUS SIGN}0.0200\N{MINUS SIGN}0.0400\N{MINUS SIGN}0.0300" in text
    assert "remembered" not in text and "no better" not in text and "risen" not in text


@pytest.mark.parametrize(
    "odd",
    [
        dict(bands=None),
        dict(bands=[3]),
        dict(bands=[{"from": None, "to": 250}]),
        dict(difference=1e308, train_difference=-1e308),
        dict(difference=10**400),
    ],
    ids=["no bands", "a number", "no beginning", "beyond fp32", "beyond a float"],
)
def test_an_odd_measurement_is_passed_over(trained, odd):
    """After hours of drawing, a line that somebody edited must not take the page."""
    run = trained([dict(step=1, held_out=measured(-0.1, -0.1, **odd)), dict(step=-7, loss=1), dict(step=10**400)])
    assert "Held-out" not in Page(compared(run, lora=its_own(run))).text()


def test_scores_of_any_kind(tmp_path):
    scores = {"base": {"style": 0.012, "colour": 1.0}, "lora": {"style": 0.9, "colour": 1}, "chance": {"style": -0.5}}
    scores |= {"heldout_loss": {"base": 0.6, "lora": 0.1}, "true": {"ink": {"style": 1.0}}, "prompts": 16, "odd": "x"}
    compared(tmp_path)
    (tmp_path / "compare" / "scores.json").write_text(json.dumps(scores))
    text = Page(write_report(tmp_path)).text()
    assert "baselorachancetrue inkstyle0.0120.900\N{MINUS SIGN}0.5001.000colour1.0001.000heldout loss0.6000.100" in text


def test_the_toys_scores_come_onto_the_page_when_they_are_measured(tmp_path, monkeypatch):
    """They are measured after the comparison, so the page is written again."""
    from data.toy import score

    assert "Scores" not in Page(compared(tmp_path)).text()
    scores = {name: dict(style=0.123, lines=0.5, colour=1.0, subject=1.0) for name in ("base", "lora")}
    scores["lines_of_each"] = [dict(prompt="a red fox", base=0.0, lora=0.5)]
    monkeypatch.setattr(score, "score", lambda *_: scores | {"heldout_loss": {"base": 0.6, "lora": 0.1}})
    monkeypatch.setattr(score, "drawn", lambda run: ["something"])
    monkeypatch.setattr(score, "on_the_toys_pictures", lambda run: True)
    score.main([str(tmp_path)])
    assert "style0.1230.123" in Page(tmp_path / "compare" / "report.html").text()


# ---- Settings and commands


def test_the_command_that_trains_the_same(trained):
    """Parsed again, the command has the settings that the run has, whatever they are."""
    rng = random.Random(0)
    for _ in range(100):
        values = {}
        for f in fields(flags.Train):
            if f.name in NOT_TOLD or rng.random() < 0.5:
                continue
            if f.type is bool:
                values[f.name] = rng.random() < 0.5
            elif f.metadata["choices"]:
                one = rng.choice(f.metadata["choices"])
                values[f.name] = (one,) if f.type == tuple[str, ...] | None else one
            elif f.type in (float, float | None):
                values[f.name] = rng.choice([0.25, 0.5, 1.0])
            elif f.type in (int, int | None):
                values[f.name] = rng.randint(2, 99)
        if values.get("num_train_epochs"):
            values["max_train_steps"] = None
        wanted = replace(settings("train", output_dir="runs/it's"), **values)
        if any(useless(wanted) for useless, _ in flags.USELESS[flags.Train]):
            continue
        stored = json.loads(json.dumps(asdict(wanted) | dict(max_train_steps=wanted.max_train_steps or 7)))
        words = shlex.split(train_command(Training(stored), "it's").replace("\\\n", " "))
        assert words[:3] == ["python", "-m", "train"]
        assert flags.parse("train", words[3:]) == wanted
        assert not {"--max_train_steps", "--num_train_epochs"} <= set(words)


def test_no_setting_that_is_told_is_a_free_text():
    """It could be a place, or somebody's caption."""
    free = {f.name for f in fields(flags.Train) if "str" in str(f.type) and not f.metadata["choices"]}
    assert "cache_dir" in free and free <= NOT_TOLD


def test_loras_of_other_ranks_are_told_with_theirs(tmp_path):
    path = compared(tmp_path, labels=("base", "a", "b", "c"))
    report = json.loads((path.parent / "report.json").read_text())
    report["rows"][2]["lora"]["rank"] = 16
    (path.parent / "report.json").write_text(json.dumps(report))
    write_report(tmp_path)
    assert "rank 4, alpha 6; rank 16, alpha 6Strength" in Page(path).text()


def test_settings_are_told_by_their_flags_without_places_and_digests(trained):
    run = trained([], learning_rate=3e-4, use_8bit_adam=True, network_weights="d" * 16, cache_dir="/secret/cache")
    page = Page(compared(run, lora=its_own(run), negative_prompt="blurry"))
    text = page.text()
    assert "--learning_rate0.0003" in text and "--use_8bit_adamyes" in text and "--negative_promptblurry" in text
    assert "--network_weights FILE.safetensors" in text and "python -m infer --prompt 'a fox'" in text
    assert not [word for word in ("secret", "dddd", "cccc", "uuuu", str(run.parent)) if word in text]


def test_a_command_is_told_without_the_places_of_this_machine(tmp_path, monkeypatch):
    run, lora = tmp_path / "my run", tmp_path / "secret" / "fox.safetensors"
    own = run / "a.safetensors"
    lora.parent.mkdir(), run.mkdir(), lora.touch(), own.touch()
    words = ["python", "-m", "infer", "--output_dir", str(run), f"--lora_path={lora}", str(own), "--prompt"]
    prompts = ["/imagine a fox", "it's", "", "a=b", "x" * 5000, "--", "nul\0"]
    told = shlex.split(without_places(shlex.join(words + prompts), run))
    expected = ["--output_dir", "runs/my run", "--lora_path=fox.safetensors", "runs/my run/a.safetensors", "--prompt"]
    assert told == words[:3] + expected + prompts
    monkeypatch.chdir(tmp_path)
    assert without_places("--output_dir 'my run'", run) == "--output_dir 'runs/my run'"


def test_of_a_training_that_made_another_lora_nothing_is_told(trained):
    """A LoRA from elsewhere, drawn into a run's folder, did not learn what that run's curves show."""
    run = trained([dict(step=1, loss=0.1, lr=0.1, held_out=measured(-0.1, -0.1))])
    own, other = its_own(run), dict(file="lora.safetensors", sha256="1" * 64)
    for lora, told in ((own, True), (other, False), (own | dict(file="../lora.safetensors"), True)):
        text = Page(compared(run, lora=lora)).text()
        assert ("Held-out" in text) == ("Learning rate" in text) == ("Trained on" in text) == told


def test_it_stands_without_cache_metrics_and_training(trained, tmp_path):
    text = Page(compared(tmp_path / "nothing")).text()
    assert "a fox" in text and "some/base" in text and "--guidance_scale5.0" in text and "Loss" not in text
    run = trained()
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "cache")
    text = Page(compared(run, lora=its_own(run))).text()
    assert "Loss" not in text and "python -m train" in text


def test_a_report_of_an_earlier_version_is_refused(tmp_path):
    compared(tmp_path)
    (tmp_path / "compare" / "report.json").write_text('{"prompts": ["a"]}')
    with pytest.raises(UserError, match="report.json: of an earlier version; run python -m infer again"):
        write_report(tmp_path)


# ---- In a browser


@pytest.fixture(scope="module")
def page():
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium and chromedriver here")
    with browser() as started:
        yield started


@pytest.fixture
def wild(trained):
    """A page with everything on it, and hostile texts."""
    lines = [dict(step=i, loss=1 / i, lr=i / 10, loss_scale=2.0 ** (i // 9)) for i in range(1, 31)]
    lines[9]["held_out"], lines[19]["held_out"] = measured(-0.03, -0.03), measured(-0.02, -0.05)
    lines[14]["held_out"] = measured(-0.025, -0.04)
    run = trained(lines, HOSTILE[1].replace("/", "")[:200], mixed_precision="bf16")
    noise = np.random.default_rng(0).integers(0, 256, (3, len(HOSTILE), 200, 160, 3), np.uint8)
    draw = lambda row, i: Image.fromarray(noise[row, i])  # noqa: E731
    compared(run, HOSTILE[:4], HOSTILE[4:], ("base", HOSTILE[0], "step 200"), (200, 160), its_own(run), draw)
    scores = {"base": {HOSTILE[0]: 0.5}, "lora": {HOSTILE[0]: 0.7}}
    (run / "compare" / "scores.json").write_text(json.dumps(scores))
    return write_report(run)


FOCUS = "return document.activeElement.getAttribute('href')"
PICTURE = "const p = document.querySelector('.over'); return [p.alt, p.naturalWidth, p.naturalHeight, p.src.length]"
CONTRAST = """
const light = (c) => {
  const [r, g, b] = c.map((v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const found = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('script, style, dialog') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  let under = e, background;
  while (under && (background = parts(getComputedStyle(under).backgroundColor))[3] === 0) under = under.parentElement;
  const style = getComputedStyle(e), text = parts(e.closest('svg') ? style.fill : style.color);
  const [a, b] = [light(text.slice(0, 3)), light(background.slice(0, 3))].sort((x, y) => y - x);
  found.push([(a + .05) / (b + .05), e.className || e.tagName]);
}
return [getComputedStyle(document.body).backgroundColor, found.length, ...found.filter(([ratio]) => ratio < 4.5)];
"""


def test_in_a_browser_it_loads_nothing_runs_nothing_and_fits(page, wild):
    """From the disk, whatever the texts; at a phone's width and a desk's nothing is wider than the window."""
    page.size(1440, 900)
    page.open(wild)
    assert page.run("return window.ran === undefined && document.title.endsWith('base against LoRA')")
    assert [unquote(urlparse(url).path) for url in page.requested()] == [str(wild)]
    assert page.logged("browser") == []
    widths = (
        "Promise.all([...document.querySelectorAll('.grid img')].map((i) => i.decode().then(() => i.naturalWidth)))"
    )
    assert page.run(f"return {widths}") == [160] * 3 * len(HOSTILE)
    for width in (390, 768, 1440):
        page.size(width, 844)
        assert page.run("return document.documentElement.scrollWidth") == width
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 5\">')")
    assert page.run("return window.ran === undefined")  # even if something slipped in, the policy holds


def test_in_a_browser_pictures_open_at_full_size_and_flip_in_place(page, wild):
    page.open(wild)
    page.size(1440, 900)
    page.click(".grid li:nth-child(2) .shot:nth-of-type(1)")
    assert page.run("return document.querySelector('dialog').open")
    seen = [page.run(PICTURE)]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        page.press(key)
        seen.append(page.run(PICTURE))
    labels = ["base", HOSTILE[0], "step 200", "base", "step 200", "step 200", "step 200"]
    prompts = [HOSTILE[1]] * 5 + [HOSTILE[2], HOSTILE[1]]
    assert [alt for alt, *_ in seen] == [f"{prompt} ({label})" for prompt, label in zip(prompts, labels)]
    assert {tuple(size) for _, *size, _ in seen} == {(160, 200)}  # the PNG files' own
    assert page.run("return document.querySelector('dialog h2').textContent") == HOSTILE[1]
    page.press("Escape")
    assert not page.run("return document.querySelector('dialog').open") and page.run(FOCUS) == "baseline_1.png"
    page.press("Tab", "Enter")  # the next one, from the keyboard
    assert page.run("return document.querySelector('dialog').open")
    assert page.run(PICTURE)[0] == f"{HOSTILE[1]} ({HOSTILE[0]})"
    page.run("const s = document.querySelector('dialog input'); s.value = 30; s.dispatchEvent(new Event('input'))")
    assert page.run("return getComputedStyle(document.querySelector('.over')).clipPath") == "inset(0px 0px 0px 30%)"
    for width, height in ((390, 844), (844, 390), (1440, 900)):
        page.size(width, height)
        box = "const b = document.querySelector('.frame').getBoundingClientRect();"
        left, right, top, bottom = page.run(box + "return [b.left, b.right, b.top, b.bottom]")
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (right - left) / (bottom - top) == pytest.approx(160 / 200, rel=0.02) and right - left > 100
    page.click("dialog .close")
    assert page.run(FOCUS) == "finetuned_1.png" and page.run("return window.ran === undefined")
    assert page.logged("browser") == []


def test_in_a_browser_dark_and_light_can_both_be_read(page, wild):
    """Every text has the contrast that WCAG AA asks of small ones."""
    page.open(wild)
    grounds = []
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        ground, texts, *faint = page.run(CONTRAST)
        assert texts > 100 and not faint
        grounds.append(ground)
    assert grounds[0] != grounds[1]


def test_in_a_browser_a_curve_tells_its_values_and_a_command_copies(page, wild):
    page.size(1440, 900)
    page.open(wild)
    output = "return document.querySelector('.chart output').textContent"
    page.run(
        "const s = document.querySelector('.chart svg'), b = s.getBoundingClientRect();"
        "s.dispatchEvent(new PointerEvent('pointermove', { clientX: b.right, clientY: b.top + 9 }))"
    )
    assert page.run(output) == "step 20: trained on \u22120.05 ± 0.001, held out \u22120.02 ± 0.001"
    page.run("document.querySelector('.chart svg').focus()")
    page.press("ArrowRight", "ArrowLeft")
    assert page.run(output).startswith("step 15: ")
    page.press("ArrowRight")
    assert page.run(output).startswith("step 20: ")
    copied = "addEventListener('copy', () => { window.copied = getSelection().toString() })"
    page.run(copied)
    page.click(".copy")
    assert page.run("return document.querySelector('.copy').textContent") == "Copied"
    assert page.run("return window.copied").startswith("python -m train --output_dir 'runs/")
