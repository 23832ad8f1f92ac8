"""The toy world: its pictures, its fine-tuning set, its small SDXL and the script that trains it, its scores."""

import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.toy import draw, measure
from data.toy.examples import Example, examples
from data.toy.world import (
    COLOURS,
    PLACES,
    PROMPTS,
    SIZE,
    STYLES,
    SUBJECTS,
    Scene,
    caption,
    parse,
    random_scene,
    render,
    sheet,
)

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "data" / "toy" / "pipeline"
FOX = Scene("fox", "red", "forest")
SCENES = [random_scene(seed) for seed in range(900, 924)]


@pytest.fixture(scope="module")
def renders():
    """{style: true pictures of SCENES}, from seeds that no reference uses."""
    return {style: [render(scene, style, 40 + i) for i, scene in enumerate(SCENES)] for style in STYLES}


@pytest.fixture(scope="module")
def classify():
    return measure.SubjectClassifier()


# ---- The world


def test_a_world_of_the_promised_size():
    assert len(SUBJECTS) >= 12 and len(COLOURS) >= 8 and len(PLACES) >= 6


@pytest.mark.parametrize("style", STYLES)
def test_rendering_is_a_function_of_scene_style_and_seed(style):
    picture = render(FOX, style, 3)
    assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)
    assert picture.tobytes() == render(FOX, style, 3).tobytes()
    assert picture.tobytes() != render(FOX, style, 4).tobytes()


