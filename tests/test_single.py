"""A model in one file: the same as the folder it was made of, to every stage; what is no such file is named."""

import json
import shutil

import pytest
import torch
from conftest import PIPELINE, PRECOMPUTE, SDXL, TRAIN, command, here, one_line_error, precompute
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from data.cache import read_manifest
from data.common.errors import UserError
from data.models.files import STEMS, Model, load
from data.models.identity import identity
from data.models.schema import CONFIGS
from tests.single_file import PARTS, configs, single_file, unet

CPU = torch.device("cpu")
REFUSED = {  # what is put beside the toy's parts, or instead of them: what the message says
    "edm_mean": "an EDM model",
    "edm_vpred.sigma_max": "an EDM model",
    "conditioner.embedders.0.model.ln_final.weight": "SDXL's refiner",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "a Stable Diffusion 1 model",
    "cond_stage_model.model.ln_final.weight": "a Stable Diffusion 2 model",
    "model.diffusion_model.double_blocks.0.img_mlp.0.weight": "a Flux model",
    "model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight": "a Stable Diffusion 3 model",
    "lora_unet_input_blocks_4_1_proj_in.alpha": "a LoRA",
    "model.diffusion_model.out.2.weight.scale_weight": "of quantised weights",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The toy as one file, and a folder with its configs and vocabularies alone."""
    folder = tmp_path_factory.mktemp("single")
    single_file(PIPELINE, folder / "toy.safetensors")
    configs(PIPELINE, folder / "configs")
    return folder


def of(files, name="toy.safetensors", **more):
    return Model(str(files / name), config=str(files / "configs"), **more)


def test_every_component_is_what_it_is_in_the_folder(files):
    """Another identity and all would be encoded again; a wrong tensor under the right name and all would be wrong."""
    of(files).check()
    for name in CONFIGS:
        file, folder = of(files).component(name), Model(str(PIPELINE)).component(name)
        assert {**identity(file), "seen": None} == {**identity(folder), "seen": None}, name
    for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        ours = load(kind, of(files).component(name), torch.float32, CPU).state_dict()
        theirs = kind.from_pretrained(PIPELINE / name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[n]) for n, tensor in ours.items())


def test_all_tensors_of_a_full_size_unet_have_their_place(tmp_path):
    with torch.device("meta"):
        wanted = UNet2DConditionModel(**SDXL).state_dict()
    assert len(wanted) == 1680
    # one number each, because 2.6 billion do not fit here; the first has channels that are looked at
    tensors = {name: torch.full((1,) * tensor.ndim, i) for i, (name, tensor) in enumerate(wanted.items())}
    tensors["conv_in.weight"] = tensors["conv_in.weight"].expand(1, 4, 1, 1).contiguous()
    save_file({name: tensor.float() for name, tensor in unet(tensors)}, tmp_path / "sdxl.safetensors")
    configs(PIPELINE, tmp_path / "configs")
    path = tmp_path / "configs" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SDXL))
    model = Model(str(tmp_path / "sdxl.safetensors"), config=str(tmp_path / "configs"))
    found = model.component("unet").weights()
    assert found.keys() == wanted.keys()
    assert all((found[name] == i).all() for i, name in enumerate(wanted))


def test_another_unet_in_the_file_changes_nothing_else(files, tmp_path):
    def changed(path):
        save_file({n: t + 1 if "diffusion_model" in n else t for n, t in load_file(path).items()}, path)

    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    changed(tmp_path / "toy.safetensors")
    for name in STEMS:
        before, after = identity(of(files).component(name)), identity(of(tmp_path).component(name))
        assert (before["content"] == after["content"]) == (name != "unet")


@pytest.mark.parametrize("name, what", REFUSED.items())
def test_a_file_of_another_kind_is_named(name, what, files, tmp_path):
    tensors = load_file(files / "toy.safetensors")
    save_file(tensors | {name: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x\.safetensors: .*{what}"):
        Model(str(tmp_path / "x.safetensors"), config=str(files / "configs")).check()


def rewritten(files, tmp_path, change):
    """The toy's file with change({name: tensor}) in place of its tensors, as a Model."""
    save_file(change(load_file(files / "toy.safetensors")), tmp_path / "x.safetensors")
    return Model(str(tmp_path / "x.safetensors"), config=str(files / "configs"))


def test_other_unets_are_named(files, tmp_path):
    """In seconds, and not by the training that follows hours of encoding."""
    first = "model.diffusion_model.input_blocks.0.0.weight"
    wide = rewritten(files, tmp_path, lambda t: t | {first: torch.zeros(32, 9, 3, 3)})
    with pytest.raises(UserError, match="9 input channels instead of 4: an inpainting model"):
        wide.check()
    fewer = rewritten(files, tmp_path, lambda t: {n: v for n, v in t.items() if "middle_block.1.transformer" not in n})
    with pytest.raises(
        UserError, match=r"0 transformer blocks at middle_block\.1 and \d+ are expected: a distilled model"
    ):
        fewer.check()
    whole = rewritten(files, tmp_path, lambda t: {n: v.to(torch.int8) for n, v in t.items()})
    with pytest.raises(UserError, match=r"\(I8\) is of quantised weights"):
        whole.check()


def test_what_is_no_model_at_all_is_named(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"not one")
    (tmp_path / "z.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="no part of an SDXL model in its 1 tensor"):
        Model(str(tmp_path / "x.safetensors"), config=str(PIPELINE)).check()
    with pytest.raises(UserError, match=r"y\.safetensors: not a readable \.safetensors file"):
        Model(str(tmp_path / "y.safetensors"), config=str(PIPELINE)).check()
    with pytest.raises(UserError, match=r"z\.ckpt: a pickle"):
        Model(str(tmp_path / "z.ckpt")).check()
    one_line_error(
        command(
            "data.precompute",
            "--output_dir",
            tmp_path / "run",
            "--train_data_dir",
            tmp_path,
            "--pretrained_model_name_or_path",
            tmp_path / "nowhere.safetensors",
            code=2,
        )
    )


def test_parts_that_a_file_lacks_come_from_where_a_flag_says(files, tmp_path, monkeypatch):
    single_file(PIPELINE, tmp_path / "bare.safetensors", ("unet",))
    single_file(PIPELINE, tmp_path / "novae.safetensors", ("unet", "text_encoder", "text_encoder_2"))
    monkeypatch.setattr("data.models.files.SDXL", str(files / "configs"))  # as if it were fetched
    with pytest.raises(UserError, match="no vae in it; .* with --pretrained_vae_model_name_or_path or --model_config"):
        Model(str(tmp_path / "novae.safetensors")).component("vae")
    with pytest.raises(UserError, match="no text_encoder in it; name a model that has one with --model_config"):
        Model(str(tmp_path / "bare.safetensors")).check()
    with pytest.raises(UserError, match="no text_encoder in it, nor in .*configs; name a model"):
        Model(str(tmp_path / "bare.safetensors"), config=str(files / "configs")).check()
    Model(str(tmp_path / "bare.safetensors"), config=str(PIPELINE)).check()


@pytest.mark.parametrize("prefix", ["first_stage_model.", "", None], ids=["checkpoint's", "SGM's", "diffusers'"])
def test_a_vae_in_a_file_of_its_own(prefix, tmp_path):
    tensors = load_file(next((PIPELINE / "vae").glob("*.safetensors")))
    named = tensors if prefix is None else dict(PARTS["vae"](tensors, prefix))
    save_file(named, tmp_path / "vae.safetensors")
    component = Model(str(tmp_path / "vae.safetensors"), config=str(PIPELINE)).component("vae")
    assert identity(component)["content"] == identity(Model(str(PIPELINE)).component("vae"))["content"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_files_in_other_dtypes_are_read(dtype, tmp_path):
    single_file(PIPELINE, tmp_path / "x.safetensors", change=lambda tensor: tensor.to(dtype))
    model = Model(str(tmp_path / "x.safetensors"), config=str(PIPELINE))
    model.check()
    ours = load(UNet2DConditionModel, model.component("unet"), torch.float32, CPU).state_dict()
    theirs = load_file(next((PIPELINE / "unet").glob("*.safetensors")))
    assert all(torch.equal(ours[name], tensor.to(dtype).float()) for name, tensor in theirs.items())
    identity(model.component("text_encoder_2"))  # whatever the dtype


@pytest.mark.slow
def test_the_line_is_the_same_from_a_file_as_from_a_folder(files, pictures, tmp_path):
    """Rows, keys, index and weights, byte for byte; only names differ. compare runs with it."""
    model = ("--pretrained_model_name_or_path", files / "toy.safetensors", "--model_config", files / "configs")
    steps = (*TRAIN, "--max_train_steps", 2)
    for name, flags in (("folder", PRECOMPUTE), ("file", (*PRECOMPUTE, *model))):
        here("data.precompute", "--output_dir", tmp_path / name, "--train_data_dir", pictures, *flags)
        here("train", "--output_dir", tmp_path / name, *steps)
    cache = {p.name: p.read_bytes() for p in (tmp_path / "folder" / "cache").iterdir() if p.is_file()}
    for name, content in cache.items():
        if name != "manifest.json" and not name.startswith("."):
            assert (tmp_path / "file" / "cache" / name).read_bytes() == content, name
    ours, theirs = (load_file(tmp_path / name / "lora.safetensors") for name in ("file", "folder"))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[n]) for n, tensor in ours.items())
    assert (
        read_manifest(tmp_path / "file" / "cache")["content"] == read_manifest(tmp_path / "folder" / "cache")["content"]
    )
    here("infer", "--output_dir", tmp_path / "file", "--prompt", "a red fox", "--num_inference_steps", 2)
    pictures = (tmp_path / "file" / "compare" / "finetuned_0.png").read_bytes()
    base = ("--base_model", files / "toy.safetensors", "--model_config", files / "configs")
    here("infer", "--output_dir", tmp_path / "file", "--prompt", "a red fox", "--num_inference_steps", 2, *base)
    assert (tmp_path / "file" / "compare" / "finetuned_0.png").read_bytes() == pictures


def test_without_a_hub_it_says_what_to_fetch(files, pictures, tmp_path):
    flags = ("--pretrained_model_name_or_path", files / "toy.safetensors", "--train_data_dir", pictures)
    line = one_line_error(command("data.precompute", "--output_dir", tmp_path / "run", *flags, code=2))
    assert "stabilityai/stable-diffusion-xl-base-1.0" in line and "with --model_config" in line


def test_a_vae_flag_that_names_a_file_without_one_is_refused(files, pictures, tmp_path):
    """The base's own VAE would be taken, and the manifest would name another."""
    bare = single_file(PIPELINE, tmp_path / "bare.safetensors", ("unet",))
    with pytest.raises(UserError, match=r"bare\.safetensors: no VAE in it"):
        precompute(tmp_path / "run", pictures, "--pretrained_vae_model_name_or_path", bare)


def test_parts_that_neither_file_nor_configs_have_are_named_with_their_flag(files, tmp_path):
    novae = single_file(PIPELINE, tmp_path / "novae.safetensors", ("unet", "text_encoder", "text_encoder_2"))
    with pytest.raises(
        UserError, match=r"novae\.safetensors: no vae in it, nor in .*configs; .*--pretrained_vae_model"
    ):
        Model(str(novae), config=str(files / "configs")).component("vae")
    vae = single_file(PIPELINE, tmp_path / "vae.safetensors", ("vae",))
    with pytest.raises(UserError, match=r"vae\.safetensors: no unet in it, nor in .*configs"):
        Model(str(vae), config=str(files / "configs")).check()


def test_shards_loras_and_addresses_are_named(files, tmp_path):
    shutil.copy(files / "toy.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="one of 2 shards; give the folder"):
        Model(str(tmp_path / "model-00001-of-00002.safetensors"), config=str(PIPELINE)).check()
    for name in ("lora_unet_x.lora_up.weight", "unet.x.lora_A.weight", "x.processor.to_q_lora.down.weight"):
        save_file({name: torch.zeros(1)}, tmp_path / "lora.safetensors")
        with pytest.raises(UserError, match=r"lora\.safetensors: a LoRA; an SDXL model is needed"):
            Model(str(tmp_path / "lora.safetensors"), config=str(PIPELINE)).check()
    with pytest.raises(UserError, match="an address; download the file first"):
        Model("https://huggingface.co/a/b/resolve/main/c.safetensors").check()
    with pytest.raises(UserError, match="--model_config .*: a file; a folder in diffusers' layout or a hub id"):
        Model(str(files / "toy.safetensors"), config=str(files / "toy.safetensors")).check()
    (tmp_path / "model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model: not a \.safetensors file"):
        Model(str(tmp_path / "model")).check()


def test_a_file_that_was_replaced_is_named_and_not_the_folder_of_its_configs(files, pictures, cached, tmp_path):
    shutil.copy(files / "toy.safetensors", tmp_path / "m.safetensors")
    model = ("--pretrained_model_name_or_path", tmp_path / "m.safetensors", "--model_config", files / "configs")
    precompute(tmp_path / "run", pictures, *model)
    single_file(PIPELINE, tmp_path / "m.safetensors", change=lambda tensor: tensor + 1)
    with pytest.raises(UserError, match=r"/m\.safetensors: this \w+ has other content than before"):
        here("train", "--output_dir", tmp_path / "run", *TRAIN)
