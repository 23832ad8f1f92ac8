"""Pictures while training: what infer would draw, at the saves, and nothing of what is trained knows of them."""

import copy
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    PIPELINE,
    PROMPTS,
    ROOT,
    STEPS,
    TRAIN,
    content,
    here,
    inject_filled,
    precompute,
    sdxl_unet,
    settings,
    untitled,
)
from diffusers import AutoencoderKL
from PIL import Image
from test_loop import metrics, vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import infer.sample
from data.cache import Cache, _checksum, read_manifest
from data.common import door
from data.common.errors import NumbersError, Stopped, UserError
from data.common.flags import Infer
from data.models import fused
from data.models.files import Model
from infer import memory
from infer.compare import difference
from lora.inject import inject
from tests.bench.full_size import VAE
from train import plan
from train.samples import Samples

GOING = SimpleNamespace(received=None)  # no signal came


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, cached, pictures):
    """The cache of `cached` after the prompts of the session's run were added; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("prompted") / "run"
    shutil.copytree(cached, folder)
    precompute(folder, pictures, "--validation_prompt", *PROMPTS)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """As many sampler steps as the session's run was compared with."""
    monkeypatch.setattr(Infer, "num_inference_steps", 2)


def pixels(path):
    return np.asarray(Image.open(path))


def train(folder, *more):
    here("train", "--output_dir", folder, *TRAIN, *more)


def same_as_without(folder, run):
    assert untitled(folder / "lora.safetensors") == untitled(run.folder / "lora.safetensors")
    assert torch.equal(vector(folder, STEPS), vector(run.folder, STEPS))
    assert [m["loss"] for m in metrics(folder)] == [m["loss"] for m in metrics(run.folder)]


# ---- In the cache


def test_prompts_of_the_beginning_and_prompts_added_later_are_the_same_cache(
    prompted, cached, pictures, tmp_path, done
):
    """Byte for byte. Added later, they alone are encoded, and what identifies the data stays."""
    precompute(tmp_path / "run", pictures, "--validation_prompt", *PROMPTS)
    assert content(tmp_path / "run") == content(prompted)
    now, before = read_manifest(prompted / "cache"), read_manifest(cached / "cache")
    assert list(now.pop("validation_prompts")) == list(PROMPTS) and before.pop("validation_prompts") == {}
    assert now.pop("keys") != before.pop("keys") and now == before
    shutil.copytree(cached, tmp_path / "later")
    done["captions"].clear(), done["pictures"].clear()
    precompute(tmp_path / "later", pictures, "--validation_prompt", PROMPTS[0])
    precompute(tmp_path / "later", pictures, "--validation_prompt", *PROMPTS)
    assert done["captions"] == list(PROMPTS) and not done["pictures"]
    precompute(tmp_path / "later", pictures)
    assert content(tmp_path / "later")["manifest.json"] == content(cached)["manifest.json"]


def test_a_prompt_is_found_under_its_own_text(prompted, pictures, tmp_path):
    """One that is a caption of a picture, too, has its row; what is odd in a text is not read as anything."""
    caption = json.loads((pictures / "metadata.jsonl").read_text().splitlines()[3])["text"]
    odd = ("", "a\nb\t<lora:x:1> ../y", "狐 \u202e 🦊", caption, caption)
    shutil.copytree(prompted, tmp_path / "run")
    precompute(tmp_path / "run", pictures, "--validation_prompt", *odd)
    cache = Cache(tmp_path / "run" / "cache")
    rows = cache.manifest["validation_prompts"]
    assert list(rows) == list(dict.fromkeys(odd))
    assert rows[caption] == cache.caption_rows[cache.index["first_caption"][3]]
    assert len(set(rows.values()) | {cache.manifest["unconditional"]}) == 5
    assert not set(rows.values()) & set(read_manifest(prompted / "cache")["validation_prompts"].values())


@pytest.mark.parametrize("damage", ["flipped", "lost"])
def test_a_damaged_prompt_is_refused_told_and_encoded_again(damage, prompted, pictures, tmp_path, done, capsys):
    run = tmp_path / "run"
    shutil.copytree(prompted, run)
    before, path = content(run), run / "cache" / "captions.rows"
    blob = bytearray(before["captions.rows"])
    blob[-1] ^= 8  # the last row is the second prompt's
    path.write_bytes(blob if damage == "flipped" else blob[:-1])
    with pytest.raises(UserError, match="captions.rows: .*run python -m data.precompute again, it repairs it"):
        train(run)
    flags = ("--validation_prompt", *PROMPTS)
    precompute(run, pictures, *flags, "--explain")
    assert "0 of 8 rows to encode: 1 validation prompt; " in capsys.readouterr().out and not done["captions"]
    if damage == "flipped":
        with door.reading(run / "cache"), pytest.raises(UserError, match="rows that they read would change"):
            precompute(run, pictures, *flags)
    precompute(run, pictures, *flags)
    assert done["captions"] == [PROMPTS[1]] and not done["pictures"]
    after = content(run)
    assert {name for name in before if before[name] != after[name]} <= {"captions.rows", "captions.keys"}
    np.testing.assert_allclose(
        *(np.frombuffer(blob["captions.rows"], np.float16) for blob in (before, after)), atol=5e-3
    )


