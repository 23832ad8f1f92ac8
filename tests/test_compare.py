"""Base against LoRA: the same noise, nothing else between the two, and what diffusers' own pipeline draws."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PIPELINE, PROMPTS, here, settings
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file

from data.common.errors import NumbersError, UserError
from data.models.files import Model
from infer.compare import check_steps, difference, encode, models, warn_of_another_base
from infer.grid import CELL, _wrap, grid
from infer.sample import noise, sample
from lora.contents import Contents


@pytest.fixture
def trained(run, tmp_path):
    """The session's run without its pictures."""
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("compare", "state"))
    return folder


def compare(folder, *prompts, **flags):
    """-> {file name: pixels}"""
    words = [w for name, value in (dict(num_inference_steps=2) | flags).items() for w in (f"--{name}", value)]
    here("infer", "--output_dir", folder, "--prompt", *prompts, *words)
    return pictures(folder)


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)) for p in (folder / "compare").glob("*.png")}


def report(folder):
    return json.loads((folder / "compare" / "report.json").read_text())


def same(a, b):
    return np.array_equal(a, b)


def test_the_update_shows_and_the_command_equals_the_function(run, trained):
    """What python -m infer wrote for the session's run, drawn again here: the same pixels; base and LoRA differ."""
    again, first = compare(trained, *PROMPTS), pictures(run.folder)
    names = {"baseline_0.png", "baseline_1.png", "finetuned_0.png", "finetuned_1.png", "grid.png"}
    assert set(again) == set(first) == names
    assert all(same(again[name], first[name]) for name in first)
    assert not same(first["baseline_0.png"], first["finetuned_0.png"])
    assert not same(first["baseline_0.png"], first["baseline_1.png"])
    assert first["baseline_0.png"].shape == (64, 64, 3)  # the cache's resolution


@pytest.mark.slow
def test_other_prompts_beside_it_change_no_pixel(run, trained):
    """Noise from one generator for all would make every picture depend on the order of the prompts."""
    first, turned = pictures(run.folder), compare(trained, "something else", *PROMPTS[::-1])
    for kind in ("baseline", "finetuned"):
        assert same(turned[f"{kind}_2.png"], first[f"{kind}_0.png"])
        assert same(turned[f"{kind}_1.png"], first[f"{kind}_1.png"])


@pytest.mark.slow
def test_lora_scale(run, trained):
    """0 is the base bit for bit; a half is something else than the whole update."""
    zero = compare(trained, PROMPTS[0], lora_scale=0)
    assert same(zero["baseline_0.png"], zero["finetuned_0.png"]) and report(trained)["mean_pixel_change"] == [0]
    half = compare(trained, PROMPTS[0], lora_scale=0.5)
    first = pictures(run.folder)
    assert same(half["baseline_0.png"], first["baseline_0.png"])
    assert not same(half["finetuned_0.png"], first["finetuned_0.png"])


@pytest.mark.slow
def test_negative_prompt_seed_and_guidance_change_pictures(run, trained):
    first = pictures(run.folder)
    for flags in (dict(negative_prompt="blue"), dict(negative_prompt=""), dict(seed=43), dict(guidance_scale=2)):
        assert not same(compare(trained, PROMPTS[0], **flags)["baseline_0.png"], first["baseline_0.png"]), flags


