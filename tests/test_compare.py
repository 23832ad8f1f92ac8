"""Base against LoRAs: the same noise, nothing else between two rows, and what diffusers' own pipeline draws."""

import hashlib
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from conftest import PIPELINE, PROMPTS, here, settings
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from data.common.errors import NumbersError, UserError
from data.models.files import Model, load
from infer.compare import (
    check_steps,
    difference,
    encode,
    models,
    table,
    warn_of_another_base,
    warn_of_trigger_words,
)
from infer.loras import Lora
from infer.sample import noise, sample
from lora import files
from lora.contents import Contents
from lora.files import Origin, export
from lora.inject import inject


@pytest.fixture
def trained(run, tmp_path):
    """The session's run without its pictures."""
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("compare", "state"))
    return folder


def compare(folder, *prompts, **flags):
    """-> {file name: pixels}"""
    words = []
    for name, value in (dict(num_inference_steps=2) | flags).items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
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


def test_metrics_that_the_page_cannot_read_are_found_at_the_door(trained):
    """After hours of drawing there would be pictures and no page."""
    (trained / "metrics.jsonl").unlink()
    (trained / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: not a file; move it away"):
        compare(trained, "a fox")
    assert not (trained / "compare").exists()


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


# ---- Several LoRAs


@pytest.fixture(scope="session")
def wide(run, tmp_path_factory):
    """A file of more layers, another rank and alpha ≠ rank than the run's: its update is all over the UNet."""
    unet = load(UNet2DConditionModel, Model(str(PIPELINE)).component("unet"), torch.float32, "cpu")
    adapters = inject(unet, 7, 3.0, layers="attn-mlp")
    generator = torch.Generator().manual_seed(1)
    for _, B in adapters.projections().values():
        B.copy_(torch.randn(B.shape, generator=generator) / 10)
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    export(adapters, path, Origin("wide", "toy", 64))
    return path


@pytest.mark.slow
def test_a_picture_is_a_function_of_prompt_lora_and_scale_alone(run, trained, wide, monkeypatch):
    """Bit for bit, whatever else is drawn before and beside it; and one LoRA at a time is in memory.

    The wide one comes first: what it left in the UNet, or a rank that stayed, would spoil every row behind it.
    """
    made, alive = {"load": [], "read": []}, []
    for name in made:
        real = getattr(files, name)

        def remembered(*given, name=name, real=real):
            made[name].append(weakref.ref(result := real(*given)))
            return result

        monkeypatch.setattr(files, name, remembered)

    def counted(*given):
        alive.append([sum(of() is not None for of in made[name]) for name in ("load", "read")])
        return sample(*given)

    monkeypatch.setattr("infer.compare.sample", counted)
    words = dict(unrelated_prompt="a car", lora_path=[wide, trained])
    found, of_run = compare(trained, PROMPTS[1], PROMPTS[0], **words), pictures(run.folder)
    assert alive == 3 * [[0, 0]] + 12 * [[1, 1]] and len(made["load"]) == 4

    rows = report(trained)["rows"]
    assert [row["label"] for row in rows] == ["base", "wide", "step 2", "step 4", "final (step 6)"]
    names = ["baseline", "finetuned", "finetuned-2", "finetuned-3", "finetuned-4"]
    assert [row["pictures"] for row in rows] == [[f"{name}_{i}.png" for i in range(3)] for name in names]
    assert set(found) == {name for row in rows for name in row["pictures"]} | {"grid.png"}
    for i in range(2):  # as the session's run drew them, the other way round and without what is beside them here
        assert same(found[f"baseline_{i}.png"], of_run[f"baseline_{1 - i}.png"])
        assert same(found[f"finetuned-4_{i}.png"], of_run[f"finetuned_{1 - i}.png"])
    for i in range(3):
        assert len({found[row["pictures"][i]].tobytes() for row in rows}) == 5

    monkeypatch.undo()
    alone = compare(trained, PROMPTS[0], lora_path=wide)
    assert same(alone["finetuned_0.png"], found["finetuned_1.png"])
    assert same(alone["baseline_0.png"], found["baseline_1.png"])


def test_the_report_tells_of_every_row(run, trained, wide, capsys):
    found = compare(trained, PROMPTS[0], unrelated_prompt=["a car", "a dog"], lora_path=wide, lora_scale=[0.5, 1, 0.5])
    said, told = capsys.readouterr().out, report(trained)
    assert told["prompts"] == [PROMPTS[0]] and told["unrelated_prompts"] == ["a car", "a dog"]
    assert told["resolution"] == [64, 64]
    assert told["command"].startswith(
        "python -m infer --output_dir runs/small --prompt 'a red fox in the forest' --num"
    )
    assert [row["label"] for row in told["rows"]] == ["base", "wide × 0.5", "wide × 1"]
    base, *rows = told["rows"]
    assert base["lora"] is None and base["scale"] == 0 and base["mean_pixel_change"] is None
    digest = hashlib.sha256(wide.read_bytes()).hexdigest()
    for row in rows:
        assert row["lora"] == dict(file="wide.safetensors", step=None, sha256=digest, rank=7, alpha=3)
        pairs = zip(base["pictures"], row["pictures"])
        changes = [np.abs(found[a].astype(float) - found[b]).mean() for a, b in pairs]
        assert row["mean_pixel_change"] == pytest.approx(changes, rel=1e-4) and min(changes) > 0
        means = f"{changes[0]:9.2f}{np.mean(changes[1:]):11.2f}  {row['label']}"
        assert means in said.splitlines()
    assert not same(found["finetuned_0.png"], found["finetuned-2_0.png"])
    assert told["lora"] == rows[0]["lora"] | dict(scale=0.5)
    assert told["mean_pixel_change"] == rows[0]["mean_pixel_change"]
    assert "3 rows of 3 prompts: 9 pictures" in said


def test_the_table_has_no_column_of_prompts_that_are_not_there():
    rows = [dict(label=label, pictures=[1, 2], mean_pixel_change=[1, 2]) for label in ("base", "x")]
    assert table(rows, 2).splitlines()[1:] == ["  prompts", "     1.50  x"]


def test_of_the_trigger_word_only_what_surprises_is_said(capsys):
    def said(prompts, unrelated, *words):
        of = [{"modelspec.trigger_phrase": word} if word else {} for word in words]
        warn_of_trigger_words([Lora(Contents(PIPELINE, {}, m, ()), ("x",)) for m in of], prompts, unrelated)
        return capsys.readouterr().out.splitlines()

    assert said(["a SKS dog", "a dog"], ["a car"], "sks", None) == []
    without = "warning: no --prompt has the trigger word 'sks' that the LoRA was trained with"
    assert said(["a dog"], [], "sks", "sks") == [without]
    assert said(["a sks dog"], ["a sks car"], "sks") == ["warning: an --unrelated_prompt has the trigger word 'sks'"]
    assert said(["a dog"], ["a car"], None) == []


def test_every_file_is_looked_at_before_a_picture_is_drawn(run, trained, wide, tmp_path):
    """A number that is not finite in the last file, or layers of another UNet, after hours of drawing would be late."""
    tensors = load_file(wide)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {name: tensors[name] / 0}, tmp_path / "nan.safetensors")
    save_file(tensors | {name: torch.ones(8, 7)}, tmp_path / "other.safetensors")
    for bad, why in (("nan", "not a finite number"), ("other", "this UNet wants")):
        with pytest.raises(UserError, match=f"{bad}.safetensors: .*{why}"):
            compare(trained, PROMPTS[0], lora_path=[wide, tmp_path / f"{bad}.safetensors"])
        assert not list((trained / "compare").glob("*.png"))


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_nothing_of_an_earlier_call(trained, monkeypatch):
    """More rows, more prompts, a report, scores: what lies beside the new pictures would be taken for theirs."""
    folder = trained / "compare"
    folder.mkdir()
    ours = ["finetuned-3_0.png", "finetuned-12_10.png", "baseline_7.png", "grid.png"]
    ours += ["report.json", "report.html", "scores.json"]
    foreign = ["finetuned-x_0.png", "finetuned_00.png", "finetuned-1_0.png", "baseline_me.png", "baseline_0.jpg"]
    for name in ours + foreign:
        (folder / name).write_bytes(b"earlier")
    drawn = []

    def stopped(*given):
        drawn.append(sample(*given))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return drawn[-1]

    monkeypatch.setattr("infer.compare.sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(trained, "one", "two", lora_path=trained, num_inference_steps=1)
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {*foreign, "baseline_0.png", "baseline_1.png"}
    assert all((folder / name).read_bytes() == b"earlier" for name in foreign)


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


@pytest.mark.slow
def test_a_weights_file_can_be_named(run, trained):
    earlier = compare(trained, PROMPTS[0], lora_path=run.folder / "lora-000002.safetensors")
    first = pictures(run.folder)
    assert same(earlier["baseline_0.png"], first["baseline_0.png"])
    assert not same(earlier["finetuned_0.png"], first["finetuned_0.png"])
    with pytest.raises(UserError, match="nothing.safetensors: no such file"):
        compare(trained, PROMPTS[0], lora_path="nothing.safetensors")


def test_a_picture_that_is_not_finite_is_not_saved_as_a_black_one(trained):
    advice = "it would be black; try a smaller --lora_scale, or another VAE"
    with pytest.raises(NumbersError, match=f"^LoRA × 1e.30: a picture's numbers are not finite, {advice}"):
        compare(trained, PROMPTS[0], lora_scale=1e30)
    assert not list((trained / "compare").glob("finetuned*"))


def test_a_report_never_tells_of_other_pictures_or_weights(run, trained, monkeypatch):
    """Stopped before its report, infer leaves none of the last time; and what it tells of a file is what it drew."""
    shutil.copytree(run.folder / "compare", trained / "compare")
    monkeypatch.setattr("infer.compare.grid", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(trained, "x", num_inference_steps=1)
    assert (trained / "compare" / "baseline_0.png").exists()
    assert not (trained / "compare" / "report.json").exists() and not (trained / "compare" / "grid.png").exists()
    monkeypatch.undo()

    early, last = ((run.folder / name).read_bytes() for name in ("lora-000002.safetensors", "lora.safetensors"))
    drawn = []
    for replaced_at, weights in ((2, last), (1, early)):  # while the LoRA's row is drawn, or the base's before
        (trained / "lora.safetensors").write_bytes(last)
        calls = []

        def sampled(*given, calls=calls, replaced_at=replaced_at):
            calls.append(1)
            if len(calls) == replaced_at:
                (trained / "lora.safetensors").write_bytes(early)  # another run's export, meanwhile
            return sample(*given)

        monkeypatch.setattr("infer.compare.sample", sampled)
        drawn.append(compare(trained, "x", num_inference_steps=1)["finetuned_0.png"])
        assert report(trained)["lora"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert not same(*drawn)


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
