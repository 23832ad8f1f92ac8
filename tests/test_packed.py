"""A base in 4 bits: the layers are bitsandbytes' own, the run keeps it, and it is taken where nothing else fits."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from conftest import PIPELINE, SDXL, TRAIN, here, inject_filled, predict, settings, unet_inputs
from safetensors import safe_open
from test_graph import trained
from test_loop import vector
from torch import nn

from data import check
from data.common.errors import MachineError, UserError
from data.common.flags import BASES
from data.models.files import Model
from data.models.packed import FORMATS, PackedLinear, bytes_of, layers, pack
from lora.attention import fuse_projections
from lora.inject import targets
from lora.linear import LoRALinear
from train import plan, precision

bitsandbytes = pytest.importorskip("bitsandbytes")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SHAPES = [(2, 4, 128, 128)]
NF4 = FORMATS["nf4"]


def linear(inside=128, out=192, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inside, out).to(dtype).requires_grad_(False)


def unpacked(layer):
    """A plain layer with the weight that a packed one has."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
    return plain


# ---- The layer


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)])
def test_output_and_gradient_are_those_of_bitsandbytes_own_layer(dtype, tolerance, device):
    """The packed numbers to the bit; on a GPU its product of few rows adds in another order."""
    plain = linear(dtype=dtype)
    theirs = bitsandbytes.nn.Linear4bit(128, 192, quant_type="nf4", compress_statistics=False, compute_dtype=dtype)
    theirs.load_state_dict(plain.state_dict())
    ours, theirs = PackedLinear(plain, device, NF4).to(device), theirs.to(device)
    assert torch.equal(ours.packed, theirs.weight.data) and torch.equal(ours.scales, theirs.weight.quant_state.absmax)
    x = torch.randn(3, 5, 128, dtype=dtype, device=device)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(a) for layer, a in zip((ours, theirs), inputs)]
    for y in outputs:
        (y * outputs[0].detach().sin()).sum().backward()
    for found, wanted in (outputs, [a.grad for a in inputs]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
    off = (ours.weight - plain.weight.to(device)).float().norm() / plain.weight.float().norm()
    assert 0.05 < off < 0.15  # in 4 bits, indeed


def test_rows_side_by_side_are_packed_as_each_alone():
    """q, k and v share no scale, because 64 neighbours never span two of them."""
    parts = [linear(seed=seed) for seed in range(3)]
    together = linear(out=3 * 192)
    together.weight.copy_(torch.cat([part.weight for part in parts]))
    alone = [PackedLinear(part, CPU, NF4) for part in parts]
    assert torch.equal(PackedLinear(together, CPU, NF4).packed, torch.cat([part.packed for part in alone]))
    assert torch.equal(PackedLinear(together, CPU, NF4).weight, torch.cat([part.weight for part in alone]))


def test_nothing_unpacked_is_kept_for_the_backward():
    """Kept by every layer, the unpacked weights would take more memory than the plain ones."""
    kept, layer = [], PackedLinear(linear(), CPU, NF4)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(torch.randn(4, 128, requires_grad=True))
    assert y.requires_grad and not kept
    assert {name: part.dtype for name, part in layer.named_buffers()} == dict(packed=torch.uint8, scales=torch.float32)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("parts", [1, 3])
def test_the_update_beside_a_packed_layer_is_that_beside_a_plain_one(parts):
    """Output and all gradients of LoRALinear: what it adds in place must be memory of its own."""
    base = PackedLinear(linear(), CPU, NF4)
    g = torch.Generator().manual_seed(1)
    ours = LoRALinear(base, 4, 6.0, g, parts)
    theirs = copy.deepcopy(ours)
    theirs.base = unpacked(base)
    for layer in (ours, theirs):
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(2, 5, 128, generator=g)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(a) for layer, a in zip((ours, theirs), inputs)]
    for y in outputs:
        (y * y.detach().sin()).sum().backward()
    assert torch.equal(*outputs) and torch.equal(*(a.grad for a in inputs))
    assert torch.equal(ours.A.grad, theirs.A.grad) and torch.equal(ours.B.grad, theirs.B.grad)
    assert ours.A.dtype == torch.float32  # the weight's, not that of what it is packed in


# ---- The UNet


def test_the_flag_offers_these_formats():
    assert ("plain", *FORMATS) == BASES


