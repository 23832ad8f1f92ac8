"""How to change it: tests/recipes/*.diff are short, fit the code, and do on the toy what they say."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PIPELINE, PRECOMPUTE, ROOT, STEPS, TRAIN, predict, settings, unet_inputs
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load
from test_loop import metrics, vector, weights
from torch import nn

from data.cache import Cache, read_manifest
from lora import files
from lora.inject import inject
from train.batches import Batches

RECIPES = {path.stem: path for path in sorted((ROOT / "tests" / "recipes").glob("*.diff"))}
MOST = 15  # changed lines
# At such a rate every step's loss is that of the base.
LEARNS_NOTHING = ("--train_batch_size", 1, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-12)


def changed_lines(diff):
    return [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[:4] not in ("+++ ", "--- ")]


@pytest.fixture
def fresh(cached, tmp_path):
    """A new run's folder with the pictures' cache, nothing trained."""
    return shutil.copytree(cached, tmp_path / "fresh")


@pytest.fixture
def tree(tmp_path):
    """tree(recipe, …) -> a copy of the code, without its .git and its pictures, that the diffs were applied to."""

    def copy(*names):
        folder = tmp_path / "tree"
        for part in ("data", "infer", "lora", "train"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("pipeline", "training", "*.webp"))
        for part in ("Makefile", "README.md", "ruff.toml", "requirements.txt", "constraints.txt"):
            shutil.copy(ROOT / part, folder)
        # inside of another repository git would look for the files from that one's root on, and say nothing
        apart = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        for name in names:
            subprocess.run(["git", "apply", RECIPES[name]], cwd=folder, env=apart, check=True)
        return folder

    return copy


def train(tree, *runs):
    """Call the tree's train for each (folder, flags) in turn, in one process that imports once. -> what it printed"""
    code = "import json, sys; from train.__main__ import main; [main(argv) for argv in json.loads(sys.argv[1])]"
    argv = [[str(word) for word in ("--output_dir", folder, *TRAIN, *flags)] for folder, *flags in runs]
    return said(tree, sys.executable, "-c", code, json.dumps(argv))


def said(tree, *words):
    """Run a command on the CPU, where the same command gives the same bits. -> what it printed"""
    cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, env=cpu)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def load_weights(folder):
    return load((folder / "lora.safetensors").read_bytes())


def first_steps(folder, unet):
    """(timestep, loss) of every step of a run that learns nothing, by diffusers' UNet and scheduler."""
    scheduler, values = DDPMScheduler.from_pretrained(PIPELINE / "scheduler"), dict(proportion_empty_prompts=0.2)
    batches = Batches(Cache(folder / "cache"), settings("train", gradient_accumulation_steps=1, **values), 1000)
    for step in range(STEPS):
        b = batches.draw(step, 0)
        condition = dict(text_embeds=b["pooled"].float(), time_ids=b["time_ids"])
        xt = scheduler.add_noise(b["x0"], b["eps"], b["t"])
        predicted = unet(xt, b["t"], b["text"].float(), added_cond_kwargs=condition).sample
        yield b["t"].item(), nn.functional.mse_loss(predicted, b["eps"])


# ---- The diffs


def test_there_are_five_of_fifteen_lines():
    assert RECIPES.keys() == {"base", "layers", "loss", "optimizer", "preset"}
    for name, path in RECIPES.items():
        diff = path.read_text()
        assert 0 < len(changed_lines(diff)) <= MOST, name
        assert ("b/README.md" in diff) == ("b/data/common/flags.py" in diff), name  # whose tables have every flag


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_the_code_as_it_is(name, tree):
    """git apply refuses a hunk whose surroundings have changed, and says nothing of one that it did not look at."""
    folder = tree(name)
    for path in re.findall(r"^\+\+\+ b/(.+)", RECIPES[name].read_text(), re.M):
        assert not (ROOT / path).exists() or (folder / path).read_text() != (ROOT / path).read_text(), path


@pytest.mark.parametrize("name", RECIPES)
def test_it_leaves_the_code_tidy(name, tree):
    """What `make lint` asks of everybody."""
    pytest.importorskip("ruff")
    folder = tree(name)
    for check in (("check",), ("format", "--check")):
        said(folder, sys.executable, "-m", "ruff", *check, "--no-cache", "-q", ".")


@pytest.mark.parametrize("names", [list(RECIPES), list(reversed(RECIPES))], ids=["forth", "back"])
def test_one_fits_after_the_others(names, tree):
    """So whoever wants two of them can have both, whichever comes first."""
    tree(*names)


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
    train(tree("loss"), (fresh, *LEARNS_NOTHING, "--debiased_estimation_loss"))
    alpha_bar = DDPMScheduler.from_pretrained(PIPELINE / "scheduler").alphas_cumprod
    adapters, factors = inject(unet, 4, 6.0, seed=42), []
    for told, (t, loss) in zip(metrics(fresh), first_steps(fresh, unet), strict=True):
        factors.append(((1 - alpha_bar[t]) / alpha_bar[t]).sqrt().item())
        gradients = torch.autograd.grad(factors[-1] * loss, adapters.parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        assert told["loss"] == pytest.approx(factors[-1] * loss.item(), rel=1e-4)
        assert told["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert min(abs(math.log(factor)) for factor in factors) > 0.01 and max(factors) > 2 * min(factors)


@pytest.mark.slow
def test_preset_is_taken_by_make(tree, pictures, tmp_path):
    """The file as it is, with the toy in the place of SDXL, and photographs without captions."""
    photos, run, folder = tmp_path / "my photos", tmp_path / "run", tree("preset")
    shutil.copytree(pictures, photos, ignore=shutil.ignore_patterns("*.jsonl"))
    toy = f"SDXL={' '.join(map(str, PRECOMPUTE))}"
    words = [f"PICTURES={photos}", f"RUN={run}", f"PYTHON={sys.executable}", toy]
    make = ("make", "-s", "PRESET=person.mk", *words)
    said(folder, *make, "precompute")
    manifest = read_manifest(run / "cache")
    assert manifest["instance_prompt"] == "ohwx person" and manifest["held_out"] == 1
    said(folder, *make, "train", "ARGS=--mixed_precision no --max_train_steps 2")
    flags = json.loads((run / "run.json").read_text())["identity"]
    wanted = dict(rank=16, lora_layers="attn-mlp", snr_gamma=5, lr_scheduler="cosine", use_8bit_adam=True)
    assert {name: flags[name] for name in wanted} == wanted
    with safe_open(run / "lora.safetensors", "pt") as file:
        assert (
            file.metadata()["modelspec.trigger_phrase"] == "ohwx person" and file.metadata()["ss_network_dim"] == "16"
        )
        assert any("ff_net_2" in name for name in load_weights(run))
    compared = said(folder, *make, "-n", "compare")
    assert '--prompt "$WORD on a horse" "a drawing of $WORD" --unrelated_prompt' in compared
    assert "--num_train_epochs 100" in said(folder, *make, "-n", "train")


@pytest.mark.slow
def test_base_is_held_in_eight_bits(tree, fresh, unet):
    """The losses are those of a UNet whose transformers' weights were rounded by looking every number up."""
    train(tree("base"), (fresh, *LEARNS_NOTHING, "--base_precision", "fp8"))
    found = [line["loss"] for line in metrics(fresh)]
    plain = [loss.item() for _, loss in first_steps(fresh, unet)]
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and ".attentions." in name:
            layer.weight.data = rounded(layer.weight.data)
    wanted = [loss.item() for _, loss in first_steps(fresh, unet)]
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