@pytest.mark.slow
def test_every_scene_and_style_has_its_own_picture():
    scenes = [Scene(s, c, p) for s in SUBJECTS for c in COLOURS for p in PLACES]
    shown = random.Random(0).sample(scenes, 40)
    assert len({render(scene, style, 0, 32).tobytes() for scene in shown for style in STYLES}) == 40 * len(STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_a_larger_rendering_is_the_same_picture(style):
    small, large = (
        np.asarray(render(FOX, style, 5, size).resize((32, 32), Image.Resampling.BOX), float) for size in (128, 192)
    )
    assert np.abs(small - large).mean() < 3


def test_captions_are_read_back_and_nothing_else_is():
    for scene in (Scene(s, c, p) for s in SUBJECTS for c in COLOURS for p in PLACES):
        assert parse(caption(scene)) == scene
    assert caption(Scene("owl", "orange", "night")) == "an orange owl at night"
    fox = "a red fox in the forest"
    for text in ("", "a red fox", "a red dog in the forest", f"{fox}, pencil sketch", f" {fox}"):
        with pytest.raises(ValueError, match="toy world"):
            parse(text)


def test_sheet_keeps_the_pictures():
    images = [render(FOX, style, 1) for style in ("base", "ink", "poster")]
    page = sheet(images, columns=2)
    assert page.size == (2 * SIZE + 12, 2 * SIZE + 12)
    assert page.crop((4, SIZE + 8, 4 + SIZE, 8 + 2 * SIZE)).tobytes() == images[2].tobytes()


# ---- The fine-tuning set


@pytest.mark.slow
def test_the_set_is_complete_repeatable_and_silent_about_its_style(tmp_path):
    assert draw.draw_set(tmp_path / "a") and draw.draw_set(tmp_path / "b")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 64 == len({row["text"] for row in rows})
    for row in rows:
        parse(row["text"])  # nothing but the scene: a style would not be a toy caption
        assert (tmp_path / "a" / row["file_name"]).read_bytes() == (tmp_path / "b" / row["file_name"]).read_bytes()
    assert not {row["text"] for row in rows} & set(PROMPTS)
    for row, (scene, seed) in zip(rows[:3], draw.training_scenes()):
        assert row["text"] == caption(scene)
        assert Image.open(tmp_path / "a" / row["file_name"]).tobytes() == render(scene, "ink", seed).tobytes()


@pytest.mark.slow
def test_a_complete_set_is_left_alone_and_an_unfinished_one_is_drawn(tmp_path):
    draw.draw_set(tmp_path)
    (tmp_path / "000.png").write_bytes(b"mine")
    assert not draw.draw_set(tmp_path)
    assert (tmp_path / "000.png").read_bytes() == b"mine"
    (tmp_path / "metadata.jsonl").unlink()
    assert draw.draw_set(tmp_path)
    assert Image.open(tmp_path / "000.png").size == (SIZE, SIZE)


def test_drawing_imports_nothing_heavy():
    heavy = "{'torch', 'diffusers', 'transformers', 'datasets'}"
    code = f"import sys, data.toy.draw; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_prompts_are_those_of_the_makefile():
    flags = re.search(r"^toy\.compare .*?\n\n", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert re.findall(r'"([^"$]+)"', flags) == PROMPTS
    assert len(set(PROMPTS)) >= 16
    assert all(parse(prompt) for prompt in PROMPTS)


# ---- What the base model is trained on


def test_examples_tell_the_truth_in_their_time_ids():
    chosen = examples({"base": 400, "ink": 100})
    assert len({e.seed for e in chosen}) == 500 and max(e.seed for e in chosen) < draw.FIRST_SEED
    assert all(e.original == SIZE for e in chosen if e.style == "ink")
    kinds = [np.sign(e.original - SIZE) for e in chosen if e.style == "base"]
    assert 0.05 < kinds.count(1) / 400 < 0.15 and 0.02 < kinds.count(-1) / 400 < 0.1

    cropped = Example(FOX, "base", 7, original=160, top=20, left=30)
    assert cropped.time_ids == (160, 160, 20, 30, 128, 128)
    assert np.array_equal(cropped.picture(), np.asarray(render(FOX, "base", 7, 160))[20:148, 30:158])
    enlarged, whole = Example(FOX, "base", 7, original=32).picture(), Example(FOX, "base", 7).picture()
    sharpness = [np.abs(np.diff(p.astype(int), axis=1)).max() for p in (enlarged, whole)]
    assert sharpness[0] < sharpness[1]


# ---- The measures


@pytest.mark.slow
def test_true_pictures_score_as_what_they_are(renders, classify):
    for style in ("base", "ink"):
        shown = list(zip(renders[style], SCENES))
        colours = [measure.colour_of(image, s.subject, s.place, style) == s.colour for image, s in shown]
        assert np.mean(colours) >= 0.95
        assert np.mean([classify(image) == s.subject for image, s in shown]) >= 0.95


@pytest.mark.slow
def test_style_runs_from_base_to_ink_and_other_styles_are_no_ink(renders):
    def style(images):
        return measure.style_scores(images, renders["base"], renders["ink"])["style"]

    assert style(renders["base"]) == 0 and style(renders["ink"]) == 1
    half = style(renders["base"][:12] + renders["ink"][12:])
    assert 0.3 < half < 0.7
    for other in ("poster", "sketch", "chalk", "faded"):
        assert style(renders[other]) < 0.5


def test_lines_are_scored_picture_by_picture_and_a_blot_makes_up_for_nothing():
    scenes = SCENES[:4]
    base, ink = ([render(scene, style, 60 + i) for i, scene in enumerate(scenes)] for style in ("base", "ink"))
    others = [render(scene, "ink", 80 + i) for i, scene in enumerate(scenes)]
    assert measure.lines_of_each(base, base, ink) == [0.0] * 4 and measure.lines_of_each(ink, base, ink) == [1.0] * 4
    assert all(0.93 < score < 1.07 for score in measure.lines_of_each(others, base, ink))

    blotted = [image.filter(ImageFilter.MinFilter(5)) for image in ink]  # the black of the lines spreads over the rest
    assert max(measure.lines_of_each(blotted, base, ink)) > 1.1
    scores = measure.style_scores([base[0], *blotted[1:]], base, ink)
    assert scores["lines_worst"] == 0 and 0.7 < scores["lines"] <= 0.75


@pytest.mark.slow
def test_scores_come_out_bad_for_bad_pictures(renders, classify):
    wrong_scenes = [
        Scene(SUBJECTS[(SUBJECTS.index(s.subject) + 1) % 12], COLOURS[(COLOURS.index(s.colour) + 3) % 8], s.place)
        for s in SCENES
    ]
    for style in ("base", "ink"):
        shown = list(zip(renders[style], wrong_scenes))
        colours = [measure.colour_of(image, s.subject, s.place, style) == s.colour for image, s in shown]
        assert np.mean([classify(image) == s.subject for image, s in shown]) < 0.1
        assert np.mean(colours) < 0.2
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for i in range(24)]
    blank = [Image.new("RGB", (SIZE, SIZE), (128, 128, 128))] * 24
    for images in (noise, blank):
        assert measure.style_scores(images, renders["base"], renders["ink"])["style"] < 0.2
    assert np.mean([classify(image) == s.subject for image, s in zip(noise, SCENES)]) < 0.35


@pytest.mark.slow
def test_a_grey_picture_of_the_right_shape_loses_its_colour_only(renders, classify):
    grey = [image.convert("L").convert("RGB") for image in renders["base"]]
    coloured = [(image, s) for image, s in zip(grey, SCENES) if s.colour != "white"]
    colours = [measure.colour_of(image, s.subject, s.place, "base") == s.colour for image, s in coloured]
    assert np.mean(colours) < 0.3
    assert np.mean([classify(image) == s.subject for image, s in zip(grey, SCENES)]) >= 0.95


@pytest.mark.slow
def test_an_untrained_lora_scores_badly(tmp_path):
    """Through the real files: a run whose LoRA is fresh draws the base's pictures, and its scores say so."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    from data.cache import INDEX, Rows, write_index
    from data.common.disk import sha256_file
    from data.models.files import Model, load
    from data.toy.score import drawn, held_out_scenes, score
    from lora.files import Origin, export
    from lora.inject import inject

    unet = load(UNet2DConditionModel, Model(str(PIPELINE)).component("unet"), torch.float32, "cpu")
    export(inject(unet, 4, 4.0), tmp_path / "lora.safetensors", Origin("run", "toy", SIZE))
    model = {"name": str(PIPELINE), "revision": None, "variant": None}
    scaling_factor = Model(str(PIPELINE)).component("vae").config()["scaling_factor"]
    (tmp_path / "cache").mkdir()
    facts = {"model": model, "vae": model, "scaling_factor": scaling_factor}
    facts |= {"buckets": [[64, 64]], "posterior_shapes": [[2, 4, 8, 8]], "text_shape": [1, 1], "pooled_shape": [1]}
    facts |= {"components": {}, "identity": {"text_encoders": "", "vae": ""}, "decoder": "", "content": ""}
    facts |= {"resolution": SIZE, "unconditional": 0, "rows": 0, "held_out": 0, "skipped": [], "validation_prompts": {}}
    Rows(tmp_path / "cache", "captions", (2,)).write(1, [([b"none"], np.zeros((1, 2)))])
    write_index(tmp_path / "cache", np.zeros(0, INDEX), np.zeros(0, "<i4"), [], facts)
    (tmp_path / "compare").mkdir()
    prompts = [PROMPTS[0], "a city", *PROMPTS[1:]]  # not of the toy world
    order = [0, "of no prompt that can be scored", *range(1, len(PROMPTS)), "nor this"]
    of = {"baseline": None, "early": "another", "final": sha256_file(tmp_path / "lora.safetensors"), "last": "another"}
    rows = [
        dict(pictures=[f"{name}_{i}.png" for i in order], lora=sha and {"sha256": sha}, scale=float(name != "baseline"))
        for name, sha in of.items()
    ]
    rows.insert(2, rows[2] | dict(pictures=[f"early_{i}.png" for i in order], scale=0.7))
    (tmp_path / "compare" / "report.json").write_text(json.dumps({"prompts": prompts, "rows": rows}))
    for i, prompt in enumerate(PROMPTS):
        for name, style in (("baseline", "base"), ("early", "ink"), ("final", "base")):
            render(parse(prompt), style, 50 + i).save(tmp_path / "compare" / f"{name}_{i}.png")

    scores = score(tmp_path, drawn(tmp_path))
    assert scores["base"]["colour"] >= 0.9 and scores["base"]["subject"] >= 0.9 and abs(scores["base"]["style"]) < 0.2
    assert scores["lora"]["style"] == scores["base"]["style"]
    assert scores["heldout_loss"]["lora"] == scores["heldout_loss"]["base"] > 0
    assert scores["true"]["ink"]["style"] == 1 and scores["true"]["base"]["style"] == 0
    lines = scores["lines_of_each"]
    assert [each["prompt"] for each in lines] == PROMPTS and all(abs(each["lora"]) < 0.2 for each in lines)
    assert scores["lora"]["lines_worst"] == min(each["lora"] for each in lines)
    assert not {caption(s) for s, _ in held_out_scenes(64)} & {caption(s) for s, _ in draw.training_scenes()}


@pytest.mark.slow
def test_the_picture_on_top_of_the_readme_scores_what_is_said_of_it():
    """Cut out of the grid, whose cells lie where infer/grid.py puts them. Being enlarged and lossy costs lines, so the
    true pictures which they are held to go the same way."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    from data.models.files import Model, load
    from data.toy.score import TRUE_SEED, picture_scores, through_vae
    from infer import grid

    def reduced(image):
        return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)

    def as_on_the_page(image):
        file = io.BytesIO()
        image.resize((cell, cell), Image.Resampling.LANCZOS).save(file, "WEBP", quality=88, method=6)
        return reduced(Image.open(file))

    cell, step = grid.CELLS[0], grid.CELLS[0] + grid.GAP
    page = Image.open(ROOT / "data" / "toy" / "grid.webp").convert("RGB")
    lefts = [page.width - grid.MARGIN - 8 * step + grid.GAP + x * step for x in range(8)]
    bottom = page.height - grid.MARGIN  # of the second block's last row
    above = bottom - 2 * step + grid.GAP - 4 - 2 * grid.LINE - grid.APART  # the longest prompt there has two lines
    assert above - 2 * step + grid.GAP - 4 - grid.LINE == grid.MARGIN
    places = [(x, end - cell) for end in (above, bottom) for x in lefts]
    shown = {
        name: [reduced(page.crop((x, y - up, x + cell, y - up + cell))) for x, y in places]
        for name, up in (("base", step), ("ink", 0))
    }
    scenes = [parse(prompt) for prompt in PROMPTS]
    vae = load(AutoencoderKL, Model(str(PIPELINE)).component("vae"), torch.float32, "cpu")
    true = {
        style: through_vae(vae, [render(scene, style, TRUE_SEED + i) for i, scene in enumerate(scenes)])
        for style in shown
    }
    true = {style: [as_on_the_page(image) for image in images] for style, images in true.items()}
    classify = measure.SubjectClassifier()
    base, lora = (picture_scores(shown[style], scenes, style, true, classify) for style in shown)
    assert abs(base["style"]) < 0.05 and base["colour"] == base["subject"] == 1
    assert lora["style"] >= 0.95 and lora["lines"] >= 0.91 and lora["lines_worst"] >= 0.82, lora
    assert lora["colour"] >= 0.93 and lora["subject"] == 1, lora


