"""The training loop: against a plain loop written out, and through everything that can stop it."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import (
    PIPELINE,
    ROOT,
    STEPS,
    TRAIN,
    Forked,
    again,
    change_cache,
    here,
    lines,
    metrics,
    settings,
    untitled,
    vector,
    when,
)
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load

from data.cache import Cache
from data.common.errors import NumbersError, UserError
from lora.inject import inject
from train import plan
from train.batches import Batches
from train.optimizer import make_optimizer


def train(run, *more):
    here("train", "--output_dir", run, *TRAIN, *more)


def weights(run):
    return untitled(run / "lora.safetensors")


# ---- What is trained


def test_three_steps_equal_a_plain_loop(fresh, unet):
    """Accumulation, loss, clipping, AdamW and what the UNet is told, written out with diffusers and torch alone."""
    values = dict(
        rank=4,
        lora_alpha=6.0,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        seed=3,
        max_grad_norm=0.05,
    )
    values |= dict(
        mixed_precision="no", max_train_steps=3, proportion_empty_prompts=0.3, noise_offset=0.1, output_dir=str(fresh)
    )
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    here("train", *flags)

    cache, scheduler = Cache(fresh / "cache"), DDPMScheduler.from_pretrained(PIPELINE / "scheduler")
    adapters = inject(unet, 4, 6.0, seed=3)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    assert len(parameters) == len(adapters.parameters)
    optimizer = torch.optim.AdamW(adapters.parameters, lr=1e-2, weight_decay=1e-2)  # each A and B by itself
    losses, norms = [], []
    for step in range(3):
        total = 0
        for slot in range(2):
            b = Batches(cache, settings("train", **values), 1000).draw(step, slot)
            noisy = scheduler.add_noise(b["x0"], b["eps"], b["t"])
            predicted = unet(
                noisy,
                b["t"],
                b["text"].float(),
                added_cond_kwargs=dict(text_embeds=b["pooled"].float(), time_ids=b["time_ids"]),
            ).sample
            total = total + torch.nn.functional.mse_loss(predicted, b["eps"]) / 2
        total.backward()
        losses.append(total.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.05).item())
        optimizer.step()
        optimizer.zero_grad()
    assert [m["loss"] for m in metrics(fresh)] == pytest.approx(losses, rel=1e-4)
    assert [m["grad_norm"] for m in metrics(fresh)] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.05  # the clipping was at work
    adapters.vector.data.copy_(vector(fresh, 3))
    for master, plain in zip(adapters.masters, adapters.parameters):
        off = (master - plain.detach()).abs()  # of 0.03; AdamW makes much of a gradient near zero
        assert off.max() < 1e-3 and (off > 1e-4).double().mean() < 0.01


def test_it_learns(run):
    """Eight pictures, six steps at a large learning rate: B leaves zero, the prediction changes."""
    assert vector(run.folder, STEPS).isfinite().all()
    state = load((run.folder / "lora.safetensors").read_bytes())
    assert all(t.any() for name, t in state.items() if "lora_up" in name)


SCHEDULES = [("constant_with_warmup", 3), ("cosine", 2)]
SCHEDULES += [pytest.param(name, 0, marks=pytest.mark.slow) for name in ("constant", "linear")]


@pytest.mark.slow
@pytest.mark.parametrize("schedule, warmup", SCHEDULES)
def test_the_learning_rate_is_the_schedulers(schedule, warmup, fresh):
    """diffusers' own scheduler stepped once per optimizer step, from its first value on."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    wanted = []
    for _ in range(STEPS):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), theirs.step()
    train(
        fresh,
        "--lr_scheduler",
        schedule,
        "--lr_warmup_steps",
        warmup,
        "--gradient_accumulation_steps",
        1,
        "--train_batch_size",
        1,
    )
    assert [m["lr"] for m in metrics(fresh)] == pytest.approx(wanted)