def test_another_row_under_a_prompt_is_named(prompted, tmp_path):
    """Two rows changed places, each with its key: the captions are whole, and the prompts are not what they say."""
    run = tmp_path / "run"
    shutil.copytree(prompted, run)
    for kind, size in (("rows", None), ("keys", 36)):
        path = run / "cache" / f"captions.{kind}"
        blob = path.read_bytes()
        size = size or len(blob) // (len((run / "cache" / "captions.keys").read_bytes()) // 36)
        path.write_bytes(blob[: -2 * size] + blob[-size:] + blob[-2 * size : -size])
    with pytest.raises(UserError, match="captions.rows: not the rows that the index was made for"):
        Cache(run / "cache")


def test_adding_prompts_disturbs_no_reader(cached, pictures, tmp_path):
    shutil.copytree(cached, tmp_path / "run")
    with door.reading(tmp_path / "run" / "cache"):
        precompute(tmp_path / "run", pictures, "--validation_prompt", "a fox")
        precompute(tmp_path / "run", pictures)
    assert not read_manifest(tmp_path / "run" / "cache")["validation_prompts"]


def test_a_cache_of_before_has_no_prompts(cached, tmp_path):
    shutil.copytree(cached, tmp_path / "run")
    path = tmp_path / "run" / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["validation_prompts"], manifest["checksum"]
    path.write_text(json.dumps(manifest | {"checksum": _checksum(manifest)}))
    assert Cache(tmp_path / "run" / "cache").manifest["validation_prompts"] == {}


def test_seventeen_prompts_are_refused_and_a_long_one_is_said(cached, pictures, tmp_path, capsys):
    with pytest.raises(UserError, match="^--validation_prompt: 17 prompts; 16 at most$"):
        precompute(tmp_path / "run", pictures, "--validation_prompt", *range(17))
    shutil.copytree(cached, tmp_path / "run")
    precompute(tmp_path / "run", pictures, "--validation_prompt", "a red ball, " * 1000, "a fox")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "longer than CLIP reads" in line]
    assert said.startswith("--validation_prompt 'a red ball, ") and "75 tokens" in said and len(said) < 200
    with pytest.raises(UserError, match="--validation_prompt is a flag of python -m data.precompute"):
        train(tmp_path / "run", "--validation_prompt", "a fox")


# ---- In the loop


@pytest.mark.slow
def test_the_weights_are_the_same_bits_and_the_pictures_are_infers(prompted, run, tmp_path, quick, monkeypatch):
    """The last pictures are those that compare drew of the finished run, but for half precision: of the weights in
    lora.safetensors, and of the text in the cache."""
    shutil.copytree(prompted, tmp_path / "run")
    drawn, draw = [], Samples.draw
    monkeypatch.setattr(Samples, "draw", lambda *given: drawn.extend((found := draw(*given)).values()) or found)
    train(tmp_path / "run")
    same_as_without(tmp_path / "run", run)
    folder = tmp_path / "run" / "samples"
    names = [f"{step:06d}_{i}.png" for step in (2, 4, 6) for i in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(np.array_equal(pixels(folder / name), pixel) for name, pixel in zip(names, drawn, strict=True))
    for i in (0, 1):
        last, before = (Image.open(folder / f"{step:06d}_{i}.png") for step in (6, 4))
        base, tuned = (Image.open(run.folder / "compare" / f"{kind}_{i}.png") for kind in ("baseline", "finetuned"))
        assert difference(last, tuned) < 0.05 < 5 < difference(last, base)
        assert difference(last, before) > 1


@pytest.mark.slow
def test_a_signal_while_a_step_without_a_save_is_drawn_loses_no_step(prompted, run, tmp_path, quick, monkeypatch):
    """The step after it is trained and saved; what is said to be saved is there."""
    shutil.copytree(prompted, tmp_path / "run")
    real = infer.sample.sample
    monkeypatch.setattr(infer.sample, "sample", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), real(*given))[1])
    with pytest.raises(Stopped, match="stopped after step 2, saved"):
        train(tmp_path / "run", "--validation_steps", 1, "--checkpointing_steps", 5)
    assert not (tmp_path / "run" / "samples").exists()  # of a picture that was not finished nothing is kept
    assert (tmp_path / "run" / "state" / "000002.state").exists()
    monkeypatch.setattr(infer.sample, "sample", real)
    train(tmp_path / "run", "--validation_steps", 5)
    same_as_without(tmp_path / "run", run)