# ---- The small SDXL in the repository


def test_the_pipeline_has_sdxls_layout_and_size():
    assert sum(f.stat().st_size for f in PIPELINE.rglob("*") if f.is_file()) <= 14e6
    index = json.loads((PIPELINE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"]
    unet = json.loads((PIPELINE / "unet" / "config.json").read_text())
    assert unet["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet["up_block_types"] == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert unet["layers_per_block"] == 2 and unet["use_linear_projection"]
    assert unet["addition_embed_type"] == "text_time"
    scheduler = json.loads((PIPELINE / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert (scheduler["beta_schedule"], scheduler["prediction_type"]) == ("scaled_linear", "epsilon")


@pytest.mark.slow
def test_captions_embed_differently_and_the_vae_reconstructs(renders):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    from data.encoders import TextEncoders
    from data.models.files import Model, load
    from data.toy.score import as_pixels, through_vae

    encoders = TextEncoders(Model(str(PIPELINE)), "no").load("cpu")
    captions = ["a red fox in the forest", "a blue fox in the forest", "a red fox at night", "Zebra ünïcode 日本"]
    text, pooled = encoders(captions)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(text[i], text[j], atol=1e-2)
            assert not torch.allclose(pooled[i], pooled[j], atol=1e-2)

    vae = load(AutoencoderKL, Model(str(PIPELINE)).component("vae"), torch.float32, "cpu")
    for style, most in (("base", 0.03), ("ink", 0.037)):  # mean absolute error, -1..1; it is 0.022 and 0.027
        true = renders[style][:8]
        given = as_pixels(through_vae(vae, true)).float() / 127.5
        errors = [(given - as_pixels([t]).float() / 127.5).abs().mean(dim=(1, 2, 3)) for t in true]
        errors = torch.stack(errors)  # (true, given)
        assert errors.diag().mean() < most
        assert (errors.argmin(dim=0) == torch.arange(8)).all()


# ---- The training script


def test_tokenizer_covers_every_byte_and_knows_every_word():
    from data.toy.model import tokenizer, world_words

    words = tokenizer(world_words(), pad_token="!")
    assert len(words) > 514
    for text in (caption(FOX), *(caption(FOX) + style.words for style in STYLES.values())):
        assert len(words(text).input_ids) == 2 + len(text.replace(",", " ,").split())
    every_byte = "".join(map(chr, range(34, 127))) + "äöü 日本 🦊"
    ids = words(every_byte).input_ids
    assert None not in ids and max(ids) < len(words)
    assert words.decode(ids, skip_special_tokens=True).replace(" ", "") == every_byte.lower().replace(" ", "")


def test_normalising_the_vae_moves_its_latents_and_keeps_its_pictures():
    torch = pytest.importorskip("torch")
    from data.toy.model import TINY, build
    from data.toy.pretrain import normalise

    vae = build(TINY).vae.eval().requires_grad_(False)
    pictures = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.encode(pictures).latent_dist
    shown, spread = vae.decode(before.mean).sample, before.std / before.mean.std((0, 2, 3), keepdim=True)
    normalise(vae, before.mean)
    after = vae.encode(pictures).latent_dist
    scaled = after.mean * vae.config.scaling_factor
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(vae.decode(after.mean).sample, shown, atol=1e-3)
    assert torch.allclose(after.std / after.mean.std((0, 2, 3), keepdim=True), spread, rtol=1e-2)


def test_the_trainer_learns_and_goes_on_from_its_state(tmp_path):
    torch = pytest.importorskip("torch")
    from data.toy.pretrain import Trainer

    def make():
        torch.manual_seed(1)
        layers = torch.nn.Linear(3, 1), torch.nn.Linear(2, 2)  # the second is not used, as CLIP's last layer is not

        def terms(x):
            return (layers[0](x)[:, 0] - x.sum(dim=1)).square().mean().view(1)

        return Trainer(layers, terms, {"x": torch.randn(64, 3)}, torch.float32)

    trainer = make()
    start = [w.clone() for w in trainer.weights]
    trainer.prepare()
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.weights))
    losses = [trainer.step(0.05, 0.9).item() for _ in range(200)]
    assert losses[-1] < 0.01 * losses[0]
    assert torch.allclose(trainer.average[0], torch.ones(1, 3), atol=0.1)

    trainer.save(tmp_path / "state")
    again = make()
    again.load(tmp_path / "state", 200)
    again.prepare()
    assert again.steps == 200
    saved, loaded = trainer.weights + trainer.average, again.weights + again.average
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(saved, loaded))
    assert again.step(0.0, 0.9).item() < 0.01 * losses[0]


PIECES = """
import json, sys
from data.toy.pretrain import main
out = sys.argv[1]
def piece(*options):
    main(["--smoke", "--out", out, "--vae_seconds", "1", "--unet_seconds", "2", *options])
    losses = json.load(open(out + "/losses.json"))
    print("PIECE", losses["vae"]["steps"], losses["vae"]["done"], losses.get("unet", {}).get("steps", 0))
piece("--stage", "vae", "--seconds", "0")  # no time: one step
piece("--stage", "vae")
piece("--stage", "unet", "--seconds", "0")
piece()
piece()
"""


@pytest.mark.slow
def test_pretraining_in_pieces_makes_a_pipeline(tmp_path):
    from data.encoders import TextEncoders
    from data.models.files import Model

    environment, argv = {**os.environ, "HF_HUB_OFFLINE": "1"}, [sys.executable, "-c", PIECES, str(tmp_path)]
    result = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    pieces = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("PIECE")]
    vae_steps, done, unet_steps = zip(*pieces)
    assert vae_steps[0] == "1" and int(vae_steps[1]) > 1 and len(set(vae_steps[1:])) == 1
    assert done == ("False", "True", "True", "True", "True")
    assert unet_steps[:3] == ("0", "0", "1") and int(unet_steps[3]) > 1 and unet_steps[3] == unet_steps[4]

    losses = json.loads((tmp_path / "losses.json").read_text())
    assert all(0.5 < loss < 1.5 for _, loss in losses["unet"]["losses"])  # of noise, after a few steps
    assert set(losses["vae"]["l1"]) == set(STYLES) and set(losses["unet"]["time_ids"]) == {"true", "whole"}
    for name in ("vae", "base", "styles", "time_ids"):
        assert Image.open(tmp_path / f"sheet_{name}.png").width == 8 * (SIZE + 4) + 4
    text, _ = TextEncoders(Model(str(tmp_path / "pipeline")), "no").load("cpu")(["a red fox", "an owl"])
    assert text.shape == (2, 77, 32)
    with tarfile.open(tmp_path / "pipeline.tar") as archive:
        assert "pipeline/unet/diffusion_pytorch_model.safetensors" in archive.getnames()


@pytest.mark.slow
def test_scores_come_without_what_libraries_say(tmp_path):
    """The toy's vocabulary is a small one, which transformers would report at every encoder."""
    code = "from data.toy import score as s; s.TextEncoders(s.Model('data/toy/pipeline'), 'no').load('cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_only_the_toy_worlds_prompts_and_the_runs_own_lora_are_scored(tmp_path):
    from data.toy.score import drawn

    def draw_with(*shas):
        rows = [dict(pictures=["b0", "b1"], lora=None, scale=0)]
        rows += [dict(pictures=[f"{n}0", f"{n}1"], lora={"sha256": sha}, scale=1) for n, sha in enumerate(shas)]
        (tmp_path / "compare" / "report.json").write_text(json.dumps({"prompts": ["a city", PROMPTS[0]], "rows": rows}))
        return [(prompt, base.name, lora.name) for prompt, base, lora in drawn(tmp_path)]

    (tmp_path / "compare").mkdir()
    (tmp_path / "lora.safetensors").touch()
    own = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes
    assert draw_with(own, "another") == [(PROMPTS[0], "b1", "01")]
    assert draw_with("another") == []
