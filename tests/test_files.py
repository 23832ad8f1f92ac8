"""The weights file: every tool's keys, the same numbers in diffusers, the same bytes each time, and what is refused."""

import copy
import itertools
import json
import pickle
import struct

import pytest
import torch
from conftest import inject_filled, narrow_sdxl_unet, predict, sdxl_unet, unet_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from data.common.errors import UserError
from lora.files import export, key, load, read
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


def sdxl_keys():
    """{layer in diffusers' UNet: its key}, all 560, written out from the table."""
    keys = {}
    for block, (path, depths) in SGM.items():
        for depth, attention, layer in itertools.product(range(depths), ("attn1", "attn2"), LAYERS):
            spelled = f"lora_unet_{block}_transformer_blocks_{depth}_{attention}_{layer.replace('.', '_')}"
            keys[f"{path}.transformer_blocks.{depth}.{attention}.{layer}"] = spelled
    return keys


@pytest.fixture
def file(unet, tmp_path):
    """An exported file with alpha 6 at rank 4, and the adapters it was made from."""
    adapters = inject_filled(unet)
    path = tmp_path / "mine.safetensors"
    export(adapters, path, base="someone/some-model", resolution=1024)
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


def test_the_560_keys_of_full_sdxl():
    """A key spelled otherwise is ignored, silently, by ComfyUI, A1111, Forge or sd-scripts."""
    wanted = sdxl_keys()
    assert len(wanted) == len(set(wanted.values())) == 560
    assert {name: key(name) for name, _, _ in targets(sdxl_unet())} == wanted


def test_diffusers_reads_the_keys_of_full_sdxl_back_as_its_own():
    """diffusers' converter, an independent reading of the same spelling: all 560 layers, none left over."""
    from diffusers import StableDiffusionXLPipeline

    unet = sdxl_unet()
    tensors = {}
    for name, inside, out in targets(unet):
        tensors[f"{key(name)}.lora_down.weight"] = torch.zeros(1, inside)
        tensors[f"{key(name)}.lora_up.weight"] = torch.zeros(out, 1)
        tensors[f"{key(name)}.alpha"] = torch.tensor(1.0)
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)
    spelled = [name.replace(".processor", "").replace("to_out_lora", "to_out.0_lora") for name in converted]
    layers = {name.removeprefix("unet.").split("_lora.")[0] for name in spelled}
    assert layers == {name for name, _, _ in targets(unet)} and len(converted) == 1120 and len(alphas) == 560


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
    export(adapters, tmp_path / "before.safetensors", base="x", resolution=1024)  # the layers' copies are still old
    adapters.refresh()
    export(adapters, tmp_path / "after.safetensors", base="x", resolution=1024)
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
    assert facts["ss_output_name"] == facts["modelspec.title"] == "mine"
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert facts["modelspec.resolution"] == "1024x1024"
    assert facts["modelspec.sai_model_spec"] and facts["modelspec.implementation"]
    assert "someone/some-model" in facts.values()
    assert "lora_adapter_metadata" not in facts
    assert not [name for name in facts if "date" in name or "path" in name or "dir" in name]