def test_the_transformers_linear_layers_are_packed_and_nothing_else(unet):
    fuse_projections(unet)
    plain, names = copy.deepcopy(unet), {name for name, _ in layers(unet)}
    adapted = {name for name, _, _ in targets(unet, "attn-mlp")}
    before = bytes_of(unet, torch.float32, "nf4")
    pack(unet, CPU, "nf4")
    found = {name for name, module in unet.named_modules() if isinstance(module, PackedLinear)}
    assert found == names and len(adapted) > len(found) > 0  # three projections in one layer
    others = {name: part for name, part in unet.named_parameters() if not name.endswith(".bias")}
    assert not any(".attentions." in f".{name}" and "norm" not in name for name in others)
    assert {"conv_in.weight", "time_embedding.linear_1.weight", "add_embedding.linear_1.weight"} <= others.keys()
    held = sum(part.nbytes for part in (*unet.parameters(), *unet.buffers()))
    assert held == before < 0.7 * bytes_of(plain, torch.float32, "plain")
    for name in names:  # the same UNet with the unpacked weights is the judge
        plain.set_submodule(name, unpacked(unet.get_submodule(name)))
    assert torch.equal(predict(unet, unet_inputs()), predict(plain, unet_inputs()))
    assert torch.equal(*(predict(inject_filled(model) and model, unet_inputs()) for model in (unet, plain)))


# ---- The run


def train(folder, *flags):
    here("train", "--output_dir", folder, *TRAIN, *flags)


@pytest.fixture(scope="module")
def in_4_bits(cached, tmp_path_factory):
    """A run of four steps on a base in NF4."""
    folder = tmp_path_factory.mktemp("packed") / "run"
    shutil.copytree(cached, folder)
    train(folder, "--max_train_steps", 4, "--base_precision", "nf4")
    return folder


def identity(folder):
    return json.loads((folder / "run.json").read_text())["identity"]


def test_a_run_keeps_its_base_and_goes_on_bit_for_bit(cached, in_4_bits, tmp_path):
    """Stopped in the middle and called again without the flag, which the run knows."""
    folder = tmp_path / "run"
    shutil.copytree(cached, folder)
    train(folder, "--max_train_steps", 2, "--base_precision", "nf4")
    with pytest.raises(UserError, match="holds another run: base_precision nf4 there, plain here"):
        train(folder, "--max_train_steps", 4, "--base_precision", "plain")
    train(folder, "--max_train_steps", 4)
    assert identity(folder)["base_precision"] == "nf4"
    assert torch.equal(vector(folder, 4), vector(in_4_bits, 4))


def test_what_is_learned_differs_and_the_file_says_on_what(run, in_4_bits):
    with (
        safe_open(in_4_bits / "lora.safetensors", "pt") as ours,
        safe_open(run.folder / "lora.safetensors", "pt") as of,
    ):
        assert ours.metadata()["barelora_base_precision"] == "nf4" and ours.keys() == of.keys()
        assert ours.metadata().keys() - of.metadata().keys() == {"barelora_base_precision"}
    assert not torch.equal(vector(in_4_bits, 4), vector(run.folder, 4))


