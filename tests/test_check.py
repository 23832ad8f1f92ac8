"""What can be known before hours are spent, and that it is said in one line that helps."""

import collections
import importlib.metadata
import importlib.util

import pytest
import torch
from conftest import command, here, settings
from test_loop import TRAIN

from data import check
from data.common import setup
from data.common.errors import MachineError, UserError

CUDA = torch.device("cuda")


def test_the_packages_here_are_those_that_were_tested():
    assert {"torch", "diffusers", "bitsandbytes"} <= setup.fits().keys()


VERSIONS = [(None, "diffusers is not installed"), ("0.99", "diffusers is 0.99, tested is >=0.42.1,<0.43")]


@pytest.mark.parametrize("version, message", VERSIONS)
def test_a_package_that_is_missing_or_untested_is_named_with_the_command(version, message, monkeypatch):
    real = importlib.metadata.version

    def lookup(name):
        if name != "diffusers":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", lookup)
    with pytest.raises(UserError, match=f"{message}.*pip install -r requirements.txt -c constraints.txt"):
        setup.fits()


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    """A T4 emulates bf16, at a tenth of the speed."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="--mixed_precision bf16: Tesla T4 has none; use fp16"):
        check.precision("bf16", CUDA)
    check.precision("fp16", CUDA)
    check.precision("bf16", torch.device("cpu"))


def test_eight_bit_adam_without_bitsandbytes_is_refused_before_the_model_is_loaded(fresh, monkeypatch):
    real = importlib.util.find_spec
    find_spec = lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr("train.loop.load_unet", None)
    message = "--use_8bit_adam needs the package bitsandbytes; pip install bitsandbytes, or leave"
    with pytest.raises(UserError, match=message):
        here("train", "--output_dir", fresh, *TRAIN, "--use_8bit_adam")


def test_a_disk_too_small_for_what_a_run_saves_is_said_before_its_first_step(fresh, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    message = r"what the run will save \(states and weights\) needs \d+ MiB in .*, where 1 MiB are free"
    with pytest.raises(MachineError, match=message):
        here("train", "--output_dir", fresh, *TRAIN)
    assert not (fresh / "metrics.jsonl").exists()


def test_what_a_run_will_save_is_at_least_what_it_saved(run, tmp_path, monkeypatch):
    """The estimate against the files of a finished run: states kept and all exports."""
    from safetensors.torch import load

    from train import state

    asked, values = [], settings("train", max_train_steps=6, checkpointing_steps=2)
    monkeypatch.setattr(state, "need_space", lambda folder, needed, what: asked.append(needed))
    length = load(next((run.folder / "state").glob("*.state")).read_bytes()[:-32])["vector"].numel()
    state.need_room(tmp_path, values, length, 0)
    saved = sum(path.stat().st_size for path in [*(run.folder / "state").glob("*"), *run.folder.glob("*.safetensors")])
    assert saved <= asked[0] * 1.5 and asked[0] <= 2.5 * saved  # the small UNet's files are half names
    state.need_room(run.folder, values, length, 4)
    assert asked.pop() < asked[0]  # two of its states are there
    state.need_room(run.folder, values, length, 6)
    assert len(asked) == 1  # a finished run saves nothing


@pytest.mark.slow
def test_the_command_says_what_the_machine_is(tmp_path):
    output = command("data.check", tmp_path / "not" / "there" / "yet")
    for word in ("packages: torch", "GPU: ", "memory: ", "disk: ", f"GiB free for {tmp_path}"):
        assert word in output
    assert not (tmp_path / "not").exists()