def test_recomputing_activations_changes_no_bit(fresh, tmp_path, monkeypatch, unet):
    """fp32, the state's vector and not the export: and it is recomputed indeed."""
    calls, real = [], plan._checkpoint
    monkeypatch.setattr(plan, "_checkpoint", lambda *a, **k: (calls.append(a[0]), real(*a, **k))[1])
    train(fresh, "--max_train_steps", 2)
    assert not calls
    other = again(fresh, tmp_path, "recomputed")
    train(other, "--max_train_steps", 2, "--gradient_checkpointing")
    blocks = sum(isinstance(m, (ResnetBlock2D, BasicTransformerBlock)) for m in unet.modules())
    assert (
        len(set(calls)) == len(calls) / 4 == blocks - 1
    )  # two steps of two micro-steps; diffusers leaves mid_block.resnets.0 out
    assert torch.equal(vector(fresh, 2), vector(other, 2))
    assert [m["grad_norm"] for m in metrics(fresh)] == [m["grad_norm"] for m in metrics(other)]


def test_eight_bit_adam_on_the_flat_vector_equals_one_tensor_at_a_time():
    """Bit for bit, for tensors of 4,096 numbers or more: padded to 256, a quantisation block stays in one tensor."""
    bnb = pytest.importorskip("bitsandbytes")

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (
                torch.nn.Linear(1024, 1024),
                torch.nn.Linear(1001, 1001),
                torch.nn.Linear(2048, 900),
            )
            self.to_out = torch.nn.ModuleList([torch.nn.Linear(1280, 1280)])

    adapters = inject(torch.nn.Sequential(Attention()), 5, 5.0)
    parts = adapters.parameters
    assert min(p.numel() for p in parts) >= 4096 and any(p.numel() % 256 for p in parts)
    alone = [torch.nn.Parameter(p.detach().clone()) for p in parts]
    ours = make_optimizer(adapters.vector, settings("train", use_8bit_adam=True, learning_rate=1e-2))
    theirs = bnb.optim.AdamW8bit(alone, lr=1e-2, weight_decay=1e-2)
    assert isinstance(ours, bnb.optim.AdamW8bit)
    for step in range(12):
        g = torch.Generator().manual_seed(step)
        for single in alone:
            single.grad = torch.randn(single.shape, generator=g) * 10 ** torch.randn(1, generator=g)
        adapters.vector.grad.zero_()
        adapters.add_gradients([single.grad for single in alone])
        ours.step(), theirs.step()
        adapters.refresh()
        assert all(torch.equal(part, single) for part, single in zip(parts, alone)), step


@pytest.mark.slow
def test_deterministic_asks_for_kernels_of_a_fixed_order(fresh, tmp_path, monkeypatch):
    """And changes nothing on a CPU, whose sums have one anyway."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    other = again(fresh, tmp_path, "deterministic")
    train(fresh, "--max_train_steps", 2)
    assert not asked
    train(other, "--max_train_steps", 2, "--deterministic")
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.equal(vector(fresh, 2), vector(other, 2))


@pytest.mark.gpu
def test_deterministic_on_a_gpu_gives_the_same_bytes_twice_and_resumed(cached, tmp_path):
    """In a process of its own: what it switches stays on."""
    folders = [again(cached, tmp_path, name) for name in ("once", "twice", "resumed")]
    flags = [*TRAIN, "--mixed_precision", "fp16", "--deterministic"]
    runs = [["--output_dir", folders[2], *flags, "--max_train_steps", 3]]
    runs += [["--output_dir", folder, *flags] for folder in folders]
    code = "import json, sys; from train.__main__ import main; [main(argv) for argv in json.loads(sys.argv[1])]"
    words = json.dumps([[str(word) for word in argv] for argv in runs])
    subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, check=True)
    assert weights(folders[0]) == weights(folders[1]) == weights(folders[2])


# ---- Stopping and going on


@pytest.mark.slow
def test_same_seed_two_folders_same_bytes(run, fresh):
    """One process started by python -m train, one here."""
    other = again(fresh, fresh.parent, "other")
    train(fresh)
    same_as_uninterrupted(fresh, run)
    train(other, "--seed", 43)
    assert not torch.equal(vector(other, STEPS), vector(fresh, STEPS))


def same_as_uninterrupted(folder, run):
    assert weights(folder) == weights(run.folder)
    assert torch.equal(vector(folder, STEPS), vector(run.folder, STEPS))
    assert [m["step"] for m in metrics(folder)] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics(folder)] == [m["loss"] for m in metrics(run.folder)]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_kill_9_at_a_step_and_run_again(step, fresh, run, tmp_path):
    """A real process, killed when the step's line is in metrics.jsonl: before, after and while saving."""
    process = Forked("train", ("--output_dir", fresh, *TRAIN), tmp_path / "log")
    when(lambda: lines(fresh / "metrics.jsonl") >= step, process)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (fresh / "lora.safetensors").exists()
    train(fresh)
    same_as_uninterrupted(fresh, run)