@pytest.mark.slow
def test_a_run_goes_on_while_prompts_come_and_go(cached, prompted, run, pictures, tmp_path, quick):
    folder = tmp_path / "run"
    shutil.copytree(cached, folder)
    train(folder, "--max_train_steps", 2)
    precompute(folder, pictures, "--validation_prompt", *PROMPTS)
    train(folder, "--max_train_steps", 4)
    precompute(folder, pictures)
    train(folder)
    same_as_without(folder, run)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["000004_0.png", "000004_1.png"]


def test_something_in_the_place_of_samples_is_found_at_the_door(prompted, tmp_path):
    shutil.copytree(prompted, tmp_path / "run")
    (tmp_path / "run" / "samples").write_text("a file")
    with pytest.raises(UserError, match="samples: not a folder; move it away"):
        train(tmp_path / "run")


@pytest.mark.gpu
def test_on_a_gpu_with_deterministic_the_weights_are_the_same_bits(cached, prompted, tmp_path):
    """Captured graphs and all. In a process of its own, because what --deterministic switches stays on."""
    runs = []
    for name, cache in (("without", cached), ("with", prompted)):
        shutil.copytree(cache, tmp_path / name)
        flags = [*TRAIN, "--mixed_precision", "fp16", "--deterministic"]
        runs.append(["--output_dir", tmp_path / name, *flags])
    code = "import json, sys; from train.__main__ import main; [main(argv) for argv in json.loads(sys.argv[1])[::-1]]"
    words = json.dumps([[str(word) for word in argv] for argv in runs])
    subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, check=True)
    assert len(list((tmp_path / "with" / "samples").glob("*.png"))) == 6
    assert untitled(tmp_path / "with" / "lora.safetensors") == untitled(tmp_path / "without" / "lora.safetensors")


# ---- By themselves


@pytest.fixture
def drawing(prompted, unet, tmp_path, quick):
    """Samples at every second step, of a UNet with adapters in it."""
    inject_filled(unet)
    unet.requires_grad_(False)
    values = settings("train", checkpointing_steps=2, max_train_steps=9)
    model = Model(str(PIPELINE))
    return Samples(values, tmp_path, Cache(prompted / "cache"), model, model, unet)


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), [x.tolist() for x in np.random.get_state()[1:2]]


def test_drawing_leaves_everything_as_it_was(drawing, monkeypatch):
    """Random states, gradient and training modes, who recomputes, the weights; and the VAE is gone at once."""
    unet, loaded, real = drawing.unet, [], infer.sample.make_pipeline
    plan.recompute(unet, None)
    before, weights = random_states(), copy.deepcopy(unet.state_dict())
    modes = {
        name: (module.training, vars(module).get("gradient_checkpointing")) for name, module in unet.named_modules()
    }

    def make_pipeline(*given, **named):
        pipeline = real(*given, **named)
        assert pipeline.vae.encoder is None
        loaded.append(weakref.ref(pipeline.vae))
        return pipeline

    monkeypatch.setattr(infer.sample, "make_pipeline", make_pipeline)
    gc.disable()
    try:
        assert len(drawing.draw(2, GOING)) == 2
        assert len(loaded) == 1 and loaded[0]() is None
    finally:
        gc.enable()
    assert random_states() == before and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    now = {name: (module.training, vars(module).get("gradient_checkpointing")) for name, module in unet.named_modules()}
    assert now == modes
    assert weights.keys() == unet.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    assert not any(value.is_inference() for value in unet.state_dict().values())


def test_pictures_are_drawn_when_it_is_time_and_no_signal_came(drawing, monkeypatch):
    assert [len(drawing.draw(done, GOING)) for done in (1, 2, 3)] == [0, 2, 0]
    stopping = SimpleNamespace(received=15)
    assert drawing.draw(4, stopping) == {} and not (drawing.folder / "000004_0.png").exists()
    real, stopping = infer.sample.sample, SimpleNamespace(received=None)

    steps = []

    def sample(pipeline, *given):
        forward = pipeline.unet.forward

        def counted(*words, **named):
            steps.append(len(pictures))
            stopping.received = 15 if len(pictures) == 1 else None  # in the first step of the second picture
            return forward(*words, **named)

        monkeypatch.setattr(pipeline.unet, "forward", counted)
        try:
            picture = real(pipeline, *given)
        finally:
            monkeypatch.setattr(pipeline.unet, "forward", forward)
        pictures.append(picture)
        return picture

    pictures = []
    monkeypatch.setattr(infer.sample, "sample", sample)
    assert len(drawing.draw(4, stopping)) == 1 and pictures[1:] == [None]
    assert sorted(path.name for path in drawing.folder.glob("000004_*")) == ["000004_0.png"]
    assert steps.count(1) == 1 < steps.count(0)


