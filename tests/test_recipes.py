"""How to change it: tests/recipes/*.diff are short, fit the code, and do on the toy what they say."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PIPELINE, PRECOMPUTE, ROOT, TRAIN, here, predict, settings, unet_inputs
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load
from test_loop import metrics, vector, weights
from torch import nn

from data.cache import Cache, read_manifest
from lora import files
from train.batches import Batches

RECIPES = {path.stem: path for path in sorted((ROOT / "tests" / "recipes").glob("*.diff"))}
MOST = 15  # changed lines
TOLD_ONCE = ("--train_batch_size", 1, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-12)  # all but the base


def changed_lines(diff):
    return [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[:4] not in ("+++ ", "--- ")]


@pytest.fixture
def fresh(cached, tmp_path):
    """A new run's folder with the pictures' cache, nothing trained."""
    return shutil.copytree(cached, tmp_path / "fresh")


@pytest.fixture
def tree(tmp_path):
    """tree(recipe) -> a copy of the code, without its .git and its pictures, that the recipe's diff was applied to."""

    def copy(name):
        folder = tmp_path / "tree"
        for part in ("data", "infer", "lora", "train"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("pipeline", "training", "*.webp"))
        for part in ("Makefile", "ruff.toml", "requirements.txt", "constraints.txt"):
            shutil.copy(ROOT / part, folder)
        # inside of another repository git would look for the files from that one's root on, and say nothing
        apart = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        subprocess.run(["git", "apply", RECIPES[name]], cwd=folder, env=apart, check=True)
        return folder

    return copy


def train(tree, *runs):
    """Call python -m train in the tree, once for each list of flags, in one process. -> what it printed"""
    code = "import json, sys; from train.__main__ import main; [main(argv) for argv in json.loads(sys.argv[1])]"
    argv = [[str(word) for word in ("--output_dir", folder, *TRAIN, *flags)] for folder, *flags in runs]
    return said(tree, sys.executable, "-c", code, json.dumps(argv))


def said(tree, *words):
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def load_weights(folder):
    return load((folder / "lora.safetensors").read_bytes())


def first_losses(folder, unet, steps):
    """The losses of a run that learns nothing, by diffusers' own UNet and scheduler, and the timesteps."""
    scheduler, losses, timesteps = DDPMScheduler.from_pretrained(PIPELINE / "scheduler"), [], []
    once = dict(gradient_accumulation_steps=1, proportion_empty_prompts=0.2)
    batches = Batches(Cache(folder / "cache"), settings("train", **once), 1000)
    for step in range(steps):
        b = batches.draw(step, 0)
        condition = dict(text_embeds=b["pooled"].float(), time_ids=b["time_ids"])
        xt = scheduler.add_noise(b["x0"], b["eps"], b["t"])
        predicted = unet(xt, b["t"], b["text"].float(), added_cond_kwargs=condition).sample
        losses.append(nn.functional.mse_loss(predicted, b["eps"]).item())
        timesteps.append(b["t"].item())
    return losses, timesteps


# ---- The diffs


def test_there_are_five_of_fifteen_lines():
    assert RECIPES.keys() == {"base", "layers", "loss", "optimizer", "preset"}
    for name, path in RECIPES.items():
        diff = path.read_text()
        assert 0 < len(changed_lines(diff)) <= MOST, name
        assert "tests/" not in diff and "README" not in diff, name  # what a recipe changes is the program


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_the_code_as_it_is_and_leaves_it_tidy(name, tree):
    """git apply refuses a hunk whose surroundings have changed; the formatter and the linter have nothing to say."""
    folder = tree(name)
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "-q", "."], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "-q", "."], cwd=folder, check=True)
    changed = [line[6:] for line in RECIPES[name].read_text().splitlines() if line.startswith("+++ b/")]
    for path in changed:
        before = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        assert (folder / path).read_text() != before, path


# ---- What they do


@pytest.mark.slow
def test_layers_trains_two_blocks_and_nothing_else(tree, fresh, unet):
    """B-LoRA's: the attention of up_blocks.0.attentions.0 and .1, and the unchanged program loads the file."""
    train(tree("layers"), (fresh, "--lora_layers", "b-lora", "--max_train_steps", 2))
    found = {name.rsplit(".lora_")[0]: tensor for name, tensor in load_weights(fresh).items() if "lora_up" in name}
    blocks = ("up_blocks.0.attentions.0.", "up_blocks.0.attentions.1.")
    last = ("to_q", "to_k", "to_v", "to_out.0")
    wanted = [name for name, _ in unet.named_modules() if name.startswith(blocks) and name.endswith(last)]
    names = [name.replace("up_blocks.0.attentions.", "output_blocks.").replace(".", "_") for name in wanted]
    assert found.keys() == {f"lora_unet_{name[:15]}_1{name[15:]}" for name in names} and len(found) == 16
    assert all(B.any() for B in found.values())  # and every one of them has learned
    base = predict(unet, unet_inputs())
    files.load(unet, files.read(fresh / "lora.safetensors"))
    assert (predict(unet, unet_inputs()) - base).abs().max() > 1e-4


