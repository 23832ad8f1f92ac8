"""train --network_weights: a new run starts from the weights in a file."""

import json
import shutil

import pytest
import torch
from conftest import TRAIN, here, inject_filled, lines
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.common.errors import UserError
from lora.files import Origin, export
from train.same_run import AnotherRun

OWN = TRAIN[4:]  # without rank and alpha
STILL = ("--learning_rate", 1e-37, "--max_train_steps", 1)  # a step that moves nothing
FILE = "start.safetensors"


@pytest.fixture
def start(run, tmp_path):
    """The weights of the session's run in a folder of their own: rank 4, alpha 6."""
    shutil.copy(run.folder / "lora.safetensors", tmp_path / FILE)
    return tmp_path / FILE


def train(folder, *words):
    here("train", "--output_dir", folder, *OWN, *words)


def differ(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_starts_from_the_weights_with_the_files_rank_and_alpha(fresh, start, capsys):
    train(fresh, "--network_weights", start, *STILL)
    assert not differ(fresh / "lora.safetensors", start)
    assert f"starts from {start}: rank 4, alpha 6, --lora_layers attn\n" in capsys.readouterr().out
    identity = json.loads((fresh / "run.json").read_text())["identity"]
    assert (identity["rank"], identity["lora_alpha"], len(identity["network_weights"])) == (4, 6, 16)


@pytest.mark.slow
def test_a_file_of_attn_mlp_is_trained_on_as_such(fresh, unet, tmp_path):
    export(inject_filled(unet, 2, 3.0, layers="attn-mlp"), tmp_path / FILE, Origin("x", "x", 64))
    train(fresh, "--network_weights", tmp_path / FILE, *STILL)
    assert not differ(fresh / "lora.safetensors", tmp_path / FILE)
    train(fresh, "--network_weights", tmp_path / FILE, "--restart", "--max_train_steps", 1)
    assert differ(fresh / "lora.safetensors", tmp_path / FILE)  # with a rate that moves them


@pytest.mark.slow
def test_going_on_needs_the_file_no_more_but_it_may_not_be_another(fresh, start, capsys):
    train(fresh, "--network_weights", start, "--max_train_steps", 1)
    moved = start.rename(start.with_name("moved.safetensors"))
    train(fresh, "--network_weights", moved, "--max_train_steps", 2)
    moved.rename(start.with_name("hidden"))
    train(fresh, "--network_weights", moved, "--max_train_steps", 3)
    assert lines(fresh / "metrics.jsonl") == 3 and capsys.readouterr().out.count("starts from") == 1
    save_file(load_file(fresh / "lora.safetensors"), start)
    for words, said in (
        (("--network_weights", start), "begun from other weights"),
        (("--rank", 4, "--lora_alpha", 6), "begun from a file of weights, and none is named here"),
    ):
        with pytest.raises(AnotherRun, match=f"holds another run: {said}$"):
            train(fresh, *words, "--max_train_steps", 4)
    with pytest.raises(UserError, match="moved.safetensors: no such file"):
        train(fresh, "--network_weights", moved, "--restart")
    assert lines(fresh / "metrics.jsonl") == 3


@pytest.mark.parametrize(
    "flag, value, has", [("rank", 5, 4), ("lora_alpha", 4.0, 6.0), ("lora_layers", "attn-mlp", "attn")]
)
def test_a_flag_that_says_something_else_than_the_file_is_refused(flag, value, has, fresh, start):
    with pytest.raises(UserError, match=f"--{flag} {value}: .*{FILE} has {has}; leave the flag out"):
        train(fresh, "--network_weights", start, f"--{flag}={value}")
    assert not (fresh / "run.json").exists()


def test_flags_that_agree_with_the_file_are_no_fault(fresh, start):
    train(fresh, "--network_weights", start, "--rank", 4, "--lora_alpha", 6, "--lora_layers", "attn", *STILL)
    assert not differ(fresh / "lora.safetensors", start)


def test_what_cannot_be_started_from_is_refused_before_anything_is_written(fresh, start, tmp_path):
    wide = {
        n: torch.ones(len(t), 2048) if n.endswith("attn2_to_k.lora_down.weight") else t
        for n, t in load_file(start).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    shutil.copy(start, fresh / "lora.safetensors")
    for path, message in (
        (tmp_path / "nothing", "nothing: no such file"),
        (tmp_path, "a folder; name the .safetensors"),
        (fresh / "cache" / "manifest.json", "not a readable .safetensors"),
        (tmp_path / "wide.safetensors", "a LoRA for text of width 2048, the base here has 128"),
        (fresh / "lora.safetensors", "this run writes files beside it"),
    ):
        with pytest.raises(UserError, match=message):
            train(fresh, "--network_weights", path)
    assert not (fresh / "run.json").exists() and not (fresh / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [2.3, 0.7])
def test_an_alpha_that_fp32_or_fp16_rounds_is_the_same(alpha, fresh, start, tmp_path):
    """Our own export, given with the flag that it was made with."""
    for dtype in (torch.float32, torch.float16):
        tensors = {
            n: torch.tensor(alpha, dtype=dtype) if n.endswith("alpha") else t for n, t in load_file(start).items()
        }
        save_file(tensors, tmp_path / "rounded.safetensors")
        train(fresh, "--network_weights", tmp_path / "rounded.safetensors", "--lora_alpha", alpha, "--restart", *STILL)


@pytest.mark.slow
def test_a_start_from_weights_of_another_prediction_is_said(fresh, start, tmp_path, capsys):
    with safe_open(start, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(start), tmp_path / "v.safetensors", metadata | {"modelspec.prediction_type": "v"})
    train(fresh, "--network_weights", tmp_path / "v.safetensors", *STILL)
    warning = "v.safetensors is of a base that predicts v_prediction, this one epsilon"
    assert warning in capsys.readouterr().out
    train(fresh, "--network_weights", start, "--restart", *STILL)
    assert "predicts v_prediction, this" not in capsys.readouterr().out
