"""What can be known before hours are spent, and that it is said in one line that helps."""

import collections
import importlib.metadata
import importlib.util
import warnings

import pytest
import torch
from conftest import PIPELINE, PRECOMPUTE, SDXL, command, here, settings
from test_loop import TRAIN

import infer.compare  # noqa: F401 - before torch tells of a GPU, which the libraries would ask as they are imported
import train.loop  # noqa: F401
from data import check
from data.common import setup
from data.common.errors import MachineError, UserError
from data.models.files import Model

CUDA = torch.device("cuda")
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]  # torch 2.11 for CUDA 12.8, about


def gpu(monkeypatch, name, capability, gib=16, built=BUILT):
    """From here on torch tells of such a GPU."""
    told = dict(is_available=lambda: True, get_device_capability=lambda *_: capability, get_arch_list=lambda: built)
    told |= dict(get_device_name=lambda *_: name, mem_get_info=lambda *_: (gib * 2**29, gib * 2**30))
    for function, answer in told.items():
        monkeypatch.setattr(torch.cuda, function, answer)


def test_the_packages_here_are_those_that_were_tested():
    assert {"torch", "diffusers", "bitsandbytes"} <= setup.fits().keys()


VERSIONS = [(None, "diffusers is not installed"), ("0.99", "diffusers is 0.99, tested is >=0.42.1,<0.43")]