@pytest.mark.slow
def test_optimizer_is_lion_and_goes_on_bit_for_bit(tree, fresh, tmp_path):
    """Each weight moves by the learning rate itself, which AdamW's does not; what is kept has no second moment."""
    straight = tmp_path / "straight"
    shutil.copytree(fresh / "cache", straight / "cache")
    lion = ("--use_8bit_lion", "--checkpointing_steps", 1, "--learning_rate", 1e-3, "--max_train_steps")
    train(tree("optimizer"), (straight, *lion, 4), (fresh, *lion, 2), (fresh, *lion, 4))
    assert weights(fresh) == weights(straight) and torch.equal(vector(fresh, 4), vector(straight, 4))
    kept = load((fresh / "state" / "000004.state").read_bytes()[:-32])
    assert kept.keys() == {"vector", *(f"optimizer.{name}" for name in ("state1", "qmap1", "absmax1"))}
    assert kept["optimizer.state1"].dtype == torch.uint8
    moved = vector(fresh, 4) - vector(fresh, 3) * (1 - 1e-3 * 1e-2)  # without the decay
    assert ((moved.abs() - 1e-3).abs() < 1e-7).double().mean() > 0.8  # all but the padding, which stays zero
    assert ((moved.abs() < 1e-7) | ((moved.abs() - 1e-3).abs() < 1e-7)).all()


@pytest.mark.slow
def test_loss_weighs_every_step_by_its_noise(tree, fresh, unet):
    """1 / √snr of the step's timestep, by diffusers' scheduler, in the loss and in the gradient."""
    plain = fresh.with_name("plain")
    shutil.copytree(fresh / "cache", plain / "cache")
    here("train", "--output_dir", plain, *TRAIN, *TOLD_ONCE)
    train(tree("loss"), (fresh, *TOLD_ONCE, "--debiased_estimation_loss"))
    losses, timesteps = first_losses(fresh, unet, len(metrics(fresh)))
    alpha_bar = DDPMScheduler.from_pretrained(PIPELINE / "scheduler").alphas_cumprod
    factors = [math.sqrt((1 - alpha_bar[t].item()) / alpha_bar[t].item()) for t in timesteps]
    assert max(factors) > 2 * min(factors)
    for ours, theirs, loss, factor in zip(metrics(fresh), metrics(plain), losses, factors, strict=True):
        assert ours["loss"] == pytest.approx(factor * loss, rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(factor * theirs["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_preset_is_taken_by_make(tree, pictures, tmp_path):
    """The file as it is, with the toy in the place of SDXL, and photographs without captions."""
    photos, run, folder = tmp_path / "my photos", tmp_path / "run", tree("preset")
    shutil.copytree(pictures, photos, ignore=shutil.ignore_patterns("*.jsonl"))
    toy = f"SDXL={' '.join(map(str, PRECOMPUTE))}"
    words = [f"PICTURES={photos}", "WORD=ohwx woman", f"RUN={run}", f"PYTHON={sys.executable}", toy]
    make = ("make", "-s", "PRESET=person.mk", *words)
    said(folder, *make, "precompute")
    manifest = read_manifest(run / "cache")
    assert manifest["instance_prompt"] == "ohwx woman" and manifest["held_out"] == 1
    said(folder, *make, "train", "ARGS=--mixed_precision no --max_train_steps 2")
    flags = json.loads((run / "run.json").read_text())["identity"]
    wanted = dict(rank=16, lora_layers="attn-mlp", snr_gamma=5, lr_scheduler="cosine", use_8bit_adam=True)
    assert {name: flags[name] for name in wanted} == wanted
    with safe_open(run / "lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "ohwx woman" and file.metadata()["ss_network_dim"] == "16"
        assert any("ff_net_2" in name for name in load_weights(run))
    compared = said(folder, *make, "-n", "compare")
    assert '--prompt "$WORD on a horse" "a drawing of $WORD" --unrelated_prompt' in compared
    assert "--num_train_epochs 100" in said(folder, *make, "-n", "train")


@pytest.mark.slow
def test_base_is_held_in_eight_bits(tree, fresh, unet):
    """The losses are those of a UNet whose transformers' weights were rounded by looking every number up."""
    train(tree("base"), (fresh, *TOLD_ONCE, "--base_precision", "fp8"))
    found = [line["loss"] for line in metrics(fresh)]
    plain, _ = first_losses(fresh, unet, len(found))
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and ".attentions." in name:
            layer.weight.data = rounded(layer.weight.data)
    wanted, _ = first_losses(fresh, unet, len(found))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert max(abs(a / b - 1) for a, b in zip(found, plain)) > 1e-3
    with safe_open(fresh / "lora.safetensors", "pt") as file:
        assert file.metadata()["barelora_base_precision"] == "fp8"


def rounded(weight):
    """Every number of (out, in) as the nearest of e4m3's 253, where the largest of each row is 448."""
    positive = [e4m3(exponent, mantissa) for exponent in range(16) for mantissa in range(8)][:-1]  # the last is NaN
    values = torch.tensor([*positive, *(-value for value in positive)]).unique()  # sorted
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    wanted = weight / scale
    right = torch.searchsorted(values, wanted).clamp(1, len(values) - 1)
    down, up = wanted - values[right - 1], values[right] - wanted
    return values[right - ((down < up) | (down == up) & (right % 2 == 1)).long()] * scale  # a tie to the even mantissa


def e4m3(exponent, mantissa):
    return 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