@pytest.mark.slow
def test_pictures_equal_diffusers_own_pipeline(run, trained):
    """From prompts to pixels, from the same noise: the base as it is, the LoRA through load_lora_weights."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("baseline", "finetuned"):
        if name == "finetuned":
            pipeline.load_lora_weights(run.folder / "lora.safetensors")
        for i, prompt in enumerate(PROMPTS):
            how = dict(height=64, width=64, num_inference_steps=2, guidance_scale=5.0)
            theirs = pipeline(prompt, latents=noise(42, prompt, (4, 8, 8)), **how).images[0]
            assert difference(theirs, Image.open(run.folder / "compare" / f"{name}_{i}.png")) < 0.1


@pytest.mark.slow
def test_pictures_of_an_earlier_call_with_more_prompts_go(trained):
    compare(trained, "one", "two", num_inference_steps=1)
    (trained / "compare" / "notes.png").write_bytes((trained / "compare" / "grid.png").read_bytes())
    left = {"baseline_0.png", "finetuned_0.png", "grid.png", "notes.png"}
    assert set(compare(trained, "one", num_inference_steps=1)) == left


def test_the_report(run):
    found, first = report(run.folder), pictures(run.folder)
    changes = [np.abs(first[f"baseline_{i}.png"].astype(float) - first[f"finetuned_{i}.png"]).mean() for i in range(2)]
    assert found["mean_pixel_change"] == pytest.approx(changes, rel=1e-4)
    assert found["prompts"] == list(PROMPTS) and found["seed"] == 42 and found["num_inference_steps"] == 2
    assert (found["lora"]["rank"], found["lora"]["alpha"], found["lora"]["scale"]) == (4, 6, 1)
    assert found["median_s_per_picture"] > 0


def test_noise_is_a_function_of_seed_and_prompt():
    shape = (4, 16, 16)
    assert torch.equal(noise(1, "a", shape), noise(1, "a", shape))
    torch.manual_seed(0)
    many = torch.cat([noise(s, p, shape) for s in range(3) for p in ("a", "b", "1 a")])
    assert len({n.sum().item() for n in many}) == 9
    assert abs(many.mean()) < 0.05 and many.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_is_the_models_own(zeros, tmp_path):
    """Zeros where the model's index says so, else the empty prompt; a given negative prompt is always encoded."""

    class Index:
        def index(self):
            return dict(force_zeros_for_empty_prompt=zeros)

    def encoders(captions):
        return torch.full((1, 77, 2), float(len(captions[0]) + 1)), torch.full((1, 3), float(len(captions[0]) + 1))

    (embeddings,) = encode(encoders, Index(), ("abc",), None)
    assert [e.unique().item() for e in embeddings] == [4, 4, *([0, 0] if zeros else [1, 1])]
    (embeddings,) = encode(encoders, Index(), ("abc",), "ab")
    assert [e.unique().item() for e in embeddings] == [4, 4, 3, 3]


def test_base_and_vae_come_from_the_manifest_unless_named(run, tmp_path):
    def names(folder=run.folder, **flags):
        model, vae, resolution, _ = models(settings("infer", **flags), folder)
        return model.name, vae.name, resolution

    assert names() == (str(PIPELINE), str(PIPELINE), 64)
    assert names(base_model="x") == ("x", "x", 64)
    assert names(pretrained_vae_model_name_or_path="y") == (str(PIPELINE), "y", 64)
    assert names(tmp_path, base_model="x", pretrained_vae_model_name_or_path="y") == ("x", "y", None)
    with pytest.raises(UserError, match="no finished cache here"):
        names(tmp_path)


@pytest.mark.slow
def test_a_lora_of_another_base_is_said(run, trained, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(PIPELINE, other)
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] += 1
    save_file(tensors, path)
    compare(trained, "x", base_model=other, num_inference_steps=1)
    assert "was trained on pipeline, the base here is other (its UNet has the fingerprint " in capsys.readouterr().out
    compare(trained, "x", num_inference_steps=1)
    assert "was trained on" not in capsys.readouterr().out


A, B = "a" * 16, "b" * 16  # fingerprints


@pytest.mark.parametrize(
    "metadata, name, here, said",
    [
        ({"ss_sd_model_name": "mine", "barelora_base_fingerprint": A}, str(PIPELINE), A, False),
        ({"ss_sd_model_name": "mine", "barelora_base_fingerprint": A}, str(PIPELINE), B, True),
        ({"ss_sd_model_name": f"local-{A}"}, str(PIPELINE), A, False),  # as earlier versions wrote it
        ({"ss_sd_model_name": f"local-{A}"}, str(PIPELINE), B, True),
        ({"ss_sd_model_name": "mine", "barelora_base_fingerprint": A}, "someone/model", None, False),  # nobody knows
        ({"ss_sd_model_name": "someone/model"}, "someone/model", None, False),
        ({"ss_sd_model_name": "someone/model"}, "someone/other", None, True),
        ({"ss_sd_model_name": "someone/model"}, str(PIPELINE), A, False),  # it may be a download of that one
        ({"ss_sd_model_name": "model.safetensors"}, "someone/other", None, False),
        ({}, "someone/other", None, False),
        ({}, str(PIPELINE), A, False),
    ],
)
def test_another_base_is_said_only_where_both_are_known(metadata, name, here, said, capsys):
    """A warning that is wrong half of the time is not read the other half."""
    warn_of_another_base(Contents(PIPELINE, {}, metadata, ()), Model(name), here)
    assert ("was trained on" in capsys.readouterr().out) == said


