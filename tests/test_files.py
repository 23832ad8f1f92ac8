"""The weights file: every tool's keys, the same numbers in diffusers, the same bytes each time, and what is refused."""

import copy
import hashlib
import itertools
import json
import pickle
import re
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, inject_filled, narrow_sdxl_unet, predict, sdxl_unet, unet_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from data.common.errors import UserError
from lora.contents import key, look, spelled
from lora.files import Origin, export, load, main, norms, read
from lora.inject import inject, targets

# SDXL's transformers in SGM's numbering: block -> (path in diffusers, how many transformer blocks deep).
SGM = {
    "input_blocks_4_1": ("down_blocks.1.attentions.0", 2),
    "input_blocks_5_1": ("down_blocks.1.attentions.1", 2),
    "input_blocks_7_1": ("down_blocks.2.attentions.0", 10),
    "input_blocks_8_1": ("down_blocks.2.attentions.1", 10),
    "middle_block_1": ("mid_block.attentions.0", 10),
    "output_blocks_0_1": ("up_blocks.0.attentions.0", 10),
    "output_blocks_1_1": ("up_blocks.0.attentions.1", 10),
    "output_blocks_2_1": ("up_blocks.0.attentions.2", 10),
    "output_blocks_3_1": ("up_blocks.1.attentions.0", 2),
    "output_blocks_4_1": ("up_blocks.1.attentions.1", 2),
    "output_blocks_5_1": ("up_blocks.1.attentions.2", 2),
}


LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
BOTH = pytest.mark.parametrize("layers", ("attn", "attn-mlp"))
ORIGIN = Origin("mine", base="someone/some-model", resolution=1024)


def sdxl_keys(layers="attn"):
    """{layer in diffusers' UNet: its key}, all 560 or 722, written out from the table."""
    keys = {}
    for block, (path, depths) in SGM.items():
        if layers == "attn-mlp":
            keys |= {f"{path}.{last}": f"lora_unet_{block}_{last}" for last in ("proj_in", "proj_out")}
            for depth, last in itertools.product(range(depths), ("ff.net.0.proj", "ff.net.2")):
                spelled = f"lora_unet_{block}_transformer_blocks_{depth}_{last.replace('.', '_')}"
                keys[f"{path}.transformer_blocks.{depth}.{last}"] = spelled
        for depth, attention, layer in itertools.product(range(depths), ("attn1", "attn2"), LAYERS):
            spelled = f"lora_unet_{block}_transformer_blocks_{depth}_{attention}_{layer.replace('.', '_')}"
            keys[f"{path}.transformer_blocks.{depth}.{attention}.{layer}"] = spelled
    return keys


@pytest.fixture
def file(unet, tmp_path):
    """An exported file with alpha 6 at rank 4, and the adapters it was made from."""
    adapters = inject_filled(unet)
    path = tmp_path / "mine.safetensors"
    export(adapters, path, ORIGIN)
    return path, adapters


PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}  # what lies side by side in one layer


def own_rows(adapters):
    """{projection: its A, its B}, cut out of the layers once more."""
    found, r = {}, adapters.rank
    for name, layer in adapters.layers.items():
        parent, last = name.rsplit(".", 1)
        for i, part in enumerate(PARTS.get(last, (last,))):
            found[f"{parent}.{part}"] = layer.A.detach()[r * i : r * i + r], layer.B.detach()[i]
    return found


def metadata(path):
    with safe_open(path, framework="pt") as stored:
        return stored.metadata()


@BOTH
def test_the_keys_of_full_sdxl(layers):
    """A key spelled otherwise is ignored, silently, by ComfyUI, A1111, Forge or sd-scripts."""
    wanted = sdxl_keys(layers)
    assert len(wanted) == len(set(wanted.values())) == {"attn": 560, "attn-mlp": 722}[layers]
    assert {name: key(name) for name, _, _ in targets(sdxl_unet(), layers)} == wanted