@pytest.mark.parametrize("version, message", VERSIONS)
def test_a_package_that_is_missing_or_untested_is_named_with_the_command(version, message, monkeypatch):
    monkeypatch.setattr("sys.prefix", "/usr")
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
    monkeypatch.setattr("sys.prefix", "/somewhere/.venv")  # which make has built
    with pytest.raises(UserError, match=f"{message}.*make clean, then make again"):
        setup.fits()


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    """A T4 emulates bf16, at a tenth of the speed."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    gpu(monkeypatch, "Tesla T4", (7, 5))
    with pytest.raises(UserError, match="--mixed_precision bf16: Tesla T4 has none; use fp16"):
        check.precision("bf16", CUDA)
    check.precision("fp16", CUDA)
    check.precision("bf16", torch.device("cpu"))


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (8, 0), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_a_gpu_that_this_torch_runs_on_is_taken(capability, monkeypatch):
    gpu(monkeypatch, "some GPU", capability)
    assert check.device() == CUDA


def test_a_gpu_of_another_maker_is_not_measured_by_nvidias_numbers(monkeypatch):
    gpu(monkeypatch, "MI300X", (9, 4), built=["gfx90a", "gfx942"])
    assert check.device() == CUDA


@pytest.mark.parametrize("name, capability", [("Tesla P100-PCIE-16GB", (6, 0)), ("Tesla V100", (7, 0))])
def test_a_gpu_too_old_for_this_torch_is_said_with_what_to_choose(name, capability, monkeypatch):
    """Kaggle offers a P100, on which the first kernel would fail after all downloads."""
    gpu(monkeypatch, name, capability)
    older = rf"{name} \(sm_{capability[0]}0\) is too old for this torch .*sm_75, .*T4 x2 .*CUDA_VISIBLE_DEVICES=-1"
    with pytest.raises(MachineError, match=older):
        check.device()
    gpu(monkeypatch, name, capability, built=["sm_60", "sm_70"])
    assert check.device() == CUDA


def test_a_gpu_too_new_for_this_torch_is_told_another_torch(monkeypatch):
    gpu(monkeypatch, "RTX 5090", (12, 0), built=["sm_80", "sm_90"])
    with pytest.raises(MachineError, match=r"RTX 5090 \(sm_120\) is too new .* install a newer torch"):
        check.device()


OLD_DRIVER = (  # torch's own words, c10/cuda/CUDAFunctions.cpp
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


def no_gpu(monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn(words, stacklevel=2))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_driver_older_than_torchs_cuda_is_no_silent_month_on_the_cpu(monkeypatch, capsys):
    no_gpu(monkeypatch, OLD_DRIVER)
    with pytest.raises(MachineError, match=r"driver is too old .* CUDA 11\.4, torch needs 12\.8; update the driver,"):
        check.device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # as the message says
    assert check.device().type == "cpu"
    assert capsys.readouterr().err == "no GPU here: the CPU computes\n"


def test_what_else_torch_says_of_a_driver_is_passed_on(monkeypatch):
    no_gpu(monkeypatch, "CUDA initialization: CUDA unknown error")
    with pytest.warns(match="CUDA unknown error"):
        assert check.device().type == "cpu"


def test_a_gpu_without_fp16_is_refused(monkeypatch):
    gpu(monkeypatch, "GTX 980", (5, 2))
    with pytest.raises(UserError, match="--mixed_precision fp16: GTX 980 has none; use no, or"):
        check.precision("fp16", CUDA)
    check.precision("no", CUDA)
    gpu(monkeypatch, "Tesla P100", (6, 0))
    check.precision("fp16", CUDA)


@pytest.mark.slow
def test_a_gpu_that_cannot_hold_the_unet_is_refused_by_its_config_alone(monkeypatch):
    gpu(monkeypatch, "GTX 1650", (7, 5), gib=4)
    with pytest.raises(MachineError, match="GTX 1650 has 4.0 GiB, and the UNet's weights alone take 4.8 in float16"):
        check.gpu_memory(SDXL, torch.float16, CUDA, "plain")
    check.gpu_memory(SDXL, torch.float16, torch.device("cpu"), "plain")
    gpu(monkeypatch, "Tesla T4", (7, 5), gib=6)
    check.gpu_memory(SDXL, torch.float16, CUDA, "plain")
    with pytest.raises(MachineError, match="weights alone take 9.6 in float32"):
        check.gpu_memory(SDXL, torch.float32, CUDA, "plain")
    check.gpu_memory(Model(str(PIPELINE)).unet_config(), torch.float32, CUDA, "plain")  # the toy fits


@pytest.mark.parametrize("command", ["data.precompute", "train", "infer"])
def test_a_gpu_that_cannot_be_used_is_said_before_anything_is_downloaded(command, run, fresh, tmp_path, monkeypatch):
    """The model and the pictures are on the hub, which is not asked for a byte of pictures or weights."""
    gpu(monkeypatch, "Tesla P100", (6, 0))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    for place in ("data.precompute.open_examples", "train.loop.load_unet", "infer.compare.load"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("downloads"))
    flags = {
        "data.precompute": ("--output_dir", tmp_path / "new", "--dataset_name", "some/pictures", *PRECOMPUTE),
        "train": ("--output_dir", fresh, *TRAIN),
        "infer": ("--output_dir", run.folder, "--prompt", "a fox"),
    }
    with pytest.raises(MachineError, match="Tesla P100 .* is too old for this torch"):
        here(command, *flags[command])


@pytest.mark.slow
def test_eight_bit_adam_without_bitsandbytes_is_torchs_and_no_run_goes_on_as_the_other(fresh, monkeypatch, capsys):
    """The state of one cannot be read by the other, in both directions."""
    flags, real = ("--output_dir", fresh, *TRAIN, "--use_8bit_adam", "--max_train_steps"), importlib.util.find_spec
    here("train", *flags, 1)
    assert "bitsandbytes" not in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name, *a: name != "bitsandbytes" and real(name, *a) or None)
        with pytest.raises(UserError, match="holds another run: use_8bit_adam True there, False here"):
            here("train", *flags, 2)
        assert "--use_8bit_adam: the package bitsandbytes is not installed; torch's AdamW" in capsys.readouterr().out
        here("train", *flags, 2, "--restart")
        assert capsys.readouterr().out.count("bitsandbytes") == 1
        here("train", *flags, 3)
    with pytest.raises(UserError, match="holds another run: use_8bit_adam False there, True here"):
        here("train", *flags, 4)
    here("train", *[word for word in flags if word != "--use_8bit_adam"], 4)


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
    state.need_room(tmp_path, values, length, 0, best=False)
    saved = sum(path.stat().st_size for path in [*(run.folder / "state").glob("*"), *run.folder.glob("*.safetensors")])
    assert saved <= asked[0] * 1.5 and asked[0] <= 2.5 * saved  # the small UNet's files are half names
    state.need_room(run.folder, values, length, 4, best=False)
    assert asked.pop() < asked[0]  # two of its states are there
    state.need_room(run.folder, values, length, 6, best=False)
    assert len(asked) == 1  # a finished run saves nothing


@pytest.mark.slow
def test_the_command_says_what_the_machine_is(tmp_path):
    output = command("data.check", tmp_path / "not" / "there" / "yet")
    for word in ("packages: torch", "GPU: ", "memory: ", "disk: ", f"GiB free for {tmp_path}"):
        assert word in output
    assert not (tmp_path / "not").exists()