@pytest.mark.slow
def test_killed_again_and_again(fresh, run, tmp_path):
    for step in (1, 3, 5):
        process = Forked("train", ("--output_dir", fresh, *TRAIN, "--checkpointing_steps", 1), tmp_path / "log")
        when(lambda: lines(fresh / "metrics.jsonl") >= step, process)
        process.send(signal.SIGKILL)
        process.wait()
    train(fresh)
    same_as_uninterrupted(fresh, run)


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_and_the_same_command_goes_on(signum, code, fresh, run, tmp_path):
    process = Forked("train", ("--output_dir", fresh, *TRAIN, "--checkpointing_steps", 100), tmp_path / "log")
    when(lambda: lines(fresh / "metrics.jsonl") >= 1, process)
    process.send(signum)
    assert process.wait() == code
    done = lines(fresh / "metrics.jsonl")
    assert 1 <= done < STEPS and (fresh / "state" / f"{done:06d}.state").exists()
    assert f"stopped after step {done}, saved; run the same command to go on" in process.output
    assert not (fresh / "lora.safetensors").exists()
    train(fresh)
    same_as_uninterrupted(fresh, run)


@pytest.mark.slow
def test_the_plan_may_change_between_runs(fresh, run):
    """More steps, another saving interval or another way to compute go on with the same numbers."""
    train(fresh, "--max_train_steps", 2, "--gradient_checkpointing", "--no_cuda_graph")
    train(fresh, "--max_train_steps", 3, "--vram_gib", 4)
    train(fresh, "--checkpointing_steps", 3)
    same_as_uninterrupted(fresh, run)


@pytest.mark.slow
def test_the_first_and_the_last_line_say_what_is_done(cached, tmp_path, capsys):
    """What one would ask a colleague: how many pictures and epochs, how large, from where, how long, and what next."""
    folder = again(cached, tmp_path, "talks")
    train(folder, "--max_train_steps", 12, "--checkpointing_steps", 5)
    out = capsys.readouterr().out
    assert "8 pictures, none held out; batch 2 × 2 = 4 a step; 12 steps = 6.0 epochs\n" in out
    assert (
        "rank 4 on 128 projections, 0.08 million weights; --mixed_precision no, --base_precision plain; nothing" in out
    )
    assert "a save after every 5 steps: 2 states of 1 MiB and 4 × 1 MiB of weights; from step 0\n" in out
    assert re.search(r"2 more steps will take about \d+ seconds?\n", out)
    assert f"{folder}/lora.safetensors after " in out and f"next: python -m infer --output_dir {folder} --prompt" in out
    assert len(list(folder.glob("lora*.safetensors"))) == 4
    train(folder, "--max_train_steps", 13, "--checkpointing_steps", 5)
    assert "2 × 1 MiB of weights; from step 12\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_is_called_so(fresh):
    """Eight names of pictures would send somebody looking for a bad picture. What was good so far is saved."""
    with pytest.raises(
        NumbersError, match=r"\(step \d+: the LoRA's weights are too large, lower --learning_rate\); .*state"
    ):
        train(fresh, "--max_train_steps", 40, "--learning_rate", 1e8, "--max_grad_norm", 1e8)
    done = int(next((fresh / "state").glob("*.state")).stem)
    assert vector(fresh, done).isfinite().all() and lines(fresh / "metrics.jsonl") == done