@BOTH
def test_diffusers_reads_the_keys_of_full_sdxl_back_as_its_own(layers):
    """diffusers' converter, an independent reading of the same spelling: all layers, none left over."""
    from diffusers import StableDiffusionXLPipeline

    unet = sdxl_unet()
    tensors = {}
    for name, inside, out in targets(unet, layers):
        tensors[f"{key(name)}.lora_down.weight"] = torch.zeros(1, inside)
        tensors[f"{key(name)}.lora_up.weight"] = torch.zeros(out, 1)
        tensors[f"{key(name)}.alpha"] = torch.tensor(1.0)
    count = len(tensors) // 3
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)
    spelled = [name.replace(".processor", "").replace("to_out_lora", "to_out.0_lora") for name in converted]
    names = {re.split(r"[._]lora[._]", name.removeprefix("unet."))[0] for name in spelled}
    assert names == {name for name, _, _ in targets(unet, layers)}
    assert len(converted) == 2 * count and len(alphas) == count


def test_what_is_in_the_file(file):
    """Three tensors for each projection, in fp16: A as lora_down, B as lora_up, alpha as a number without axes.

    Each projection has its own rows of the layer that it shares: q's A is not k's.
    """
    path, adapters = file
    stored, wanted = load_file(path), own_rows(adapters)
    assert len(stored) == 3 * len(wanted) > 3 * len(adapters.layers)
    for name, (A, B) in wanted.items():
        assert torch.equal(stored[f"{key(name)}.lora_down.weight"], A.half())
        assert torch.equal(stored[f"{key(name)}.lora_up.weight"], B.half())
        assert stored[f"{key(name)}.alpha"].shape == () and stored[f"{key(name)}.alpha"] == 6
    for part in (0, 1):  # no two alike, so that the comparisons above tell them apart
        assert len({pair[part].sum().item() for pair in wanted.values()}) == len(wanted)


def test_an_export_of_all_of_sdxls_layers(tmp_path):
    """560 projections out of 350 layers, under the 560 names, from the fp32 vector and not from its fp16 copies."""
    adapters = inject(narrow_sdxl_unet().half(), rank=2, alpha=3.0)
    with torch.no_grad():
        adapters.vector.normal_(generator=torch.Generator().manual_seed(0))
    export(adapters, tmp_path / "before.safetensors", ORIGIN)  # the layers' copies are still old
    adapters.refresh()
    export(adapters, tmp_path / "after.safetensors", ORIGIN)
    before, stored = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(stored) == {f"{name}.{part}" for name in sdxl_keys().values() for part in parts}
    assert len(adapters.layers) == 350
    for name, (A, B) in own_rows(adapters).items():
        assert torch.equal(stored[f"{key(name)}.lora_down.weight"], A)
        assert torch.equal(stored[f"{key(name)}.lora_up.weight"], B)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.items())