def test_a_weights_file_can_be_named(run, trained):
    earlier = compare(trained, PROMPTS[0], lora_path=run.folder / "lora-000002.safetensors")
    first = pictures(run.folder)
    assert same(earlier["baseline_0.png"], first["baseline_0.png"])
    assert not same(earlier["finetuned_0.png"], first["finetuned_0.png"])
    with pytest.raises(UserError, match="nothing.safetensors: no such file"):
        compare(trained, PROMPTS[0], lora_path="nothing.safetensors")


@pytest.mark.parametrize("text", ["x" * 300, "a " + "Donaudampfschifffahrt" * 5 + " b", "one two three " * 20])
def test_no_line_of_the_grid_is_wider_than_its_cell_and_no_letter_is_lost(text):
    font = ImageFont.load_default(size=17)
    lines = _wrap(text, font)
    assert all(0 < font.getlength(line) <= CELL for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_picture_that_is_not_finite_is_not_saved_as_a_black_one(trained):
    with pytest.raises(NumbersError, match="not finite, it would be black; try a smaller --lora_scale, or another VAE"):
        compare(trained, PROMPTS[0], lora_scale=1e30)
    assert not list((trained / "compare").glob("finetuned*"))


@pytest.mark.slow
def test_the_grid_holds_every_picture_at_its_place():
    """Base is above and LoRA below, in the order of the prompts; more than eight wrap."""
    colours = [(20 * i, 255 - 20 * i, 7) for i in range(10)]
    rows = {
        "base": [Image.new("RGB", (64, 64), c) for c in colours],
        "LoRA": [Image.new("RGB", (64, 64), (255, 0, c[0])) for c in colours],
    }
    found = np.asarray(grid(rows, [f"a long prompt about number {i} " * 3 for i in range(10)]))
    for label, of in rows.items():
        places = []
        for image in of:
            ys, xs = np.where((found == image.getpixel((0, 0))).all(-1))
            assert len(ys) >= 256 * 256
            places.append((ys.min(), xs.min()))
        assert places == sorted(places) and places[0][0] < places[8][0]
    assert len(found.shape) == 3


def test_a_report_never_tells_of_other_pictures_or_weights(run, tmp_path, monkeypatch):
    """Stopped after its first picture, infer leaves no report of the last time; and what it says it read once."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    sha = hashlib.sha256((folder / "lora.safetensors").read_bytes()).hexdigest()

    def stopped(*_):
        shutil.copy(folder / "lora-000002.safetensors", folder / "lora.safetensors")  # another run's export, meanwhile
        raise KeyboardInterrupt

    monkeypatch.setattr("infer.compare.grid", stopped)
    with pytest.raises(KeyboardInterrupt):
        here("infer", "--output_dir", folder, "--prompt", "x", "--num_inference_steps", 1)
    assert (folder / "compare" / "baseline_0.png").exists()
    assert not (folder / "compare" / "report.json").exists() and not (folder / "compare" / "grid.png").exists()
    monkeypatch.undo()
    shutil.copy(run.folder / "lora.safetensors", folder)

    def sampled(*given):
        shutil.copy(folder / "lora-000002.safetensors", folder / "lora.safetensors")
        return sample(*given)

    monkeypatch.setattr("infer.compare.sample", sampled)
    here("infer", "--output_dir", folder, "--prompt", "x", "--num_inference_steps", 1)
    assert json.loads((folder / "compare" / "report.json").read_text())["lora"]["sha256"] == sha


def test_more_steps_than_the_schedule_has_are_refused():
    """Some of them would do nothing. It is said before anything is loaded."""
    check_steps(Model(str(PIPELINE)), 1000)
    with pytest.raises(UserError, match="--num_inference_steps 1001: the schedule of .* has 1000 steps"):
        check_steps(Model(str(PIPELINE)), 1001)


@pytest.mark.slow
def test_a_prompt_longer_than_clip_reads_is_said(trained, capsys):
    """What is cut off is not drawn; without a word one would look for it in the LoRA."""
    compare(trained, "a red ball, " * 1000, "a red ball", num_inference_steps=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "longer than CLIP reads" in line]
    assert len(said) == 1 and "75 tokens" in said[0] and len(said[0]) < 200