def test_a_run_from_before_there_was_a_choice_is_a_plain_one(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    began = json.loads((folder / "run.json").read_text())
    assert began["identity"].pop("base_precision") == "plain"
    (folder / "run.json").write_text(json.dumps(began))
    with pytest.raises(UserError, match="holds another run: base_precision plain there, nf4 here"):
        train(folder, "--base_precision", "nf4")
    train(folder)
    train(folder, "--base_precision", "plain")


def test_without_its_package_nf4_is_refused_in_one_line(cached, in_4_bits, tmp_path, monkeypatch):
    """Asked for, or known from the run that would go on."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name != "bitsandbytes" and real(name, *a) or None)
    for folder, flags in ((tmp_path, ["--base_precision", "nf4"]), (in_4_bits, [])):
        shutil.copytree(cached / "cache", folder / "cache", dirs_exist_ok=True)
        with pytest.raises(
            UserError, match="--base_precision nf4: the package bitsandbytes is not installed"
        ) as refused:
            train(folder, "--max_train_steps", 5, *flags)
        assert refused.value.code == 2


# ---- The decision


def memory(monkeypatch, total, held, reserved=0):
    """A GPU of `total` GiB, of which CUDA and other programs hold `held` and PyTorch's allocator `reserved`."""
    free = int((total - held - reserved) * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, total * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: reserved * 2**30)


def test_the_budget_counts_what_is_held_beside_the_allocator(monkeypatch):
    gib = 2**30
    memory(monkeypatch, 80, 0.5, reserved=3)
    assert check.room(8, GPU, gib // 4) == (7.25 * gib, 0.75 * gib)
    assert check.room(None, GPU, gib // 4) == (79.25 * gib, 0.75 * gib)
    memory(monkeypatch, 8, 0.875)  # a desktop and CUDA: never more than is free
    assert check.room(8, GPU, 0) == (7.125 * gib, 0.875 * gib) and check.room(24, GPU, 0)[0] == 7.125 * gib
    memory(monkeypatch, 80, 40)  # somebody else's training is no part of ours
    there, beside = check.room(8, GPU, 0)
    assert there + beside == 8 * gib and beside == check.CUDA
    assert sum(check.room(4, GPU, gib)) == 4 * gib


@pytest.mark.slow
def test_the_estimate_is_of_what_there_is_to_hold():
    """Each part by itself, against numbers that are counted elsewhere."""
    base = dict(rank=32, use_8bit_adam=True, train_batch_size=1)

    def least(base_precision="plain", shapes=SHAPES, dtype=torch.float16, **other):
        return precision.least(settings("train", **base | other), SDXL, shapes, dtype, base_precision)

    plain, weights = least(), 2 * 2_567_463_684
    assert plain - least("nf4") == 2 * 2_207_744_000 - 2_207_744_000 // 2 - 2_207_744_000 // 64 * 4
    assert least(rank=64) - plain == 32 * 1_451_520 * (4 + 4 + 2 + 2 + 2 + 2)
    assert least(use_8bit_adam=False) - plain == 32 * 1_451_520 * 6
    a_picture = least(train_batch_size=2) - plain
    assert least(shapes=[(2, 4, 64, 256), (2, 4, 128, 256)]) - plain == a_picture  # the largest bucket counts
    assert plain == weights + 32 * 1_451_520 * 16 + a_picture + precision.WORKSPACES + plan.UNUSED
    assert 0.3 * 2**30 < a_picture < 0.7 * 2**30


@pytest.mark.parametrize("vram_gib, wanted", [(None, "plain"), (24, "plain"), (8, "plain"), (6, "nf4"), (2, "nf4")])
@pytest.mark.slow
def test_nf4_is_taken_where_the_plain_base_does_not_fit(vram_gib, wanted, monkeypatch, capsys):
    memory(monkeypatch, 80, 0.5)
    values = settings("train", vram_gib=vram_gib, use_8bit_adam=True)
    assert precision.of_the_base(values, SDXL, SHAPES, torch.float16, GPU) == wanted
    said = capsys.readouterr().out
    assert ("--base_precision nf4" in said) == (wanted == "nf4") and said.count("\n") == len(said.splitlines()) < 2
    for flag in ("plain", "nf4"):
        values = settings("train", vram_gib=vram_gib, base_precision=flag)
        assert precision.of_the_base(values, SDXL, SHAPES, torch.float16, GPU) == flag
    assert precision.of_the_base(settings("train", vram_gib=2), SDXL, SHAPES, torch.float16, CPU) == "plain"


def test_a_small_card_holds_the_packed_base(monkeypatch):
    memory(monkeypatch, 4, 0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX 1650")
    check.gpu_memory(SDXL, torch.float16, GPU, "nf4")
    memory(monkeypatch, 1, 0.5)
    with pytest.raises(MachineError, match=r"GTX 1650 has 1.0 GiB, and the UNet's weights alone take 1\.8 in nf4"):
        check.gpu_memory(SDXL, torch.float16, GPU, "nf4")


# ---- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "no"])
def test_graph_eager_and_recomputed_train_the_same_on_a_packed_base(cached, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ways = {"graph": [], "eager": ["--no_cuda_graph"], "recomputed": ["--gradient_checkpointing"]}
    common = ("--base_precision", "nf4", "--mixed_precision", dtype)
    runs = {name: trained(cached, tmp_path, name, *common, *flags) for name, flags in ways.items()}
    for name, run in runs.items():
        for fact in ("loss", "grad_norm"):
            off = [abs(m[fact] / e[fact] - 1) for m, e in zip(run, runs["eager"], strict=True)]
            assert max(off) < dict(no=1e-4, fp16=5e-3)[dtype], (name, fact, off)


@pytest.mark.gpu
def test_packing_leaves_no_unpacked_weight_on_the_gpu():
    unet_config = Model(str(PIPELINE)).unet_config()
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(unet_config).half()
    largest = max(layer.weight.nbytes for _, layer in layers(unet))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pack(unet, GPU, "nf4")
    held = sum(part.nbytes for part in unet.buffers())
    rounding = 2 * 512 * len(layers(unet))
    assert held <= torch.cuda.memory_allocated() - before <= held + rounding
    assert torch.cuda.max_memory_allocated() - before <= held + rounding + 3 * largest