def test_metadata(file):
    """The names that A1111, sd-scripts and the model spec look for, and none that diffusers refuses next to .alpha."""
    facts = metadata(file[0])
    assert facts["ss_base_model_version"].startswith("sdxl_")
    assert facts["ss_network_module"] == "networks.lora"
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "6")
    assert facts["modelspec.title"] == "mine" and "ss_output_name" not in facts
    assert facts["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert facts["modelspec.resolution"] == "1024x1024"
    assert facts["modelspec.sai_model_spec"] and facts["ss_sd_model_name"] == "someone/some-model"
    assert facts["modelspec.prediction_type"] == "epsilon"
    assert (facts["ss_v_parameterization"], facts["ss_zero_terminal_snr"]) == ("False", "False")
    assert not {"barelora_base_fingerprint", "modelspec.trigger_phrase"} & set(facts)
    assert "lora_adapter_metadata" not in facts
    assert not [name for name in facts if "date" in name or "path" in name or "dir" in name]


def test_metadata_of_a_run_with_a_trigger_word_on_a_v_prediction_model_in_a_folder(unet, tmp_path):
    origin = Origin("run \udcff", "model.safetensors", 512, "0123456789abcdef", "v_prediction", True, "sks fox")
    export(inject_filled(unet), tmp_path / "x.safetensors", origin)
    facts = metadata(tmp_path / "x.safetensors")
    assert facts["modelspec.title"] == "run ?"  # a name that is no UTF-8 would make a file that nothing opens
    assert (facts["ss_sd_model_name"], facts["barelora_base_fingerprint"]) == ("model.safetensors", "0123456789abcdef")
    assert (facts["modelspec.prediction_type"], facts["modelspec.trigger_phrase"]) == ("v", "sks fox")
    assert (facts["ss_v_parameterization"], facts["ss_zero_terminal_snr"]) == ("True", "True")


def test_the_hash_by_which_a1111_and_civitai_know_a_file(file):
    """sd-scripts' addnet_hash_safetensors: sha256 of what follows the header, which metadata does not change."""
    blob = file[0].read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    assert metadata(file[0])["sshs_model_hash"] == hashlib.sha256(blob[start:]).hexdigest()


def test_the_same_weights_give_the_same_bytes(file, tmp_path):
    """safetensors by itself writes metadata in random order: the same run would have another checksum each time."""
    path, adapters = file
    for i in range(5):
        other = tmp_path / str(i) / path.name
        export(adapters, other, ORIGIN)
        assert other.read_bytes() == path.read_bytes()
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert (8 + size) % 8 == 0 and list(header["__metadata__"]) == sorted(header["__metadata__"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_gives_the_exported_weights_rank_and_alpha(dtype, file, _toy_unet):
    """In the vector that is trained and in the layers that compute, which would draw the base without a refresh."""
    path, adapters = file
    again, facts = load(copy.deepcopy(_toy_unet).to(dtype), read(path)), look(path).metadata
    assert (again.rank, again.alpha) == (4, 6) and facts["modelspec.title"] == "mine"
    computing, training = own_rows(again), again.projections()
    assert computing.keys() == training.keys() == own_rows(adapters).keys()
    for name, pair in own_rows(adapters).items():
        for number, ours, theirs in zip(pair, computing[name], training[name]):
            assert ours.dtype == dtype and torch.equal(ours, number.half().to(dtype))
            assert torch.equal(theirs, number.half().float())


@pytest.mark.slow
@pytest.mark.parametrize("layers, alpha", [("attn", 4.0), ("attn", 6.0), ("attn", 1.0), ("attn-mlp", 6.0)])
def test_diffusers_loads_the_file_to_the_same_output(layers, alpha, unet, _toy_unet, tmp_path):
    """At alpha = rank an alpha that the loader does not read would not show; 6 and 1 at rank 4 show it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    inputs, path = unet_inputs(), tmp_path / "lora.safetensors"
    export(inject_filled(unet, rank=4, alpha=alpha, layers=layers), path, ORIGIN)
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(unet=copy.deepcopy(_toy_unet), scheduler=EulerDiscreteScheduler(), **parts)
    pipeline.load_lora_weights(path)
    ours = copy.deepcopy(_toy_unet)
    load(ours, read(path))
    with torch.no_grad():
        base, theirs, mine = (predict(u, inputs) for u in (_toy_unet, pipeline.unet, ours))
    assert (mine - base).abs().max() > 1e-2  # the update shows
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_export_refuses_what_is_not_finite_in_fp16(bad, unet, tmp_path):
    """1e6 is finite in fp32 and infinite in the file: black pictures for whoever loads it. The old file stays."""
    adapters, path = inject_filled(unet), tmp_path / "lora.safetensors"
    path.write_bytes(b"the last good one")
    name = [name for name in adapters.projections() if name.endswith("attn1.to_k")][1]
    adapters.projections()[name][1][0, 0] = bad
    with pytest.raises(UserError, match=rf"{name}\.lora_up is not finite"):
        export(adapters, path, ORIGIN)
    assert path.read_bytes() == b"the last good one" and len(list(tmp_path.iterdir())) == 1


DOWN = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
UP, ALPHA = DOWN.replace("lora_down", "lora_up"), DOWN.replace("lora_down.weight", "alpha")


def damage(name, change):
    def apply(path):
        tensors = load_file(path)
        tensors[name] = change(tensors[name])
        save_file(tensors, path)

    return apply


def remove(name):
    return lambda path: save_file({n: t for n, t in load_file(path).items() if n != name}, path)


def bytes_of(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def first_value(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


REFUSED = {
    "truncated data": (bytes_of(lambda b: b[:-100]), "not a readable .safetensors"),
    "truncated header": (bytes_of(lambda b: b[:100]), "not a readable .safetensors"),
    "empty": (bytes_of(lambda b: b""), "not a readable .safetensors"),
    "html": (bytes_of(lambda b: b"<!doctype html><html><body>not found</body></html>"), "not a readable .safetensors"),
    "no down": (remove(DOWN), f"{UP} has no partner: its A is missing"),
    "no up": (remove(UP), f"{DOWN} has no partner: its B is missing"),
    "alpha alone": (lambda p: (remove(DOWN)(p), remove(UP)(p)), f"{ALPHA} has no partner"),
    "one layer twice": (
        lambda p: save_file({**load_file(p), DOWN.replace("lora_down", "lora_A"): load_file(p)[DOWN].clone()}, p),
        "are one tensor in two spellings",
    ),
    "a key of a text encoder": (
        lambda p: save_file({**load_file(p), "lora_te1_x.alpha": torch.ones(())}, p),
        "128 layers of SDXL's UNet, 1 layer of text encoders",
    ),
    "transposed": (damage(DOWN, lambda t: t.T.contiguous()), DOWN),
    "wrong width": (damage(UP, lambda t: t[:-1].contiguous()), UP),
    "wrong axes": (damage(DOWN, lambda t: t[None].contiguous()), DOWN),
    "NaN": (damage(UP, first_value(torch.nan)), UP),
    "inf": (damage(DOWN, first_value(torch.inf)), DOWN),
    "NaN alpha": (damage(ALPHA, first_value(torch.nan)), ALPHA),
    "integers": (damage(DOWN, lambda t: t.int()), DOWN),
    "up of another rank": (damage(UP, lambda t: t[:, :2].contiguous()), rf"{DOWN} is .*{UP} .*instead of rank × in"),
    "alpha of two numbers": (damage(ALPHA, lambda t: torch.ones(2)), f"{ALPHA} is None"),
    "alpha 0": (
        lambda p: save_file({n: t * 0 if n.endswith("alpha") else t for n, t in load_file(p).items()}, p),
        "alpha is 0.0: not a finite number other than 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name_and_the_unet_stays(case, file, _toy_unet):
    """diffusers takes most of these without a word; half loaded, they draw garbage."""
    path, _ = file
    apply, message = REFUSED[case]
    apply(path)

    def linears():
        modules = [(name, m) for name, m in _toy_unet.named_modules() if isinstance(m, torch.nn.Linear)]
        return {name: (m, m.weight.requires_grad) for name, m in modules}

    before = linears()
    with pytest.raises(UserError, match=message) as refusal:
        load(_toy_unet, read(path))
    assert str(path) in str(refusal.value)
    assert linears() == before


def test_a_missing_file_is_named(_toy_unet, tmp_path):
    with pytest.raises(UserError, match="nothing.safetensors: no such file"):
        read(tmp_path / "nothing.safetensors")


def test_no_code_in_a_pickle_runs(_toy_unet, tmp_path):
    """The classic .pt file that opens a shell, under the name of a safetensors file."""

    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = tmp_path / "lora.safetensors"
    for blob in (pickle.dumps(Opens()), None):
        if blob is None:
            torch.save({"lora": Opens()}, path)
        else:
            path.write_bytes(blob)
        with pytest.raises(UserError, match="not a readable .safetensors"):
            load(_toy_unet, read(path))
        assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(file):
    """The toy's weights into full SDXL: many are missing, which may be, but those that are there have other shapes."""
    with pytest.raises(UserError, match="this UNet wants rank × 640"):
        load(sdxl_unet(), read(file[0]))
    with pytest.raises(UserError, match="a LoRA for text of width 128, the base here has 2048"):
        look(file[0]).check_width(2048)


def test_metadata_of_another_tool_does_not_matter(file, _toy_unet, tmp_path):
    """Files without metadata exist; rank and alpha come from the tensors."""
    path = tmp_path / "bare.safetensors"
    path.write_bytes(save(load_file(file[0])))
    adapters, contents = load(copy.deepcopy(_toy_unet), read(path)), look(path)
    assert (adapters.rank, adapters.alpha, contents.metadata) == (4, 6, {})
    assert (contents.base, contents.fingerprint) == (None, None)


def test_fp32_files_load(file, _toy_unet, tmp_path):
    path = tmp_path / "fp32.safetensors"
    save_file({n: t.float() for n, t in load_file(file[0]).items()}, path)
    assert load(copy.deepcopy(_toy_unet), read(path)).rank == 4


def test_inject_then_load_is_refused(file, unet):
    with pytest.raises(UserError, match="adapter already"):
        load(unet, read(file[0]))  # the fixture injected it


# ---- Other spellings of the same layers


def oldest(name):
    """As diffusers wrote it when attention processors held the weights."""
    parent, last = name.replace("to_out.0", "to_out").rsplit(".", 1)
    return f"unet.{parent}.processor.{last}_lora" if last.startswith("to_") else f"unet.{name}.lora"


def sgm(name):
    """SGM's own names with dots: lora_unet_input_blocks_4_1_x -> input_blocks.4.1.x"""
    path = next(path for path, _ in SGM.values() if name.startswith(f"{path}."))
    block = next(block for block, (its, _) in SGM.items() if its == path)
    numbers = re.sub(r"_(?=\d)", ".", block)
    return numbers + name.removeprefix(path)


SPELLINGS = {  # tool: (a layer's name, the words for A, B and alpha)
    "kohya": (key, ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "OneTrainer, legacy": (
        lambda n: "lora_unet_" + n.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    ),
    "OneTrainer, internal": (lambda n: f"unet.{n}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "OneTrainer, original": (sgm, ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "ComfyUI": (lambda n: "diffusion_model." + sgm(n), ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "peft in diffusers": (lambda n: f"unet.{n}", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "diffusers": (lambda n: f"unet.{n}", ".lora.down.weight", ".lora.up.weight", ".alpha"),
    "peft with the adapter's name": (
        lambda n: f"unet.{n}",
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        ".alpha",
    ),
    "diffusers, oldest": (oldest, ".down.weight", ".up.weight"),  # without alphas: each is the rank
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_spelling_of_all_722_layers_is_read_as_the_same_layer(tool):
    name_of, *words = SPELLINGS[tool]
    for name, spelling in sdxl_keys("attn-mlp").items():
        stem = name_of(name)
        for part, word in zip(("A", "B", "alpha"), words):
            assert spelled(stem + word) == (spelling, part)


@pytest.mark.slow
@pytest.mark.parametrize("tool", SPELLINGS)
@BOTH
def test_a_file_of_another_tool_loads_to_the_same_weights(tool, layers, unet, _toy_unet, tmp_path):
    adapters, (name_of, a, b, *alpha) = inject_filled(unet, layers=layers), SPELLINGS[tool]
    tensors = {}
    for name, (A, B) in adapters.projections().items():
        stem = name_of(name)
        tensors |= {stem + a: A.clone(), stem + b: B.clone()}
        tensors |= {stem + word: torch.tensor(6) for word in alpha}  # an integer
    save_file(tensors, tmp_path / "theirs.safetensors")
    again = load(copy.deepcopy(_toy_unet), read(tmp_path / "theirs.safetensors"))
    assert torch.equal(again.vector, adapters.vector) and (again.rank, again.alpha) == (4, 6 if alpha else 4)
    assert look(tmp_path / "theirs.safetensors").kind == layers


@pytest.mark.slow
def test_what_diffusers_saves_is_read(unet, _toy_unet, tmp_path):
    """Its own save of a peft adapter: alpha stands in the metadata alone, and where it does not, it is the rank."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs, inputs = copy.deepcopy(_toy_unet), unet_inputs()
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=list(LAYERS), init_lora_weights=False))
    state = get_peft_model_state_dict(theirs)
    for facts, alpha in ((theirs.peft_config["default"].to_dict(), 6), (None, 4)):
        StableDiffusionXLPipeline.save_lora_weights(
            tmp_path, convert_state_dict_to_diffusers(state), unet_lora_adapter_metadata=facts
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
        ours = load(copy.deepcopy(_toy_unet), read(path))
        assert (ours.rank, ours.alpha) == (4, alpha)
    ours = copy.deepcopy(_toy_unet)
    load(ours, read(path)).set_scale(6 / 4)  # of the file without facts
    with torch.no_grad():
        torch.testing.assert_close(predict(ours, inputs), predict(theirs, inputs), rtol=0, atol=1e-4)


def updates(adapters):
    return {name: adapters.alpha / adapters.rank * B @ A for name, (A, B) in adapters.projections().items()}


def test_ranks_and_alphas_that_differ_by_layer_and_layers_that_are_not_there(unet, _toy_unet, tmp_path, capsys):
    """As dynamic resizing and lists of blocks leave it: the same update, and all of it can be trained."""
    g, tensors, wanted = torch.Generator().manual_seed(0), {}, {}
    for i, (name, inside, out) in enumerate(targets(_toy_unet, "attn-mlp")):
        wanted[name] = torch.zeros(out, inside)
        if i % 5 != 3:
            rank, alpha = 1 + i % 4, [1.0, 7.0, 2.5][i % 3]
            A, B = torch.randn(rank, inside, generator=g), torch.randn(out, rank, generator=g)
            tensors |= {f"{key(name)}.lora_down.weight": A, f"{key(name)}.lora_up.weight": B}
            tensors[f"{key(name)}.alpha"] = torch.tensor(alpha)
            wanted[name] = alpha / rank * B @ A
    save_file(tensors, tmp_path / "mixed.safetensors")
    adapters = load(unet, read(tmp_path / "mixed.safetensors"))
    assert (adapters.rank, adapters.alpha) == (4, 4)
    found = updates(adapters)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=1e-5, atol=1e-5)
    missing = sum(not update.any() for update in wanted.values())
    assert f"{missing} of {len(wanted)} layers are not in it; they stay as in the base" in capsys.readouterr().out
    assert all((A != 0).any(1).all() for A, _ in adapters.projections().values())  # a row of zeros with B = 0 stays


def with_keys(*more):
    return lambda path: save_file({**load_file(path), **{name: torch.ones(2, 2) for name in more}}, path)


def instead(*keys):
    return lambda path: save_file({name: torch.ones(2, 2) for name in keys}, path)


FOREIGN = {
    "text encoders": (
        with_keys(
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_te2_x.alpha", "lora_te2_x.lora_up.weight"
        ),
        "128 layers of SDXL's UNet, 2 layers of text encoders",
    ),
    "an embedding": (with_keys("bundle_emb.fox.clip_l"), "1 layer of text encoders"),
    "DoRA": (with_keys(DOWN.replace("lora_down.weight", "dora_scale")), "1 layer with DoRA's scales"),
    "DoRA by peft": (with_keys("unet.mid_block.x.lora_magnitude_vector.weight"), "1 layer with DoRA's scales"),
    "LoHa": (instead("lora_unet_input_blocks_4_1_proj_in.hada_w1_a"), "1 layer of LoHa, LoKr or another method"),
    "LoKr": (instead("lora_unet_input_blocks_4_1_proj_in.lokr_w1"), "1 layer of LoHa, LoKr or another method"),
    "convolutions": (with_keys("lora_unet_input_blocks_4_0_in_layers_2.lora_down.weight"), "of convolutions"),
    "SD 1.5": (
        instead("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"),
        "1 layer of another UNet, as SD 1.5 has",
    ),
    "Flux": (instead("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"), "1 layer of another architecture"),
    "Flux in diffusers": (instead("transformer.x_embedder.lora_A.weight"), "1 layer of another architecture"),
    "a whole model": (
        instead("model.diffusion_model.input_blocks.0.0.weight"),
        "1 layer of something else than a LoRA",
    ),
    "nothing": (instead(), "no tensors in it"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_a_file_has_more_is_said_in_one_line(case, file):
    path, _ = file
    apply, message = FOREIGN[case]
    apply(path)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        look(path)
    assert str(refusal.value).startswith(f"{path}: ") and "can be loaded" in str(refusal.value)


# ---- python -m lora.files


def test_it_prints_what_a_file_is(file, capsys, tmp_path):
    path, adapters = file
    main([str(path)])
    said = capsys.readouterr().out
    for line in (str(path), "base    someone/some-model, text of width 128", "layers  128 of attn", "rank    4\n"):
        assert line in said
    assert "alpha   6\n" in said and "dtype   F16" in said and "ss_network_module: networks.lora" in said
    squares = {}
    for name, update in updates(adapters).items():
        block = next(block for block, (start, _) in SGM.items() if name.startswith(f"{start}."))
        block = block if block.startswith("middle") else block.removesuffix("_1")
        squares[block] = squares.get(block, 0) + update.double().square().sum().item()
    found = {block: norm for block, (_, norm) in norms(read(path)).items()}
    assert found == pytest.approx({block: square**0.5 for block, square in squares.items()}, rel=1e-3)
    assert all(f"{norm:.4g}" in said for norm in found.values())


@pytest.mark.slow
def test_it_refuses_in_one_line_without_a_model(file, tmp_path):
    """The real command: exit code 2, no traceback."""
    for words in ([], ["--help"], [tmp_path / "nothing"], [tmp_path]):
        with pytest.raises(UserError):
            main([str(word) for word in words])
    file[0].write_bytes(b"<html>")
    ended = subprocess.run([sys.executable, "-m", "lora.files", file[0]], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(f"error: {file[0]}: not a readable") and len(ended.stderr.splitlines()) == 1


def test_looking_at_a_file_imports_no_torch(file):
    """So that infer and train refuse a wrong file before the seconds that torch takes."""
    code = "import sys; from lora.contents import look; look(sys.argv[1]); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, file[0]], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_pefts_own_file_takes_alpha_from_the_config_next_to_it(unet, _toy_unet, tmp_path):
    """Without it the scale would be a guess."""
    adapters = inject_filled(unet)
    export(adapters, tmp_path / "ours.safetensors", Origin("x", "y", 64))
    tensors = {}
    for name, (A, B) in adapters.projections().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.half().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.half().contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"peft's keys, and no adapter_config\.json next to it"):
        look(tmp_path / "adapter_model.safetensors")
    config = dict(r=adapters.rank, lora_alpha=adapters.alpha)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | dict(use_rslora=True)))
    with pytest.raises(UserError, match=r"adapter_config\.json scales layers each in its own way"):
        look(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours, peft = (look(tmp_path / name) for name in ("ours.safetensors", "adapter_model.safetensors"))
    assert peft.alpha == ours.alpha == adapters.alpha != adapters.rank and peft.layers.keys() == ours.layers.keys()