def test_the_same_weights_give_the_same_bytes(file, tmp_path):
    """safetensors by itself writes metadata in random order: the same run would have another checksum each time."""
    path, adapters = file
    for i in range(5):
        other = tmp_path / str(i) / path.name
        export(adapters, other, base="someone/some-model", resolution=1024)
        assert other.read_bytes() == path.read_bytes()
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert (8 + size) % 8 == 0 and list(header["__metadata__"]) == sorted(header["__metadata__"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_gives_the_exported_weights_rank_and_alpha(dtype, file, _toy_unet):
    """In the vector that is trained and in the layers that compute, which would draw the base without a refresh."""
    path, adapters = file
    again, facts = load(copy.deepcopy(_toy_unet).to(dtype), read(path)), read(path).metadata
    assert (again.rank, again.alpha) == (4, 6) and facts["ss_output_name"] == "mine"
    computing, training = own_rows(again), again.projections()
    assert computing.keys() == training.keys() == own_rows(adapters).keys()
    for name, pair in own_rows(adapters).items():
        for number, ours, theirs in zip(pair, computing[name], training[name]):
            assert ours.dtype == dtype and torch.equal(ours, number.half().to(dtype))
            assert torch.equal(theirs, number.half().float())


@pytest.mark.parametrize("alpha", [4.0, 6.0, 1.0])
def test_diffusers_loads_the_file_to_the_same_output(alpha, unet, _toy_unet, tmp_path):
    """At alpha = rank an alpha that the loader does not read would not show; 6 and 1 at rank 4 show it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    inputs, path = unet_inputs(), tmp_path / "lora.safetensors"
    export(inject_filled(unet, rank=4, alpha=alpha), path, base="x", resolution=1024)
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
        export(adapters, path, base="x", resolution=1024)
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


def rename_to_diffusers_keys(path):
    tensors = load_file(path)
    save_file({n.replace("lora_unet_", "unet.").replace("lora_down", "lora_A"): t for n, t in tensors.items()}, path)


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
    "no down": (remove(DOWN), DOWN),
    "no up": (remove(UP), UP),
    "no alpha": (remove(ALPHA), ALPHA),
    "a key of a text encoder": (
        lambda p: save_file({**load_file(p), "lora_te1_x.alpha": torch.ones(())}, p),
        "lora_te1_x.alpha",
    ),
    "diffusers' keys": (rename_to_diffusers_keys, "unet.input_blocks"),
    "transposed": (damage(DOWN, lambda t: t.T.contiguous()), DOWN),
    "wrong width": (damage(UP, lambda t: t[:-1].contiguous()), UP),
    "wrong axes": (damage(DOWN, lambda t: t[None].contiguous()), DOWN),
    "NaN": (damage(UP, first_value(torch.nan)), UP),
    "inf": (damage(DOWN, first_value(torch.inf)), DOWN),
    "NaN alpha": (damage(ALPHA, first_value(torch.nan)), ALPHA),
    "integers": (damage(DOWN, lambda t: t.int()), DOWN),
    "mixed ranks": (
        lambda p: (damage(DOWN, lambda t: t[:2].contiguous())(p), damage(UP, lambda t: t[:, :2].contiguous())(p)),
        r"ranks \[2, 4\]",
    ),
    "up of another rank": (damage(UP, lambda t: t[:, :2].contiguous()), r"ranks \[2, 4\]"),
    "mixed alphas": (damage(ALPHA, lambda t: t + 1), r"alphas \[6.0, 7.0\]"),
    "alpha 0": (
        lambda p: save_file({n: t * 0 if n.endswith("alpha") else t for n, t in load_file(p).items()}, p),
        "alpha 0",
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
    """The toy's weights into full SDXL: the keys that fit have other shapes, and many are missing."""
    with pytest.raises(UserError, match="missing"):
        load(sdxl_unet(), read(file[0]))


def test_metadata_of_another_tool_does_not_matter(file, _toy_unet, tmp_path):
    """Files without metadata exist; rank and alpha come from the tensors."""
    path = tmp_path / "bare.safetensors"
    path.write_bytes(save(load_file(file[0])))
    adapters, facts = load(copy.deepcopy(_toy_unet), read(path)), read(path).metadata
    assert (adapters.rank, adapters.alpha, facts) == (4, 6, {})


def test_fp32_files_load(file, _toy_unet, tmp_path):
    path = tmp_path / "fp32.safetensors"
    save_file({n: t.float() for n, t in load_file(file[0]).items()}, path)
    assert load(copy.deepcopy(_toy_unet), read(path)).rank == 4


def test_inject_then_load_is_refused(file, unet):
    with pytest.raises(UserError, match="adapter already"):
        load(unet, read(file[0]))  # the fixture injected it