@pytest.mark.slow
def test_a_changed_schedule_is_said(fresh, capsys):
    train(fresh, "--max_train_steps", 1, "--lr_scheduler", "cosine")
    train(fresh, "--max_train_steps", 2, "--lr_scheduler", "cosine")
    assert "--max_train_steps was 1: the learning rate goes on along the new schedule" in capsys.readouterr().out


def test_a_finished_run_says_so_and_exports_the_same(run, tmp_path, capsys):
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder)
    before = (folder / "metrics.jsonl").read_bytes()
    train(folder)
    assert f"finished, {STEPS} steps are done" in capsys.readouterr().out
    same_as_uninterrupted(folder, run)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_damaged_newest_state_falls_back_to_the_same_end(run, tmp_path, capsys):
    """One bit of the last state: the steps since the one before are trained again, to the same bytes."""
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder)
    (folder / "lora.safetensors").unlink()
    path = folder / "state" / f"{STEPS:06d}.state"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 3] ^= 4
    path.write_bytes(blob)
    train(folder)
    assert f"{path}: damaged" in capsys.readouterr().out
    same_as_uninterrupted(folder, run)


@pytest.mark.parametrize(
    "change",
    [("--rank", 5), ("--seed", 43), ("--lora_alpha", 4), ("--train_batch_size", 1), ("--mixed_precision", "bf16")],
)
def test_a_changed_run_is_refused_naming_the_field(change, run, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError, match=rf"\b{change[0].removeprefix('--')} .* there, {change[1]}.* here"):
        train(folder, *change)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_schedule_that_ends_above_its_peak_is_refused(fresh):
    with pytest.raises(
        UserError, match="--learning_rate 1e-07: polynomial ends at 1e-07; use a larger one or another --lr_scheduler"
    ):
        train(fresh, "--lr_scheduler", "polynomial", "--learning_rate", 1e-7)


def test_a_changed_dataset_is_refused(run, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder)
    change_cache(folder, content="other")
    with pytest.raises(UserError, match="the cache was encoded by another model or VAE"):
        train(folder)


def test_the_steps_are_on_disk_before_the_state_that_counts_them(fresh, monkeypatch):
    """A power cut between the two would leave a state at step 2 and one line in metrics.jsonl."""
    done, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), real(file))[1])
    train(fresh, "--max_train_steps", 2, "--checkpointing_steps", 1)
    names = [path.rsplit("/", 1)[1] for path in done if path.endswith((".jsonl", ".unfinished"))]
    order = [
        "metrics" if name == "metrics.jsonl" else "state" for name in names if "metrics" in name or ".state" in name
    ]
    assert order == ["metrics", "state"] * 2


# ---- Numbers


def test_nan_in_the_data_stops_naming_rows_and_timesteps(fresh):
    """Good checksums around a NaN: no step is taken with it, the state before stays, nothing is exported as final."""
    cache = Cache(fresh / "cache")
    values = settings("train", train_batch_size=2, gradient_accumulation_steps=2)
    batches = Batches(cache, values, 1000)
    bad = batches.rows(3, 1)[0]  # first seen in step 4 or before
    seen = next(step for step in range(4) for slot in range(2) if bad in batches.rows(step, slot))
    at = int(cache.index[bad]["picture"])
    moments = cache.posteriors[0]
    row = moments[at].copy()
    row[0, 0, 0, 0] = np.nan
    with open(moments.path, "r+b") as file:
        file.seek(at * moments.row_bytes)
        file.write(row.tobytes())
    with open(moments.keys_path, "r+b") as file:
        file.seek(at * 36 + 32)
        file.write(struct.pack("<I", zlib.crc32(row)))
    with pytest.raises(
        NumbersError,
        match=rf"the loss is nan \(step {seen + 1}, .*{bad:03d}\.png, .*timesteps \[\d+, \d+, \d+, \d+\]; "
        "the first output that is not finite is conv_in's",
    ):
        train(fresh, "--checkpointing_steps", 1)
    assert [m["step"] for m in metrics(fresh)] == list(range(1, seen + 1))
    assert not (fresh / "lora.safetensors").exists()
    if seen:
        assert vector(fresh, seen).isfinite().all()
    assert len(list((fresh / "state").glob("*"))) == min(seen, 2)


