"""What drawing gives up for which memory: in order, no more than needed, and never more than there is."""

from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPTS, SDXL, narrow_sdxl_unet
from diffusers import AutoencoderKL
from test_compare import compare, pictures, same, trained  # noqa: F401 - a fixture
from test_samples import alive
from test_streamed import Late, late, streaming  # noqa: F401 - a fixture

import infer.compare
from data import check
from data.common.errors import MachineError
from infer import memory, streamed
from infer.memory import Fit
from lora.inject import inject
from tests.bench.full_size import VAE

GIB = 2**30
CARDS = 9, 6.5, 4, 2.2  # GiB without CUDA's own
RANK_32 = [SimpleNamespace(rank=32, kind="attn"), SimpleNamespace(rank=4, kind="attn-mlp")]


def fit(there, resolution=1024, loras=RANK_32, vae=VAE):
    return memory.fit(SDXL, vae, resolution, torch.float16, loras, there, GIB)


@pytest.mark.slow
def test_first_tiles_then_blocks_and_no_more_of_either_than_needed(capsys):
    found = [fit(int(gib * GIB)) for gib in CARDS]
    said = capsys.readouterr().out.splitlines()
    assert found[:2] == [Fit(), Fit(tiles=True)] and all(how.tiles for how in found[1:])
    counts = [len(how.blocks) for how in found[2:]]
    assert counts == sorted(set(counts)) and counts[0] > 0 and counts[-1] < 87
    for line, gib in zip(said, CARDS, strict=True):
        predicted = float(line.split("predicted peak ")[1].split(",")[0])
        assert line.startswith(f"memory: {gib + 1:.2f} GiB, ") and predicted <= gib + 1
        if gib <= 6:  # and not a gigabyte less than there is
            assert predicted > gib + 0.9
    assert "enough for all" in said[0] and "tiles" in said[1] and "RAM" not in said[1] and "RAM" in said[2]
    small = fit(int(4 * GIB), resolution=512)
    assert small.blocks and "tiles" not in capsys.readouterr().out  # a picture of 512 is one tile


@pytest.mark.slow
def test_the_smallest_that_is_named_is_enough_and_less_is_not():
    with pytest.raises(MachineError, match="at least --vram_gib ([0-9.]+) is needed") as caught:
        fit(0)
    smallest = float(str(caught.value).split("--vram_gib ")[1].split()[0])
    assert 2 < smallest < 4
    fit(int((smallest - 1) * GIB))
    with pytest.raises(MachineError):
        fit(int((smallest - 1.02) * GIB))


@pytest.mark.slow
def test_a_larger_lora_and_a_vae_in_fp32_leave_less():
    there = int(5 * GIB)
    assert len(fit(there).blocks) < len(fit(there, vae=VAE | dict(force_upcast=True)).blocks)
    assert len(fit(there).blocks) < len(fit(there, loras=[SimpleNamespace(rank=64, kind="attn")]).blocks)
    assert len(fit(there, loras=[]).blocks) < len(fit(there).blocks)


@pytest.mark.slow
def test_the_weights_that_are_counted_are_those_on_the_device(late):  # noqa: F811
    """All that the streamed UNet holds there, and what a LoRA takes, byte for byte."""
    unet = narrow_sdxl_unet()
    chosen = memory._spread(tuple(memory.blocks(unet)), 40)
    whole = memory._bytes(unet, torch.float32)
    other, blocks = streaming(unet, chosen)
    in_places = {weight.data_ptr() for block in blocks.blocks for weight in block.parameters()}
    there = sum(w.nbytes for w in other.parameters() if w.data_ptr() not in in_places) + blocks.places.nbytes
    sizes = [memory._bytes(unet.get_submodule(name), torch.float32) for name in chosen]
    counted = whole + memory.in_exchange(sizes)
    assert counted <= there < counted * 1.01  # each tensor begins at a round address
    contents = SimpleNamespace(rank=4, kind="attn")
    lora = memory.of_a_lora(unet, contents, torch.float32)
    adapters = inject(unet, 4, 4.0)
    drawn = sum(p.nbytes for p in adapters.parameters)
    flat = [adapters.vector, adapters.vector.grad, adapters._copy, adapters._grad_copy]
    assert 0 <= sum(x.nbytes for x in flat) + drawn - lora < 0.2 * lora


@pytest.mark.slow
def test_a_picture_that_is_decoded_whole_is_counted():
    with torch.device("meta"):
        decoder, latent = AutoencoderKL(**VAE).half().decoder, torch.zeros(1, 4, 128, 128).half()
    held = sum(p.nbytes for p in decoder.parameters()) + alive(decoder, latent)
    counted = memory.drawing(SDXL, VAE, 1024, torch.float16, tiles=False) - memory.SPARE
    assert held < counted < 2.5 * held


@pytest.mark.slow
def test_the_pictures_are_the_same_with_blocks_in_ram(run, trained, unet, late, monkeypatch):  # noqa: F811
    """Through the command: of the base, and with a LoRA put in and taken out."""
    made, names = [], tuple(memory.blocks(unet))
    monkeypatch.setattr(infer.compare, "Streamed", lambda *given: made.append(streamed.Streamed(*given)))
    monkeypatch.setattr(infer.compare, "Fit", lambda: Fit(True, names))
    again, first = compare(trained, *PROMPTS), pictures(run.folder)
    assert len(made) == 1 and isinstance(made[0].copies, Late) and len(made[0].copies.made) > 100
    assert all(same(again[name], first[name]) for name in first) and again.keys() == first.keys()


def test_where_there_is_no_gpu_the_flag_is_said_to_do_nothing(trained, capsys):  # noqa: F811
    compare(trained, "a fox", num_inference_steps=1, vram_gib=4)
    assert "--vram_gib is about a GPU's memory; there is none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "vram, others, there, held",
    [(None, 6, 10, 15 / 16), (8, 0.25, 7.75, 0.25), (8, 6, 8 - 15 / 16, 15 / 16), (12, 6, 10, 15 / 16)],
)
def test_the_room_counts_what_cuda_holds_but_not_all_that_others_do(vram, others, there, held, monkeypatch):
    """Of 16 GiB, in GiB; what we reserved before is there as well, and a quarter is taken later."""
    own, later = GIB, GIB // 4
    free = int((16 - others) * GIB) - own
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: own)
    allocator, beside = check.room(vram, torch.device("cuda"), later)
    assert allocator == int(there * GIB) - later and beside == int(held * GIB) + later