def raising(monkeypatch, error, calls):
    def sample(*_):
        calls.append(error)
        raise error

    monkeypatch.setattr(infer.sample, "sample", sample)


MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()]
MEMORY += [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]
MEMORY += [RuntimeError("cuModuleLoadData: out of memory")]
MEMORY += [RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_without_memory_one_line_is_said_and_it_is_not_tried_again(error, drawing, monkeypatch, capsys):
    calls = []
    raising(monkeypatch, error, calls)
    assert [drawing.draw(done, GOING) for done in (2, 4, 6)] == [{}, {}, {}] and len(calls) == 1
    (line,) = capsys.readouterr().out.splitlines()
    on_gpu = "cu" in str(error).lower() and "CPU" not in str(error)
    assert line.startswith(f"warning: pictures while training: the {'GPU' if on_gpu else 'machine'} is out of memory")
    assert ("--vram_gib" if on_gpu else "end other programs") in line and line.endswith("training goes on")


def test_without_ram_for_the_decoder_it_is_the_same(drawing, monkeypatch, capsys):
    monkeypatch.setattr("data.common.system.free_memory", lambda: 0)
    assert [drawing.draw(done, GOING) for done in (2, 4)] == [{}, {}]
    assert capsys.readouterr().out.count("the machine is out of memory") == 1


def test_numbers_that_are_not_finite_are_said_once_and_tried_again(drawing, monkeypatch, capsys):
    calls = []
    raising(monkeypatch, NumbersError("black"), calls)
    assert [drawing.draw(done, GOING) for done in (2, 4)] == [{}, {}] and len(calls) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: pictures while training: ") and "not finite" in line


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("shape"), UserError("gone")])
def test_any_other_error_ends_the_run(error, drawing, monkeypatch):
    raising(monkeypatch, error, [])
    with pytest.raises(type(error)):
        drawing.draw(2, GOING)


@pytest.mark.slow
def test_a_larger_picture_is_decoded_in_tiles(drawing, monkeypatch):
    """Each is a quarter over its neighbour, and the picture is close to the one that was decoded whole."""
    drawing.resolution = 128
    whole = drawing.draw(2, GOING).values()
    monkeypatch.setattr(infer.sample, "TILE", 64)
    for a, b in zip(whole, drawing.draw(2, GOING).values(), strict=True):
        assert a.size == b.size == (128, 128) and 0 < difference(a, b) < 12


# ---- Memory


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in here, not of the module's: the most that were alive at once."""

    def __init__(self, module):
        super().__init__()
        self.known, self.now, self.most = {p.untyped_storage()._cdata for p in module.parameters()}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out

    def _gone(self, which, size):
        self.known.discard(which)
        self.now -= size


@torch.no_grad()
def alive(module, *args, **given):
    with Alive(module) as counted:
        module(*args, **given)
    return counted.most


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [1024, 2048])
def test_the_memory_that_is_counted_on_is_enough_for_the_tensors(resolution, monkeypatch):
    """SDXL in fp16, without its memory, in PyTorch's functions, which keep more than ours; attention without scores."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    latent = resolution // 8
    unet = sdxl_unet().half().eval()
    inject(unet, 32, 32.0)
    fused.fuse(unet, torch.device("cpu"))
    with torch.device("meta"):
        decoder = AutoencoderKL(**VAE).half().decoder
        condition = dict(text_embeds=torch.zeros(2, 1280).half(), time_ids=torch.zeros(2, 6))
        xt, text = torch.zeros(2, 4, latent, latent).half(), torch.zeros(2, 77, 2048).half()
        t, tile = torch.zeros(()), torch.zeros(1, 4, memory.TILE // 8, memory.TILE // 8).half()
    weights = sum(p.nbytes for p in decoder.parameters())
    in_unet, in_decoder = alive(unet, xt, t, text, added_cond_kwargs=condition), alive(decoder, tile)
    for upcast in (False, True):
        counted = memory.drawing(unet.config, VAE | dict(force_upcast=upcast), resolution, torch.float16)
        held = weights * (1 + upcast) + max(in_unet, in_decoder * (1 + upcast))
        assert held < counted - memory.SPARE < 2.5 * held