FP16 = ("--mixed_precision", "fp16", "--train_batch_size", 1, "--gradient_accumulation_steps", 1)


@pytest.fixture
def loss_scale(monkeypatch):
    """loss_scale(x): the next run's GradScaler starts at x, so that the first gradients overflow fp16."""
    real = torch.amp.GradScaler
    return lambda scale: monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, **k, init_scale=scale))


@pytest.mark.slow
def test_fp16_trains_close_to_fp32(fresh, tmp_path):
    """The scaler is at work and out of the way: unscaled before the clip, no overflow at its own start."""
    other = again(fresh, tmp_path, "fp32")
    train(fresh, *FP16, "--max_train_steps", 3)
    train(other, *FP16, "--max_train_steps", 3, "--mixed_precision", "no")
    half, full = metrics(fresh), metrics(other)
    assert all(m["loss_scale"] > 1000 and m["overflows"] == 0 for m in half)
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in half] == pytest.approx([m[name] for m in full], rel=0.05)


@pytest.mark.slow
def test_an_overflow_is_skipped_halved_and_recovered_from(fresh, loss_scale):
    """Every skipped step halves the scale, every other keeps it; overflows are counted in a row."""
    loss_scale(2.0**24)
    train(fresh, *FP16, "--max_train_steps", 10, "--learning_rate", 1e-4)
    scale, in_a_row, taken = 2.0**24, 0, 0
    for m in metrics(fresh):
        skipped = m["grad_norm"] is None
        scale, in_a_row, taken = (scale / 2, in_a_row + 1, taken) if skipped else (scale, 0, taken + 1)
        assert (m["loss_scale"], m["overflows"]) == (scale, in_a_row)
    assert 1 <= taken < 10
    assert vector(fresh, 10).isfinite().all()


@pytest.mark.slow
def test_a_skipped_step_changes_no_weight(fresh, loss_scale, unet):
    loss_scale(2.0**60)
    train(fresh, *FP16, "--max_train_steps", 2)
    assert [m["overflows"] for m in metrics(fresh)] == [1, 2]
    assert torch.equal(vector(fresh, 2), inject(unet.half(), 4, 6.0, seed=42).vector)  # A starts in the base's dtype


@pytest.mark.slow
def test_a_run_resumed_among_overflows_equals_one_that_was_not_stopped(fresh, tmp_path, loss_scale):
    """The scale is in the state: started anew it would overflow again."""
    loss_scale(2.0**24)
    other = again(fresh, tmp_path, "stopped")
    train(fresh, *FP16, "--max_train_steps", 12)
    train(other, *FP16, "--max_train_steps", 5)
    train(other, *FP16, "--max_train_steps", 12)
    assert torch.equal(vector(fresh, 12), vector(other, 12))
    assert [m["loss_scale"] for m in metrics(fresh)] == [m["loss_scale"] for m in metrics(other)]


@pytest.mark.slow
def test_overflows_without_end_stop_the_run(fresh, loss_scale):
    loss_scale(2.0**100)
    with pytest.raises(NumbersError, match=r"overflowed fp16 20 times in a row; .* \(step 20, 00\d\.png, "):
        train(fresh, *FP16, "--max_train_steps", 40)
    assert not (fresh / "lora.safetensors").exists() and len(metrics(fresh)) == 19


# ---- Refusals


def test_without_a_cache_the_command_that_makes_one_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished cache here; run python -m data.precompute"):
        train(tmp_path / "run")


def test_a_unet_that_does_not_fit_the_text_is_refused(fresh):
    change_cache(fresh, text_shape=[77, 7])
    with pytest.raises(UserError, match="its UNet wants text of width .* the cache has 7"):
        train(fresh)
