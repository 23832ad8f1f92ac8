"""What a model computes, told by digests: the same for another layout of the same tensors, and for nothing else."""

import json
import os
import shutil

import pytest
import torch
from conftest import PIPELINE, PRECOMPUTE, TRAIN, Forked, here, one_line_error
from safetensors.torch import load_file, save_file

from data.cache import read_manifest
from data.common.errors import UserError
from data.models import identity as module
from data.models.files import Model
from data.models.identity import IDENTITIES, check_unchanged, identities, identity
from data.models.schema import CONFIGS
from train.same_run import DIGESTS

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
WEIGHTS |= {"text_encoder": "model", "text_encoder_2": "model"}


@pytest.fixture
def model(tmp_path):
    """A copy of the toy's model to change."""
    shutil.copytree(PIPELINE, tmp_path / "model")
    return tmp_path / "model"


def of(model, name):
    found = identity(Model(str(model)).component(name))
    return found["config"], found["content"]


def path_of(model, name):
    return model / name / f"{WEIGHTS[name]}.safetensors"


def rewrite(path, change=lambda name, tensor: tensor, metadata=None):
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata)


def test_layout_metadata_and_place_change_nothing(model):
    """One file or shards, another library's metadata, order and prefix: a folder and a single file must agree."""
    for name in WEIGHTS:
        before, path = of(model, name), path_of(model, name)
        rewrite(path, metadata={"made by": "somebody"})
        assert of(model, name) == before == of(PIPELINE, name)
        tensors = load_file(path)
        names = sorted(tensors, reverse=True)
        for i in (1, 2):
            save_file(
                {n: tensors[n] for n in names[i - 1 :: 2]}, f"{path.with_suffix('')}-0000{i}-of-00002.safetensors"
            )
        path.unlink()
        assert of(model, name) == before
    prefixed = {f"text_model.{n}": t for n, t in load_file(path_of(PIPELINE, "text_encoder")).items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    before = of(model, "text_encoder")
    for path in (model / "text_encoder").glob("*.safetensors"):
        path.unlink()
    save_file(prefixed, path_of(model, "text_encoder"))
    assert of(model, "text_encoder") == before


CHANGES = {
    "one bit": lambda n, t: t.clone().view(torch.uint8).bitwise_xor(1).view(t.dtype) if n.endswith("norm1.bias") else t,
    "dtype": lambda n, t: t.float(),
    "shape": lambda n, t: t.flatten() if t.dim() == 2 else t,
    "a name": lambda n, t: t,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_what_changes_the_tensors_changes_the_content(name, change, model):
    before, path = of(model, name), path_of(model, name)
    tensors = {n: CHANGES[change](n, t) for n, t in load_file(path).items()}
    if change == "a name":  # two tensors of the same shape change places
        names = sorted(tensors)
        one, two = next((a, b) for a, b in zip(names, names[1:]) if tensors[a].shape == tensors[b].shape)
        tensors[one], tensors[two] = tensors[two], tensors[one]
        assert not torch.equal(tensors[one], tensors[two])
    save_file(tensors, path)
    config, content = of(model, name)
    assert config == before[0] and content != before[1]


def test_a_config_counts_by_what_it_means(model):
    """Not by its bytes: a default that is written out, and what a library notes down, change nothing."""
    for name, (file, table) in CONFIGS.items():
        path = model / ("" if name == "model_index" else name) / file
        before, config = of(model, name), json.loads(path.read_text())
        defaults = {field: rule.missing for field, rule in table.items() if rule and rule.missing == config.get(field)}
        path.write_text(json.dumps({f: v for f, v in config.items() if f not in defaults}, indent=7) + "\n")
        assert of(model, name) == before
    edit = dict(
        unet=dict(norm_eps=1e-6), scheduler=dict(beta_end=0.0121), model_index=dict(force_zeros_for_empty_prompt=False)
    )
    for name, changes in edit.items():
        path = model / ("" if name == "model_index" else name) / CONFIGS[name][0]
        before = of(model, name)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        config, content = of(model, name)
        assert config != before[0] and content == before[1]


def test_files_that_look_as_they_did_are_not_read_again(model, monkeypatch):
    """Five gigabytes at every start, where nothing can have changed."""
    named, read = Model(str(model)), []
    real = module.digest_of
    monkeypatch.setattr(module, "digest_of", lambda files: read.extend(files) or real(files))
    there = identities(named, named)
    assert len(set(read)) == len(read) >= len(WEIGHTS) + 2  # each file once
    read.clear()
    assert identities(named, named, there) == there and check_unchanged(there, named, named, "")
    assert not [path for path in read if path.suffix == ".safetensors"]
    os.utime(path_of(model, "vae"), ns=(0, 0))
    assert check_unchanged(there, named, named, "") and read == [path_of(model, "vae")]


def test_identities_that_were_written_down_are_recognised(model):
    """By the rule that a manifest's table has for them."""
    named = Model(str(model))
    there = json.loads(json.dumps(identities(named, named)))
    assert IDENTITIES.fits(there) and IDENTITIES.fits({"vae": there["vae"]})
    vae = there["vae"]
    for odd in (
        None,
        [],
        {"x": vae},
        {"vae": 1},
        {"vae": {}},
        {"vae": vae | {"config": 1}},
        {"vae": vae | {"seen": [[1]]}},
    ):
        assert not IDENTITIES.fits(odd)


def test_what_is_not_there_any_more_is_passed_over(model):
    """Encoders that were deleted to save room cannot be mixed with anything."""
    named = Model(str(model))
    there = identities(named, named)
    shutil.rmtree(model / "text_encoder_2")
    found = check_unchanged(there, named, named, "")
    assert found.keys() == CONFIGS.keys() and all(len(digest) == 16 for digest in found.values())


def test_damaged_weights_are_named(model):
    for damage in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x03" + b"\0" * 7 + b'{"a'):
        path_of(model, "vae").write_bytes(damage)
        with pytest.raises(UserError, match="vae: its weights are damaged"):
            of(model, "vae")
    shutil.copy(path_of(PIPELINE, "vae"), path_of(model, "vae"))
    os.truncate(path_of(model, "vae"), path_of(model, "vae").stat().st_size - 1)
    with pytest.raises(UserError, match="vae: its weights are damaged .*cut off"):
        of(model, "vae")


# ---- Through the commands


REPLACED = {  # what is replaced under the run's feet, and how
    "unet": lambda model: rewrite(path_of(model, "unet"), lambda n, t: t * 1.5 if t.is_floating_point() else t),
    "text_encoder_2": lambda model: rewrite(path_of(model, "text_encoder_2"), lambda n, t: t * 1.01),
    "vae": lambda model: rewrite(path_of(model, "vae"), lambda n, t: t * 1.01),
    "scheduler": lambda model: edit(model / "scheduler" / "scheduler_config.json", beta_end=0.0121),
    "model_index": lambda model: edit(model / "model_index.json", force_zeros_for_empty_prompt=False),
    "tokenizer": lambda model: edit(model / "tokenizer" / "tokenizer_config.json", pad_token="!"),
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def begun(model, pictures, tmp_path):
    """A run with a cache of its own model."""
    run = tmp_path / "run"
    flags = [*PRECOMPUTE, "--pretrained_model_name_or_path", model]
    here("data.precompute", "--output_dir", run, "--train_data_dir", pictures, *flags)
    return run


def refused(name, tmp_path, *argv):
    process = Forked(name, argv, tmp_path / "log")
    assert process.wait() == 2, process.output
    return one_line_error(process.output)


@pytest.mark.slow
def test_a_component_that_was_replaced_is_named_and_never_mixed(begun, model, pictures, tmp_path):
    """Between precompute and train, stop and resume, train and infer."""
    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    train = ["--output_dir", begun, *TRAIN, "--max_train_steps", 2]
    infer = ["--output_dir", begun, "--prompt", "a fox", "--num_inference_steps", 1]

    def names_it(name, command, argv):
        line = refused(command, tmp_path, *argv)
        assert f"this {name} has" in line and str(model) in line, line

    for name in REPLACED:
        REPLACED[name](model)
        names_it(name, "train", train)
        assert not (begun / "lora.safetensors").exists()
        shutil.rmtree(model), shutil.copytree(kept, model)
    here("train", *train)
    weights = (begun / "lora.safetensors").read_bytes()
    for name in REPLACED:
        REPLACED[name](model)
        names_it(name, "train", [*train, "--max_train_steps", 3])
        names_it(name, "infer", infer)
        shutil.rmtree(model), shutil.copytree(kept, model)
    assert (begun / "lora.safetensors").read_bytes() == weights and not list((begun / "compare").glob("*.png"))


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("scheduler", "model_index")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", *SLOWER])
def test_a_run_is_not_continued_on_a_model_that_precompute_accepted_since(name, begun, model, pictures, tmp_path):
    """These three encode no row, so that the cache stays as it was."""
    train = ["--output_dir", begun, *TRAIN, "--max_train_steps", 2]
    here("train", *train)
    REPLACED[name](model)
    before = read_manifest(begun / "cache")["components"]
    flags = [*PRECOMPUTE, "--pretrained_model_name_or_path", model]
    here("data.precompute", "--output_dir", begun, "--train_data_dir", pictures, *flags)
    assert read_manifest(begun / "cache")["components"] != before
    said = refused("train", tmp_path, *train, "--max_train_steps", 3)
    assert said == f"error: {begun}: holds another run: {DIGESTS[name]} than when it began"
