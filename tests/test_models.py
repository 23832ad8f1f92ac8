"""Where a model's files are, and what is named when they are not there."""

import shutil

import pytest
import torch
from conftest import PIPELINE
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from data.common.errors import MachineError, UserError
from data.common.flags import PRECISIONS
from data.common.system import free_memory
from data.models.files import Model, load, torch_dtype


@pytest.fixture
def model(tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "model")
    return tmp_path / "model"


def weights(model, name="diffusion_pytorch_model.safetensors"):
    return model / "unet" / name


def test_every_precision_that_the_flags_know_has_its_dtype():
    assert [torch_dtype(precision) for precision in PRECISIONS] == [torch.float32, torch.float16, torch.bfloat16]


def test_load_equals_from_pretrained(_toy_unet):
    """Built without memory and assigned: a weight or buffer forgotten would stay empty or differ."""
    ours = load(UNet2DConditionModel, Model(str(PIPELINE)).component("unet"), torch.float32, torch.device("cpu"))
    theirs = _toy_unet.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(w, theirs[n]) for n, w in ours.state_dict().items())
    assert not ours.training and not any(p.requires_grad or p.is_meta for p in ours.parameters())
    assert not [n for n, b in ours.named_buffers() if b.is_meta]


def test_prepare_sees_the_weights_before_they_move():
    """Changed on the device, a model leaves holes in its memory; frozen before the change, new layers would train."""
    seen = []

    def prepare(unet):
        seen.append({p.device.type for p in unet.parameters()})
        unet.add_module("new", torch.nn.Linear(2, 2, dtype=torch.float16))

    ours = load(
        UNet2DConditionModel, Model(str(PIPELINE)).component("unet"), torch.float16, torch.device("meta"), prepare
    )
    assert seen == [{"cpu"}]
    assert all(p.is_meta and p.dtype == torch.float16 and not p.requires_grad for p in ours.parameters())
    assert ours.new.weight.is_meta and not ours.new.training


def test_the_variant_is_taken_where_there_is_one(model):
    assert Model(str(model), None, "fp16").component("unet").variant is None
    shutil.copy(weights(model), weights(model, "diffusion_pytorch_model.fp16.safetensors"))
    assert Model(str(model), None, "fp16").component("unet").variant == "fp16"
    assert Model(str(model)).component("unet").variant is None
    weights(model).unlink()
    with pytest.raises(UserError, match="no diffusion_pytorch_model.safetensors in unet/"):
        Model(str(model)).component("unet")


@pytest.mark.slow
def test_shards_are_read_together(model, _toy_unet):
    tensors = load_file(weights(model))
    names = sorted(tensors)
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        save_file(
            {n: tensors[n] for n in part}, weights(model, f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
        )
    weights(model).unlink()
    ours = load(UNet2DConditionModel, Model(str(model)).component("unet"), torch.float32, torch.device("cpu"))
    assert all(torch.equal(w, _toy_unet.state_dict()[n]) for n, w in ours.state_dict().items())


def test_weights_that_do_not_fit_are_refused(model):
    tensors = load_file(weights(model))
    tensors.pop("conv_in.weight")
    save_file(tensors, weights(model))
    with pytest.raises(UserError, match="unet: its weights are damaged or do not fit.*conv_in.weight"):
        load(UNet2DConditionModel, Model(str(model)).component("unet"), torch.float32, torch.device("cpu"))


def test_a_machine_with_too_little_memory_is_told_before_it_is_taken(model, monkeypatch):
    """Linux would end the process with a 137 and no word."""
    size = sum(tensor.numel() * 4 for tensor in load_file(weights(model)).values())
    monkeypatch.setattr("data.common.system.free_memory", lambda: size - 1)
    with pytest.raises(
        MachineError, match="unet: to load its weights needs 0.0 GiB of RAM, 0.0 are free; end other programs"
    ):
        load(UNet2DConditionModel, Model(str(model)).component("unet"), torch.float32, torch.device("cpu"))
    load(
        UNet2DConditionModel, Model(str(model)).component("unet"), torch.float16, torch.device("cpu")
    )  # half of it is enough
    monkeypatch.undo()
    assert 2**26 < free_memory() < 2**50


def test_what_is_missing_is_named(model):
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer/ in it"):
        Model(str(model)).component("tokenizer")
    (model / "model_index.json").unlink()
    with pytest.raises(UserError, match="model_index.json: not there or damaged"):
        Model(str(model)).index()


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "./not/a/folder", "../x", "a b"])
def test_a_model_that_is_nowhere_is_named_offline(name, tmp_path, monkeypatch):
    """Without a network a missing model is one line, not a page of HTTP."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        UserError, match="neither a folder nor a file here, nor a hub id|not a folder here, and not from the hub"
    ) as refusal:
        Model(name).component("unet")
    assert str(refusal.value).startswith(name) and "\n" not in str(refusal.value)


def test_a_vae_published_alone(model):
    assert Model(str(model / "vae")).component("vae").folder == model / "vae"
    with pytest.raises(UserError, match="no unet/"):
        Model(str(model / "vae")).component("unet")


def test_public_names_hold_no_path(model, monkeypatch):
    """They go into files that people publish: a folder's own name, also where it is named as "."."""
    assert Model(str(model)).public_name() == model.name
    monkeypatch.chdir(model)
    assert Model(".").public_name() == model.name
    assert Model("someone/some-model").public_name() == "someone/some-model"


def test_a_local_model_is_pinned_to_its_absolute_path(model, monkeypatch):
    """train may run from another folder than precompute."""
    monkeypatch.chdir(model.parent)
    assert Model("model", None, "fp16").pinned() == Model(str(model), None, "fp16")


def test_truncated_weights_and_configs_are_named(model):
    """A download that was cut: one line, not a traceback out of a library."""
    weights(model).write_bytes(weights(model).read_bytes()[:1000])
    with pytest.raises(UserError, match="unet: its weights are damaged"):
        load(UNet2DConditionModel, Model(str(model)).component("unet"), torch.float32, torch.device("cpu"))
    (model / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match="scheduler_config.json: not there or damaged"):
        Model(str(model)).component("scheduler").config()
