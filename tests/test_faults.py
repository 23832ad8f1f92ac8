"""What must not go wrong, tried on real processes.

They are killed and signalled at bad moments, meet full disks, and work among a user's own files. The tests of each
source file try what a single function can show.
"""

import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import http.server
import io
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zlib

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    PIPELINE,
    PRECOMPUTE,
    PROMPTS,
    STEPS,
    TOKEN,
    TRAIN,
    Forked,
    again,
    as_a_user,
    caption_rows,
    change_cache,
    command,
    content,
    edit_captions,
    here,
    lines,
    metrics,
    one_line_error,
    precompute,
    settings,
    start,
    untitled,
    vector,
    when,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import infer.compare  # this and train.loop before the processes are forked, or each would import them again
import train.loop  # noqa: F401
from data.cache import Cache, read_manifest
from data.common.errors import UserError
from data.encoders import TextEncoders
from data.loaded import LoadedTextEncoders, LoadedVAE
from train.batches import Batches

SHORT = ("--train_batch_size", 1, "--gradient_accumulation_steps", 1)
KILLED = -signal.SIGKILL


def trainer(run, log, *more):
    return Forked("train", ("--output_dir", run, *TRAIN, *more), log)


def precomputer(run, source, log, *more):
    return Forked("data.precompute", ("--output_dir", run, "--train_data_dir", source, *PRECOMPUTE, *more), log)


def drawer(run, log, *prompts, steps=1):
    return Forked("infer", ("--output_dir", run, "--prompt", *prompts, "--num_inference_steps", steps), log)


def refused(process, code):
    """The one line of a process that must end with this exit code, without a traceback."""
    found = process.wait()
    assert found == code and "Traceback" not in process.output, f"exit code {found}, not {code}:\n{process.output}"
    return one_line_error(process.output)


def copy(run, tmp_path):
    """A copy of the finished run, to be changed."""
    shutil.copytree(run.folder, tmp_path / "copy")
    return tmp_path / "copy"


def states(run):
    return sorted(p.name for p in (run / "state").glob("*"))


def same_run(one, other):
    """Equal bit for bit: the exported weights, the fp32 vector behind them, the losses on the way."""
    assert untitled(one / "lora.safetensors") == untitled(other / "lora.safetensors")
    assert [(m["step"], m["loss"]) for m in metrics(one)] == [(m["step"], m["loss"]) for m in metrics(other)]
    assert torch.equal(vector(one, len(metrics(one))), vector(other, len(metrics(other))))


def assert_whole(run):
    """Whatever has its final name is whole: states have their checksum, weights all their tensors."""
    for path in (run / "state").glob("*.state"):
        blob = path.read_bytes()
        assert hashlib.sha256(blob[:-32]).digest() == blob[-32:], path
    for path in run.glob("*.safetensors"):
        assert load_file(path), path


def tree(folder):
    """{path: bytes} of every file below, except locks."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".writer")}


def seen(folder, part=""):
    """Names, sizes and times of a folder's files with `part` in their name, which change when one is being written."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # one is being renamed right now
        for path in folder.iterdir():
            if part in path.name:
                stat = path.stat()
                found[path.name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found


def unfinished(folder):
    """Names of the temporary files that killed writes leave."""
    return [p.name for p in folder.glob(".*") if p.name != ".lock"]


@pytest.fixture
def log(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "log"


@pytest.fixture
def slow_disk(monkeypatch):
    """slow_disk(seconds, part): from here on, files with `part` in their path take so long to reach the disk.

    A kill can come before.
    """
    reals = {name: getattr(os, name) for name in ("fsync", "fdatasync")}

    def slow(seconds, part=""):
        def wait_and(real, file):
            time.sleep(seconds if part in os.readlink(f"/proc/self/fd/{file}") else 0)
            real(file)

        for name, real in reals.items():
            monkeypatch.setattr(os, name, functools.partial(wait_and, real))

    return slow


# ---- Killed


@pytest.mark.slow
def test_thirty_kills_over_one_run_change_no_bit(fresh, tmp_path, log, slow_disk):
    """A kill costs time and no bit: ten while a state is written, ten while weights are, ten anywhere, seeded."""
    flags = (*SHORT, "--checkpointing_steps", 1, "--max_train_steps", 70)
    whole = again(fresh, tmp_path, "whole")
    here("train", "--output_dir", whole, *TRAIN, *flags)
    slow_disk(0.03)
    moments, hit, reached = random.Random(2), collections.Counter(), []
    for index in range(30):
        done = lines(fresh / "metrics.jsonl")
        process = trainer(fresh, log, *flags)
        if index % 3 == 2:
            time.sleep(moments.uniform(0, 1.2))
        else:
            folder, part = ((fresh / "state", ".state"), (fresh, "lora-"))[index % 3]
            steps = moments.randrange(3)
            when(lambda: lines(fresh / "metrics.jsonl") >= done + steps, process)
            before = seen(folder, part)
            when(lambda: seen(folder, part) != before, process)
            time.sleep(moments.uniform(0, 0.04))
        process.send(signal.SIGKILL)
        assert process.wait() == KILLED, process.output
        assert_whole(fresh)
        hit["state"] += bool((fresh / "state").exists() and unfinished(fresh / "state"))
        hit["weights"] += any("lora-" in name for name in unfinished(fresh))
        reached.append(lines(fresh / "metrics.jsonl"))
    print("REACHED", reached, hit)
    assert hit["state"] >= 3 and hit["weights"] >= 3, hit  # the kills were where they claim to be
    assert not (fresh / "lora.safetensors").exists() and max(reached) > 20, reached
    slow_disk(0)
    here("train", "--output_dir", fresh, *TRAIN, *flags)
    same_run(fresh, whole)


@pytest.mark.slow
def test_weights_promised_for_a_step_are_there_after_a_kill_between_state_and_weights(fresh, run, log, slow_disk):
    """A resumed run writes every lora-….safetensors that an uninterrupted one does: the best may be this very one."""
    slow_disk(60, "lora-000002")
    process = trainer(fresh, log)
    when(lambda: unfinished(fresh), process)
    process.send(signal.SIGKILL)
    assert process.wait() == KILLED
    slow_disk(0)
    here("train", "--output_dir", fresh, *TRAIN)
    same_run(fresh, run.folder)
    for step in (2, 4, 6):
        name = f"lora-{step:06d}.safetensors"
        assert untitled(fresh / name) == untitled(run.folder / name)
    assert not unfinished(fresh)


@pytest.mark.slow
def test_no_temporary_file_of_a_killed_save_stays(fresh, log, slow_disk):
    """At SDXL's size each is half a gigabyte, under a name that nobody sees.

    It was saved because of a signal, at a step that no later save has.
    """
    slow_disk(60, ".state.")
    process = trainer(fresh, log, "--checkpointing_steps", 100)
    when(lambda: lines(fresh / "metrics.jsonl") >= 1, process)
    process.send(signal.SIGTERM)
    when(lambda: (fresh / "state").exists() and unfinished(fresh / "state"), process)
    process.send(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    slow_disk(0)
    here("train", "--output_dir", fresh, *TRAIN, "--checkpointing_steps", 100)
    assert not unfinished(fresh) and not unfinished(fresh / "state")


@pytest.mark.slow
def test_kills_anywhere_in_precompute_and_again_in_what_goes_on(
    pictures, tmp_path, log, small_batches, slow_disk, monkeypatch
):
    """While captions or pictures are encoded or the index is written. The finished cache has the same bytes."""
    precompute(tmp_path / "whole", pictures, "--random_flip")
    for encoder in (LoadedVAE, LoadedTextEncoders):
        monkeypatch.setattr(encoder, "_start", lambda *a, real=encoder._start: (time.sleep(0.03), real(*a))[1])
    slow_disk(0.03)
    began = time.monotonic()
    assert precomputer(tmp_path / "timed", pictures, log, "--random_flip").wait() == 0
    took, moments, stages = time.monotonic() - began, random.Random(1), collections.Counter()
    written = ("captions.keys", "posteriors-64x64.keys", "index.npy")
    for index in range(12):
        killed = tmp_path / f"killed {index}"
        for share in (1, 0.7):  # the second has less to do
            process = precomputer(killed, pictures, log, "--random_flip")
            time.sleep(moments.uniform(0.1, share) * took)
            process.send(signal.SIGKILL)
            assert process.wait() in (KILLED, 0), process.output
            there = {p.name for p in (killed / "cache").glob("*")}
            stages[max((i for i, name in enumerate(written) if name in there), default=-1)] += 1
        precompute(killed, pictures, "--random_flip")
        assert content(killed) == content(tmp_path / "whole")
    print("STAGES", stages)
    assert len(stages) >= 3, stages


@pytest.mark.slow
@pytest.mark.parametrize("old", [b"the last good one", None])
def test_kill_9_while_exporting_leaves_the_old_file_or_the_new_one(old, run, tmp_path, log, slow_disk):
    """Someone's web UI reads the file at this very moment, and half of it would be no LoRA at all."""
    folder = copy(run, tmp_path)
    here("train", "--output_dir", folder, *TRAIN)  # which exports again, under this folder's name
    path, new = folder / "lora.safetensors", (folder / "lora.safetensors").read_bytes()
    found = collections.Counter()
    slow_disk(0.5, "lora.safetensors")
    for delay in (0, 0.002, 0.05, None):
        for name in unfinished(folder):
            (folder / name).unlink()
        path.write_bytes(old) if old else path.unlink(missing_ok=True)
        before = seen(folder, "lora.safetensors")
        process = trainer(folder, log)  # the run is finished, so it exports once more
        when(lambda: seen(folder, "lora.safetensors") != before, process)
        if delay is None:  # as soon as the file has its name
            when(lambda: not unfinished(folder), process)
        else:
            time.sleep(delay)
        process.send(signal.SIGKILL)
        assert process.wait() in (KILLED, 0), process.output
        now = path.read_bytes() if path.exists() else None
        assert now in (old, new), f"{len(now)} bytes after {delay} s"
        found[now == new] += 1
    assert len(found) == 2  # the kills came before and after the new file was there
    slow_disk(0)
    here("train", "--output_dir", folder, *TRAIN)
    assert path.read_bytes() == new and not unfinished(folder)


@pytest.mark.slow
def test_killed_or_crashed_while_drawing_pictures_the_weights_are_there(run, tmp_path, log, monkeypatch):
    """Hours of training must not hang on the last seconds: the weights were exported before, and pictures are whole."""
    folder = copy(run, tmp_path)
    shutil.rmtree(folder / "compare")
    before = tree(folder)
    real = infer.compare.sample
    monkeypatch.setattr("infer.compare.sample", lambda *a: (time.sleep(0.2), real(*a))[1])
    process = drawer(folder, log, *PROMPTS, steps=2)
    when(lambda: (folder / "compare" / "finetuned_0.png").exists(), process)
    process.send(signal.SIGKILL)
    assert process.wait() == KILLED
    for path in (folder / "compare").glob("*.png"):
        Image.open(path).load()

    monkeypatch.setattr("infer.compare.sample", lambda *a: 1 / 0)
    assert drawer(folder, log, *PROMPTS, steps=2).wait() == 1
    assert {path: blob for path, blob in tree(folder).items() if "compare" not in path.parts} == before

    monkeypatch.setattr("infer.compare.sample", real)
    here("infer", "--output_dir", folder, "--prompt", *PROMPTS, "--num_inference_steps", 2)
    for path in (run.folder / "compare").glob("*.png"):
        assert (folder / "compare" / path.name).read_bytes() == path.read_bytes()


# ---- Signalled twice

TWICE = [
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGINT, signal.SIGINT),
    pytest.param(signal.SIGTERM, signal.SIGINT, marks=pytest.mark.slow),
]


def ends_at_once(process, second):
    began = time.monotonic()
    process.send(second)
    assert process.wait(20) == -second and time.monotonic() - began < 2, process.output


@pytest.mark.slow
@pytest.mark.parametrize("first, second", TWICE)
def test_a_second_signal_while_the_first_ones_state_is_saved(first, second, fresh, run, tmp_path, log, slow_disk):
    """The disk hangs and the user presses Ctrl-C again. The end comes at once, and the earlier state is what it was."""
    here("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 2)
    before = tree(fresh / "state")
    slow_disk(60, ".state.")
    process = trainer(fresh, log, "--checkpointing_steps", 100)
    when(lambda: lines(fresh / "metrics.jsonl") >= 3, process)
    process.send(first)
    when(lambda: unfinished(fresh / "state"), process)
    assert f"{first.name}: finishing this step and saving; once more ends at once" in process.output
    ends_at_once(process, second)
    assert {path: blob for path, blob in tree(fresh / "state").items() if path.suffix == ".state"} == before
    slow_disk(0)
    here("train", "--output_dir", fresh, *TRAIN)
    same_run(fresh, run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", TWICE)
def test_a_second_signal_while_precompute_finishes(first, second, pictures, tmp_path, log, small_batches, monkeypatch):
    """What was committed before the first signal stays, and the same command ends with the same bytes."""
    precompute(tmp_path / "whole", pictures)
    finish, calls, run = LoadedVAE._finish, [], tmp_path / "run"

    def hang(*args):
        calls.append(None)
        if len(calls) > 1:
            (tmp_path / "hangs").touch()
            time.sleep(60)
        return finish(*args)

    monkeypatch.setattr(LoadedVAE, "_finish", hang)
    process = precomputer(run, pictures, log)
    # both, because the first batch is on disk before the second one is begun
    when(lambda: lines_of_keys(run) >= 2 and (tmp_path / "hangs").exists(), process)
    process.send(first)
    when(lambda: "once more ends at once" in process.output, process)
    time.sleep(0.1)
    ends_at_once(process, second)
    assert lines_of_keys(run) == 2 and not (run / "cache" / "manifest.json").exists()
    monkeypatch.setattr(LoadedVAE, "_finish", finish)
    precompute(run, pictures)
    assert content(run) == content(tmp_path / "whole")


ONCE = [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("signum, code", ONCE)
def test_a_signal_while_captions_are_encoded_keeps_those_that_are(
    signum, code, pictures, tmp_path, log, small_batches, monkeypatch
):
    """Ten thousand captions take minutes too. The VAE is not even loaded before the end."""
    precompute(tmp_path / "whole", pictures)
    monkeypatch.setattr("data.encoding.CAPTIONS_AT_ONCE", 1)  # some are in flight while others are written
    run, real = tmp_path / "run", LoadedTextEncoders._start
    monkeypatch.setattr(LoadedTextEncoders, "_start", lambda *a: (time.sleep(0.1), real(*a))[1])
    process = precomputer(run, pictures, log)
    when(lambda: lines_of_keys(run, "captions") >= 3, process)  # the unconditional and the first two
    process.send(signum)
    assert refused(process, code) == "error: stopped, what is encoded is kept; run the same command to go on"
    assert 3 <= lines_of_keys(run, "captions") < 1 + PICTURES and not lines_of_keys(run)
    precompute(run, pictures)
    assert content(run) == content(tmp_path / "whole")


def catches(pid, signum):
    with open(f"/proc/{pid}/status") as status:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read())[1]
    return int(caught, 16) >> (signum - 1) & 1


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_everything_is_still_being_imported_is_one_line(signum, fresh):
    """python -m train itself: who sees a typing error at once must not be answered by "terminate called after …"."""
    moments = random.Random(3)
    for _ in range(12):
        process = start("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 1000)
        when(lambda: catches(process.pid, signal.SIGTERM), process)  # an interpreter that starts cannot answer yet
        time.sleep(moments.uniform(0, 1.35))
        process.send_signal(signum)
        try:
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        assert process.returncode == 128 + signum, output
        assert one_line_error(output) == "error: interrupted; run the same command to go on"


@pytest.mark.slow
def test_whoever_comes_second_to_a_runs_folder_is_told_who_is_there(fresh, run, log, tmp_path):
    """Two commands that write one state or cache would leave neither's."""
    process = trainer(fresh, tmp_path / "logs" / "first", "--max_train_steps", 1000)
    when(lambda: lines(fresh / "metrics.jsonl") >= 1, process)
    process.send(signal.SIGSTOP)
    try:
        before = tree(fresh)
        assert f"process {process.pid} is working here" in refused(trainer(fresh, log), 2)
        source = tmp_path / "source"
        shutil.copytree(run.pictures, source)
        edit_captions(source, lambda rows: [dict(rows[0], text="another"), *rows[1:]])
        said = refused(precomputer(fresh, source, log), 2)
        assert f"process {process.pid} is reading this cache, and rows that they read would change" in said
        assert precomputer(fresh, run.pictures, log).wait() == 0  # there is nothing to do
        assert tree(fresh) == before
        weights = ("--lora_path", run.folder / "lora.safetensors", "--num_inference_steps", 1)
        assert Forked("infer", ("--output_dir", fresh, "--prompt", "x", *weights), log).wait() == 0
    finally:
        process.send(signal.SIGKILL)
    assert process.wait() == KILLED
    precompute(fresh, source)  # the lock died with its owner


def lines_of_keys(run, name="posteriors-64x64"):
    keys = run / "cache" / f"{name}.keys"
    return keys.stat().st_size // 36 if keys.exists() else 0


# ---- A full disk

PAGE = 4096  # bytes that a tmpfs gives at once
SKIPPED = "the tests with RLIMIT_FSIZE try full disks all the same"


@pytest.fixture
def disk(tmp_path):
    """disk(options) -> a folder that is a file system of its own, of the size that the mount options say."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options):
        if not shutil.which("mount") or os.geteuid():
            pytest.skip(f"no small disk can be mounted here; {SKIPPED}")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here ({done.stderr.strip()}); {SKIPPED}")
        return path

    mount.path = path
    yield mount
    if os.path.ismount(path):
        subprocess.run(["umount", "-l", path], check=True)


def pages(path):
    return -(-path.stat().st_size // PAGE)


def leave(disk, free):
    """Fill the disk until so many pages are free. -> the file that fills it"""
    with open(disk / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free * PAGE)
    return disk / "filler"


@contextlib.contextmanager
def files_of_at_most(size):
    """A process that is started here cannot write past `size` bytes of a file: EFBIG, where a full disk says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", [[], ["--explain"]])
def test_a_cache_that_does_not_fit_is_refused_before_anything_is_encoded(how, pictures, disk, log):
    """Or it would be found out after eight hours of encoding."""
    run = disk("size=2m") / "run"
    message = refused(precomputer(run, pictures, log, "--resolution", 1024, *how), 3)
    assert [int(n) for n in re.findall(r"(\d+) MiB", message)] == [2, 2] and str(run / "cache") in message, message
    assert "captions:" not in log.read_text() and not list((run / "cache").glob("[!.]*"))


FULL = {  # what no longer fits -> (free pages, where a state has S and weights W; the states that are there then)
    "rows": (lambda S, W: 0, []),
    "run": (lambda S, W: 1, []),
    "metrics": (lambda S, W: 2, []),
    "first weights": (lambda S, W: 3, []),
    "first state": (lambda S, W: 3 + W, []),
    "second weights": (lambda S, W: 3 + S + W, [2]),
    "second state": (lambda S, W: 3 + S + 2 * W, [2]),
    "third state": (lambda S, W: 3 + 2 * S + 3 * W, [2, 4]),
}


@pytest.mark.slow
@pytest.mark.parametrize("full", FULL)
def test_a_disk_that_fills_up_stops_training_and_keeps_the_last_state(full, fresh, run, disk, log, monkeypatch):
    """Others fill it after there was room. With some space freed, the same command goes on to the same bytes."""
    free, kept = FULL[full]
    monkeypatch.setattr("train.loop.need_room", lambda *_: None)
    folder = disk("size=16m") / "run"
    shutil.copytree(fresh, folder)
    state, weights = (pages(run.folder / name) for name in ("state/000006.state", "lora.safetensors"))
    filler = leave(disk.path, free(state, weights))
    message = refused(trainer(folder, log), 3)
    assert "No space left on device" in message, message
    assert states(folder) == [f"{step:06d}.state" for step in kept]
    assert_whole(folder)
    filler.unlink()
    here("train", "--output_dir", folder, *TRAIN)
    same_run(folder, run.folder)


@pytest.mark.slow
def test_a_run_that_had_just_enough_room_goes_on_after_a_kill(fresh, run, disk, log):
    """Its own states and weights fill the disk, and what they take is not needed twice."""
    folder = disk("size=16m") / "run"
    shutil.copytree(fresh, folder)
    state, weights = (pages(run.folder / name) for name in ("state/000006.state", "lora.safetensors"))
    leave(disk.path, 3 * state + 5 * weights + 8)
    process = trainer(folder, log)
    when(lambda: lines(folder / "metrics.jsonl") >= 5, process)
    process.send(signal.SIGKILL)
    assert process.wait() == KILLED and len(states(folder)) == 2
    process = trainer(folder, log)
    assert process.wait() == 0, process.output
    same_run(folder, run.folder)


@pytest.mark.slow
def test_keys_that_a_full_disk_cut_are_not_taken_for_written(tmp_path, disk, log, monkeypatch):
    """If space is freed a moment later, rows whose keys are lost would get index -1: the last caption, silently."""
    count, noise = 130, np.random.default_rng(0)  # more keys than a page holds
    images = [Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(count)]
    source = folder_of(tmp_path / "source", {f"{i:03d}.png": encoded(image) for i, image in enumerate(images)})
    run = disk("size=16m") / "run"
    precompute(run, source)
    edit_captions(source, lambda rows: [dict(row, text=f"another {i}") for i, row in enumerate(rows)])
    keys = run / "cache" / "captions.keys"
    rows = keys.with_suffix(".rows").stat().st_size
    added = rows // (count + 1) * count
    assert pages(keys) < -(-(2 * count + 1) * 36 // PAGE)
    # The rows fit and the keys' next page does not. Space is freed when the captions are done.
    filler = leave(disk.path, -(-(rows + added) // PAGE) - -(-rows // PAGE))
    monkeypatch.setattr(LoadedTextEncoders, "unload", lambda _: filler.unlink())
    process = precomputer(run, source, log)
    code = process.wait()
    assert code in (0, 3) and "Traceback" not in process.output, process.output
    monkeypatch.undo()
    filler.unlink(missing_ok=True)
    if code:
        precompute(run, source)
    assert sorted(caption_rows(Cache(run / "cache"))) == list(range(count + 1, 2 * count + 1))


SMALL_FILES = {  # (command, free pages) -> the file that does not fit; it waits in a buffer and fails when it is closed
    ("data.precompute", 47): "posteriors-64x64.keys",
    ("data.precompute", 48): "index.npy",
    ("data.precompute", 51): "manifest.json",
    ("train", 0): "rows.npz",
    ("train", 1): "run.json",
    ("train", 2): "metrics.jsonl",
}


@pytest.mark.slow
@pytest.mark.parametrize("name, free", SMALL_FILES)
def test_a_full_disk_is_said_with_the_file_and_what_is_free_for_small_files_too(
    name, free, fresh, pictures, disk, log, monkeypatch
):
    """Three disks are mounted: which of them is it that "refused to write"?"""
    monkeypatch.setattr("train.loop.need_room", lambda *_: None)
    folder = disk("size=16m") / "run"
    if name == "train":
        shutil.copytree(fresh, folder)
    leave(disk.path, free)
    message = refused(trainer(folder, log) if name == "train" else precomputer(folder, pictures, log), 3)
    assert f"/{SMALL_FILES[name, free]}: No space left on device" in message and "MiB are free" in message, message


@pytest.mark.slow
def test_an_export_that_does_not_fit_leaves_the_last_one(run, disk, log):
    folder = disk("size=16m") / "run"
    shutil.copytree(run.folder, folder)
    (folder / "lora.safetensors").write_bytes(b"the last good one")
    filler = leave(disk.path, 20)
    assert "No space left on device" in refused(trainer(folder, log), 3)
    assert (folder / "lora.safetensors").read_bytes() == b"the last good one" and not unfinished(folder)
    filler.unlink()
    here("train", "--output_dir", folder, *TRAIN)
    same_run(folder, run.folder)


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere_in_precompute_costs_nothing_that_was_encoded(pictures, cached, disk, log):
    """With few and many free pages: no signal from a memory map, no half row that counts, and no wrong one."""
    mounted, ended = disk("size=16m"), collections.Counter()
    for free in (0, 1, 20, 45, 46, 47, 48, 49, 50, 51, 52, 53, 60):
        run = mounted / f"run {free}"
        filler = leave(mounted, free)
        process = precomputer(run, pictures, log)
        code = process.wait()
        assert code in (0, 3) and "Traceback" not in process.output, process.output
        ended[code] += 1
        filler.unlink()
        precompute(run, pictures)
        assert content(run) == content(cached)
        shutil.rmtree(run)
    assert ended[3] >= 8 and ended[0] >= 1, ended


@pytest.mark.slow
def test_files_that_may_not_grow_end_every_command_as_a_full_disk_does(fresh, pictures, run, tmp_path, log):
    """A limit on the size of files works also where nothing can be mounted."""
    with files_of_at_most(100_000):
        process = precomputer(tmp_path / "new", pictures, log)
    message = refused(process, 3)
    assert "captions.rows: File too large" in message and "MiB" in message
    precompute(tmp_path / "new", pictures)
    assert content(tmp_path / "new") == content(run.folder)

    here("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 2)
    (fresh / "lora.safetensors").unlink()
    before = tree(fresh)
    with files_of_at_most(100_000):
        export = trainer(fresh, log, "--max_train_steps", 2)
    assert "File too large" in refused(export, 3) and tree(fresh) == before
    with files_of_at_most(500_000):
        state = trainer(fresh, log)
    assert "File too large" in refused(state, 3) and states(fresh) == ["000002.state"]
    assert_whole(fresh)
    here("train", "--output_dir", fresh, *TRAIN)
    same_run(fresh, run.folder)


NEEDED_AND_FREE = r"\d+ MiB.*\d+ MiB are free"


def test_states_that_do_not_fit_are_refused_before_the_first_step(fresh, disk, log):
    """The room for two states, the next one and the weights follows from the rank, before a hundred steps are lost."""
    folder = disk("size=16m") / "run"
    shutil.copytree(fresh, folder)
    leave(disk.path, 280)  # one state fits, the second does not
    assert re.search(NEEDED_AND_FREE, refused(trainer(folder, log), 3))
    assert not (folder / "metrics.jsonl").exists() and not (folder / "state").exists()


def test_a_disk_that_is_full_in_the_middle_is_said_with_the_file_and_what_is_free(run, disk, log):
    folder = disk("size=16m") / "run"
    shutil.copytree(run.folder, folder)
    leave(disk.path, 20)
    message = refused(trainer(folder, log), 3)
    assert "lora.safetensors" in message and "MiB are free" in message, message


def test_no_space_for_the_runs_folder_is_the_machines_fault(disk, log):
    """By the exit code, scripts tell a full disk, which goes away, from a wrong flag, which does not."""
    refused(trainer(disk("size=1m,nr_inodes=1") / "run", log), 3)


# ---- What is not ours


@pytest.mark.slow
def test_nothing_that_someone_else_put_into_a_runs_folder_is_touched(run, source, tmp_path, log):
    """Notes, favourites, copies and backups lie where the work is.

    They stay through every command, a kill, and the removal of files that are ours.
    """
    folder = copy(run, tmp_path)
    names = (
        "notes.txt .hidden .notes.unfinished .lock.txt "
        "lora-best.safetensors my.safetensors lora.safetensors.old metrics.jsonl.bak "
        "cache/notes.txt cache/posteriors-999x999.rows cache/posteriors-999x999.keys "
        "cache/index.npy.bak cache/old/manifest.json "
        "state/readme.txt state/000002.state.bak state/old/000001.state state/²³.state "
        "compare/notes.png compare/baseline_me.png compare/finetuned.png compare/grid_1.png compare/baseline_0.png.txt"
    )
    foreign = {folder / name: f"mine: {name}".encode() for name in names.split()}
    for path, blob in foreign.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob)
    captions = (source / "metadata.jsonl").read_bytes()
    edit_captions(source, lambda rows: [*rows[:3], dict(rows[3], text="something new"), *rows[4:]])
    precompute(folder, source)
    assert "1 caption changed since it began" in refused(trainer(folder, log), 2)  # another run's state is here
    (source / "metadata.jsonl").write_bytes(captions)
    precompute(folder, source)
    process = trainer(folder, log, "--max_train_steps", 12)
    when(lambda: lines(folder / "metrics.jsonl") > STEPS, process)
    process.send(signal.SIGKILL)
    assert process.wait() == KILLED
    here("train", "--output_dir", folder, *TRAIN, "--max_train_steps", 10)
    assert {"000008.state", "000010.state"} < set(states(folder))
    here("infer", "--output_dir", folder, "--prompt", PROMPTS[0], "--num_inference_steps", 1)
    assert not (folder / "compare" / "baseline_1.png").exists()  # it is ours, of an earlier call
    assert {path: path.read_bytes() for path in foreign if path.exists()} == foreign


@pytest.mark.slow
def test_an_editors_swap_file_is_left_alone(run, tmp_path):
    """vim keeps what was not saved of report.json next to it, in .report.json.swp."""
    folder = copy(run, tmp_path)
    names = (".metrics.jsonl.swp", ".lora.safetensors.swp", "compare/.report.json.swp", "cache/.index.npy.swp")
    foreign = [folder / name for name in names]
    for path in foreign:
        path.write_bytes(b"not saved yet")
    (folder / "cache" / "manifest.json").unlink()
    precompute(folder, run.pictures)
    here("train", "--output_dir", folder, *TRAIN)
    here("infer", "--output_dir", folder, "--prompt", PROMPTS[0], "--num_inference_steps", 1)
    assert [path for path in foreign if not path.exists()] == []


@pytest.mark.slow
def test_copies_of_states_under_other_names_are_neither_resumed_from_nor_deleted_nor_in_the_way(run, fresh):
    """Favourites lie next to the states. If two were taken for the newest states, each save would delete itself."""
    here("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 2)
    aside = [fresh / "state" / name for name in ("best.state", "000002 (copy).state", "0-before.state", "²³.state")]
    for path in aside:
        shutil.copy(fresh / "state" / "000002.state", path)
    here("train", "--output_dir", fresh, *TRAIN)
    assert states(fresh) == sorted(["000004.state", "000006.state", *(path.name for path in aside)])
    same_run(fresh, run.folder)


@pytest.mark.parametrize("name", ["data.precompute", "train", "infer"])
@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_an_output_folder_that_cannot_be_is_refused_before_anything_else(kind, name, pictures, tmp_path, log, request):
    """Before a model is looked for, because an hour of downloads must not end with "cannot write"."""
    if kind == "read-only":
        folder = request.getfixturevalue("disk")("size=1m") / "run"
        subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    else:
        (tmp_path / "mine").write_text("mine")
        folder = tmp_path / "mine" / ("run" if kind == "below a file" else "")
    missing = ("--pretrained_model_name_or_path", "nobody/nothing", "--dataset_name", "nobody/nothing")
    words = {"data.precompute": missing, "infer": ("--prompt", "x")}.get(name, ())
    message = refused(Forked(name, ("--output_dir", folder, *words), log), 2)
    assert message.startswith(f"error: --output_dir {folder}") and "not a folder that can be written" in message, (
        message
    )
    assert kind == "read-only" or (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("part", ["cache", "state", "compare", "metrics.jsonl"])
def test_a_part_of_the_runs_folder_that_cannot_be_written_is_refused_at_the_door(
    part, fresh, run, pictures, tmp_path, log
):
    """Since a container ran, state/ belongs to root. Found out at the first save, the steps before it would be lost."""
    folder = tmp_path / "run"
    shutil.copytree(fresh, folder) if part != "cache" else folder.mkdir()
    (folder / part).write_text("mine") if part != "metrics.jsonl" else (folder / part).mkdir()
    if part == "compare":
        shutil.copy(run.folder / "lora.safetensors", folder)
    begin, *words = dict(cache=(precomputer, pictures, log), compare=(drawer, log, "x")).get(part, (trainer, log))
    assert str(folder / part) in refused(begin(folder, *words), 2)
    assert not re.search(r"(captions|pictures|train|compare): \d+ of", log.read_text())  # nothing was begun


@pytest.mark.slow
def test_training_reads_a_cache_on_a_disk_that_cannot_be_written(fresh, run, disk, log):
    """Kaggle lends data that way: a cache is made once, and many runs link to it."""
    lent = disk("size=16m")
    shutil.copytree(fresh / "cache", lent / "cache")
    (lent / "cache" / ".names.txt.killed.unfinished").write_text("not this run's to remove")
    subprocess.run(["mount", "-o", "remount,ro", lent], check=True)
    shutil.rmtree(fresh / "cache")
    (fresh / "cache").symlink_to(lent / "cache")
    process = trainer(fresh, log)
    assert process.wait() == 0, process.output
    same_run(fresh, run.folder)


# ---- Readers that leave


def onto(kind):
    """-> (what a command prints to, what its process does first, how the reader leaves)"""
    if kind == "full log":
        return "/dev/full", lambda: None, lambda: None
    if kind == "closed at the start":
        return os.devnull, lambda: [os.close(descriptor) for descriptor in (0, 1, 2)], lambda: None
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()

    def alone():
        os.close(reader)
        if kind == "terminal":  # its own one, so that it hears when it closes
            os.setsid()
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)

    def leave():
        os.close(reader)

    # what is written until then fits into a pipe
    return (f"/proc/self/fd/{writer}" if kind == "pipe" else os.ttyname(writer)), alone, leave


LEAVES = [
    ("full log", None, 0),
    pytest.param("closed at the start", None, 0, marks=pytest.mark.slow),
    pytest.param("pipe", None, 0, marks=pytest.mark.slow),
    ("pipe", signal.SIGINT, 130),  # | tee log, where Ctrl-C ends tee first
    pytest.param("terminal", None, 143, marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, signum, code", LEAVES)
def test_no_step_is_lost_because_nobody_reads_the_bar(kind, signum, code, fresh, run):
    """And none of what is printed lands in a file of the run."""
    log, before, leave = onto(kind)
    process = Forked("train", ("--output_dir", fresh, *TRAIN, "--checkpointing_steps", 100), log, before)
    when(lambda: lines(fresh / "metrics.jsonl") >= 1, process)
    leave()
    if signum:
        process.send(signum)
    assert process.wait() == code
    done = lines(fresh / "metrics.jsonl")
    assert states(fresh) == [f"{done:06d}.state"] and (done == STEPS) == (code == 0)
    here("train", "--output_dir", fresh, *TRAIN)
    same_run(fresh, run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full log", pytest.param("closed at the start", marks=pytest.mark.slow)])
def test_precompute_and_infer_need_no_reader_either(kind, run, cached, pictures, tmp_path):
    log, before, _ = onto(kind)
    words = ("--output_dir", tmp_path / "run", "--train_data_dir", pictures, *PRECOMPUTE)
    assert Forked("data.precompute", words, log, before).wait() == 0
    assert content(tmp_path / "run") == content(cached)
    folder = copy(run, tmp_path)
    words = ("--output_dir", folder, "--prompt", *PROMPTS, "--num_inference_steps", 2)
    shutil.rmtree(folder / "compare")
    assert Forked("infer", words, log, before).wait() == 0
    pictures_of = lambda run: {path.name: path.read_bytes() for path in (run / "compare").glob("*.png")}
    assert pictures_of(folder) == pictures_of(run.folder)


@pytest.mark.slow
def test_a_terminal_that_closes_while_precompute_encodes(pictures, cached, tmp_path, small_batches, monkeypatch):
    real = LoadedVAE._start
    monkeypatch.setattr(LoadedVAE, "_start", lambda *a: (time.sleep(0.2), real(*a))[1])
    log, before, leave = onto("terminal")
    words = ("--output_dir", tmp_path / "run", "--train_data_dir", pictures, *PRECOMPUTE)
    process = Forked("data.precompute", words, log, before)
    when(lambda: lines_of_keys(tmp_path / "run") >= 2, process)
    leave()
    assert process.wait() == 143 and 2 <= lines_of_keys(tmp_path / "run") < PICTURES
    monkeypatch.setattr(LoadedVAE, "_start", real)
    precompute(tmp_path / "run", pictures)
    assert Cache(tmp_path / "run" / "cache").manifest["content"] == Cache(cached / "cache").manifest["content"]


# ---- Rights


def as_no_root():
    """Give up what lets root read and write everything, as far as the process has it; what is left is the modes."""
    version_3, all_of_them = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None).capset(version_3, all_of_them):
        raise OSError("the rights of root could not be given up")


NOT_READABLE = {
    "data.precompute": (
        *("source", "source/metadata.jsonl", "source/003.png"),
        *("model", "model/model_index.json", "model/tokenizer/tokenizer.json", "model/text_encoder/config.json"),
        *("model/text_encoder_2/model.safetensors", "model/vae", "model/vae/diffusion_pytorch_model.safetensors"),
        *("run/cache", "run/cache/manifest.json", "run/cache/captions.keys", "run/cache/captions.rows", "run"),
    ),
    "train": (
        *("run/cache", "run/cache/manifest.json", "run/cache/index.npy", "run/cache/captions.rows"),
        *("run/cache/posteriors-64x64.keys", "run/state", "run/state/000006.state", "run/metrics.jsonl"),
        *("model/unet/config.json", "model/unet/diffusion_pytorch_model.safetensors"),
        *("model/scheduler/scheduler_config.json", "run"),
    ),
    "infer": (
        *("run/lora.safetensors", "run/cache/manifest.json", "model/scheduler", "model/tokenizer_2", "run/compare"),
        *("model/vae/config.json", "model/unet/diffusion_pytorch_model.safetensors"),
    ),
}
NOT_WRITABLE = {
    "data.precompute": ("run/cache", "run/cache/captions.keys"),
    "train": ("run", "run/state", "run/metrics.jsonl"),
    "infer": ("run/compare",),
}


@pytest.fixture
def theirs(run, pictures, tmp_path):
    """A folder with everything that a command reads and writes: source/, model/, run/."""
    shutil.copytree(pictures, tmp_path / "source")
    shutil.copytree(PIPELINE, tmp_path / "model")
    shutil.copytree(run.folder, tmp_path / "run")
    model = read_manifest(run.folder / "cache")["model"] | dict(name=str(tmp_path / "model"))
    change_cache(tmp_path / "run", model=model, vae=model)
    yield tmp_path
    subprocess.run(["chmod", "-R", "u+rwX", tmp_path], check=True)


def begin_without_root(name, folder, log):
    model = ("--pretrained_model_name_or_path", folder / "model", *PRECOMPUTE[2:])
    words = {
        "data.precompute": ("--train_data_dir", folder / "source", *model),
        "train": (*TRAIN, "--max_train_steps", STEPS + 1),
        "infer": ("--prompt", "x", "--num_inference_steps", 1),
    }
    return Forked(name, ("--output_dir", folder / "run", *words[name]), log, as_no_root)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_READABLE)
def test_what_may_not_be_read_is_one_line_for_a_user_who_is_not_root(name, theirs, log):
    for path in (theirs / part for part in NOT_READABLE[name]):
        mode = path.stat().st_mode
        path.chmod(0)
        message = refused(begin_without_root(name, theirs, log), 2)
        path.chmod(mode)
        assert str(path) in message or path.name in message, message


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_WRITABLE)
def test_what_may_not_be_written_is_one_line_for_a_user_who_is_not_root(name, theirs, log):
    edit_captions(theirs / "source", lambda rows: [row | dict(text=f"new {i}") for i, row in enumerate(rows)])
    for path in (theirs / part for part in NOT_WRITABLE[name]):
        mode = path.stat().st_mode
        path.chmod(0o555 if path.is_dir() else 0o444)
        message = refused(begin_without_root(name, theirs, log), 2)
        path.chmod(mode)
        assert str(path) in message, message


def test_one_file_that_may_not_be_read_and_one_folder_where_a_file_should_be(theirs, log):
    """Of the slow tests above one for each kind; with the rights of root it is read."""
    keys = theirs / "run" / "cache" / "captions.keys"
    keys.chmod(0)
    message = refused(begin_without_root("train", theirs, log), 2)
    assert message == f"error: {keys}: Permission denied; change its owner or mode, or use another"
    keys.unlink(), keys.mkdir()
    message = refused(begin_without_root("train", theirs, log), 2)
    assert message.startswith(f"error: {keys}: ")


# ---- Disks that fail


@pytest.mark.slow
def test_a_disk_that_turns_read_only_is_one_line_and_the_last_state_stays(fresh, run, tmp_path, log):
    """As ext4 does after an error of the disk below it; after a repair the same command goes on to the same bytes."""
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 * 2**20)
    mount = ["mount", "-o", "loop", image, path]
    for words in (["mkfs.ext4", "-q", "-F", image], mount):
        if not shutil.which(words[0]) or os.geteuid() or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no file system can be made and mounted here")
    try:
        shutil.copytree(fresh / "cache", path / "run" / "cache")
        os.sync()
        process = trainer(path / "run", log, "--checkpointing_steps", 1)
        when(lambda: len(states(path / "run")) > 1, process)
        subprocess.run(["mount", "-o", "remount,abort", path], check=True, capture_output=True)
        message = refused(process, 3)
        assert str(path / "run") in message and "run the same command" in message, message
        subprocess.run(["umount", path], check=True)
        subprocess.run(["fsck.ext4", "-p", image], capture_output=True)
        subprocess.run(mount, check=True)
        assert_whole(path / "run")
        assert trainer(path / "run", log).wait() == 0, log.read_text()
        assert torch.equal(vector(path / "run", STEPS), vector(run.folder, STEPS))
    finally:
        subprocess.run(["umount", "-l", path], check=True)


# ---- Secrets


def every_byte(folder, but=()):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p not in but}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["environment", "login file"])
def test_the_hub_token_is_in_no_byte_also_where_commands_fail(where, pictures, tmp_path, log, monkeypatch):
    """Run folders and logs are published and pasted, most of all those of what failed."""
    stored = tmp_path / "login" / "token"
    stored.parent.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(stored))
    stored.write_text(TOKEN) if where == "login file" else monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert huggingface_hub.get_token() == TOKEN  # the commands could read it
    run, indices, output = tmp_path / "run", iter(range(99)), ""

    def outcome(process, code):
        nonlocal output
        assert process.wait() == code, process.output
        output += process.output

    def next_log():
        return log.parent / f"log {next(indices)}"

    steps = ("--max_train_steps", 1)
    outcome(precomputer(run, pictures, next_log(), "--pretrained_model_name_or_path", "nobody/nothing"), 2)
    words = ("--output_dir", run, "--dataset_name", "nobody/nothing", *PRECOMPUTE)
    outcome(Forked("data.precompute", words, next_log()), 2)
    outcome(precomputer(run, pictures, next_log()), 0)
    with monkeypatch.context() as broken:
        broken.setattr("train.writer.save_state", lambda *_: 1 / 0)
        outcome(trainer(run, next_log(), *steps), 1)
    assert "ZeroDivisionError" in output
    outcome(trainer(run, next_log(), *steps), 0)
    outcome(trainer(run, next_log(), *steps, "--rank", 5), 2)
    outcome(drawer(run, next_log(), "x"), 0)
    (run / "lora.safetensors").write_bytes(b"not weights")
    outcome(drawer(run, next_log(), "x"), 2)
    written = every_byte(tmp_path, but=[stored])
    assert len(written) > 20
    assert [path for path, blob in written.items() if TOKEN.encode() in blob] == []


@pytest.mark.slow
@pytest.mark.parametrize("source", ["model", "dataset"])
def test_a_hub_that_refuses_the_token_does_not_make_us_print_it(source, pictures, tmp_path):
    """python -m itself with a stored login, and a hub (here, on this machine) that answers 401 to it."""
    asked = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("authorization"))
            self.send_response(401)
            self.send_header("x-error-message", "Invalid credentials in Authorization header")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    env |= dict(HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    env |= dict(HF_HOME=str(home), HF_DATASETS_CACHE=str(home / "datasets"))
    if source == "model":
        words = ("--pretrained_model_name_or_path", "someone/private", "--train_data_dir", pictures)
    else:
        words = ("--pretrained_model_name_or_path", PIPELINE, "--dataset_name", "someone/private")
    try:
        output = command("data.precompute", "--output_dir", run, *words, code=2, env=env)
    finally:
        hub.shutdown()
    assert f"Bearer {TOKEN}" in asked  # it was sent, so it was known
    assert "someone/private" in one_line_error(output) and TOKEN not in output
    assert not [path for path, blob in every_byte(run).items() if TOKEN.encode() in blob]


# ---- Names

ODD = ("../x", "/nowhere/passwd", "two\nlines", "n" * 300, "<lora:x:1>")


@pytest.mark.slow
def test_a_runs_folder_of_any_name_holds_all_that_is_written(pictures, tmp_path, monkeypatch):
    """Upwards, with a line's end, of 350 characters, like a web UI's tag: no file lands outside of it."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    folder = "/".join(["..", "<lora:x:1>", "two\nlines", "n" * 200, "n" * 120])
    precompute(folder, pictures)
    here("train", "--output_dir", folder, *TRAIN, *SHORT, "--max_train_steps", 1, "--checkpointing_steps", 1)
    here("infer", "--output_dir", folder, "--prompt", "x", "--num_inference_steps", 1)
    run = (tmp_path / "cwd" / folder).resolve()
    wanted = {"lora.safetensors", "lora-000001.safetensors", "metrics.jsonl", ".lock", "cache", "state", "compare"}
    wanted |= {"run.json", "rows.npz"}
    assert {p.name for p in run.iterdir()} == wanted
    assert [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(run)] == []
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("name", ["data.precompute", "train", "infer"])
def test_a_name_that_no_disk_takes_is_refused_in_one_line(name, tmp_path, log):
    words = {"data.precompute": PRECOMPUTE, "infer": ("--prompt", "x")}.get(name, ())
    message = refused(Forked(name, ("--output_dir", tmp_path / "two\nlines" / ("n" * 300), *words), log), 2)
    if name == "infer":  # which looks for weights before it makes a folder
        assert message.endswith("/lora.safetensors: no such file; python -m train writes RUN/lora.safetensors")
    else:
        assert message.startswith("error: --output_dir ") and "File name too long" in message


@pytest.mark.slow
def test_captions_prompts_and_names_of_pictures_may_be_anything(pictures, tmp_path, log):
    """They come from the internet. What they say is drawn, but where files go is ours to say."""
    source, outside, run = tmp_path / "source", tmp_path / "outside", tmp_path / "run"
    source.mkdir(), outside.mkdir()
    names = ("../outside/x.png", str(outside / "absolute.png"), "two\nlines.png", "n" * 240 + ".png", "<lora:x:1>.png")
    for i, name in enumerate(names):
        shutil.copy(pictures / f"{i:03d}.png", source / name)
    rows = [json.dumps(dict(file_name=name, text=text)) + "\n" for name, text in zip(names, ODD)]
    (source / "metadata.jsonl").write_text("".join(rows))
    before = every_byte(tmp_path)
    precompute(run, source)
    cache = Cache(run / "cache")
    assert [len(name.splitlines()) for name in cache.names(range(5))] == [1] * 5
    assert len(set(caption_rows(cache))) == 5
    here("train", "--output_dir", run, *TRAIN, "--max_train_steps", 1)
    here("infer", "--output_dir", run, "--prompt", *ODD, "--num_inference_steps", 1)
    pairs = {f"{kind}_{i}.png" for kind in ("baseline", "finetuned") for i in range(len(ODD))}
    others = {".lock", "grid.png", "report.json", "report.html"}
    assert {p.name for p in (run / "compare").iterdir()} == others | pairs
    assert json.loads((run / "compare" / "report.json").read_text())["prompts"] == list(ODD)
    after = every_byte(tmp_path)
    assert {path: blob for path, blob in after.items() if not path.is_relative_to(run)} == before

    (source / names[2]).write_bytes(b"<html>")
    assert refused(precomputer(run, source, log), 2).startswith("error: two lines.png: not a picture that can be read")


def test_row_ids_of_a_dataset_may_be_anything(pictures, tmp_path):
    """A parquet file's "path" is whatever its maker had on a disk. It names rows here and nothing else."""
    images = [{"path": name, "bytes": (pictures / f"{i:03d}.png").read_bytes()} for i, name in enumerate(ODD)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "text": list(ODD)}, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    before = every_byte(tmp_path)
    run = tmp_path / "run"
    here("data.precompute", "--output_dir", run, "--dataset_name", tmp_path / "saved", *PRECOMPUTE)
    assert Cache(run / "cache").names(range(5)) == ["x", "passwd", "two lines", "n" * 300, "<lora:x:1>"]
    assert {path: blob for path, blob in every_byte(tmp_path).items() if not path.is_relative_to(run)} == before


@pytest.mark.slow
def test_a_bad_picture_whose_name_is_not_utf_8_is_left_out(pictures, tmp_path):
    """After hours of encoding, the line that says what was left out must not be what ends the command."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(pictures / "000.png", source / "a.png")
    bad = source / b"f\xfcchse.png".decode("utf-8", "surrogateescape")
    bad.write_bytes(b"<html>")
    for path in (source / "a.png", bad):
        path.with_suffix(".txt").write_text("a fox")
    words = ("--output_dir", tmp_path / "run", "--train_data_dir", source, *PRECOMPUTE)
    assert "chse.png: not a picture that can be read" in command("data.precompute", *words, "--skip_bad")
    assert len(Cache(tmp_path / "run" / "cache")) == 1
    shutil.rmtree(tmp_path / "run")
    assert "chse.png: not a picture that can be read" in one_line_error(command("data.precompute", *words, code=2))


def test_a_picture_that_is_changed_while_it_waits_is_not_taken_for_the_one_before(source, tmp_path, monkeypatch):
    """Hours lie between the hash and the VAE, and the wrong row would have a good checksum for ever."""
    real = TextEncoders.load
    before = (source / "000.png").read_bytes()

    def meanwhile(texts, device):
        shutil.copy(source / "005.png", source / "000.png")
        return real(texts, device)

    monkeypatch.setattr(TextEncoders, "load", meanwhile)
    with pytest.raises(UserError, match="000.png: changed since precompute began; run it again"):
        precompute(tmp_path / "run", source)
    monkeypatch.undo()
    (source / "000.png").write_bytes(before)
    precompute(tmp_path / "run", source)
    precompute(tmp_path / "fresh", source)
    none = [False] * PICTURES
    one, other = (Cache(tmp_path / name / "cache").batch(range(PICTURES), none, none) for name in ("run", "fresh"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_half_an_emoji_in_a_caption_is_refused_by_name(source, tmp_path, log):
    """JSON can spell one half of a surrogate pair, and scrapers that cut captions do."""
    edit_captions(source, lambda rows: [*rows[:3], dict(rows[3], text="a fox \ud83d"), *rows[4:]])
    assert "003.png" in refused(precomputer(tmp_path / "run", source, log), 2)
    precompute(tmp_path / "run", source, "--skip_bad")
    assert len(Cache(tmp_path / "run" / "cache")) == PICTURES - 1


def test_a_prompt_that_is_not_utf_8_is_drawn_or_refused_in_one_line(run, tmp_path, log):
    """A script in Latin-1 gives such bytes on the command line; Python hands them on as surrogates."""
    process = drawer(copy(run, tmp_path), log, "f\udcfcchse")
    assert process.wait() in (0, 2) and "Traceback" not in process.output, process.output


# ---- Without a network

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache on this machine, with the toy as someone/toy-sdxl in it. -> the folder of its files"""
    model = tmp_path / "hub" / "models--someone--toy-sdxl"
    shutil.copytree(PIPELINE, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    return model / "snapshots" / COMMIT


HUB_MODEL = ("--pretrained_model_name_or_path", "someone/toy-sdxl", "--resolution", 64, "--mixed_precision", "no")


@pytest.mark.slow
def test_a_model_and_a_dataset_of_the_hub_are_used_without_a_network(hub, run, pictures, tmp_path, monkeypatch):
    """On the train, behind a firewall, on a node without a route, all commands give what they give from a folder."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    images = [{"path": row["file_name"], "bytes": (pictures / row["file_name"]).read_bytes()} for row in rows]
    table = datasets.Dataset.from_dict({"image": images, "text": [row["text"] for row in rows]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.load_dataset("parquet", data_files={"train": str(tmp_path / "train.parquet")})
    (info,) = (tmp_path / "datasets").rglob("dataset_info.json")  # as a download leaves it, except for the names
    there = tmp_path / "datasets" / "someone___pictures" / "default" / "0.0.0" / COMMIT
    shutil.copytree(info.parent, there)
    shutil.move(there / "parquet-train.arrow", there / "pictures-train.arrow")
    facts = json.loads(info.read_text())
    (there / "dataset_info.json").write_text(json.dumps(facts | dict(dataset_name="pictures")))

    folder = tmp_path / "run"
    here("data.precompute", "--output_dir", folder, "--dataset_name", "someone/pictures", *HUB_MODEL)
    found, wanted = content(folder), content(run.folder)
    assert all(found[name] == wanted[name] for name in wanted if name != "manifest.json")
    model = Cache(folder / "cache").manifest["model"]
    assert model["name"] == "someone/toy-sdxl"
    assert model["revision"] == COMMIT  # and not a branch, which moves to another model
    here("train", "--output_dir", folder, *TRAIN)
    mine, theirs = (load_file(f / "lora.safetensors") for f in (folder, run.folder))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert b'"ss_sd_model_name":"someone/toy-sdxl"' in (folder / "lora.safetensors").read_bytes()
    here("infer", "--output_dir", folder, "--prompt", PROMPTS[0], "--num_inference_steps", 2)
    name = "compare/finetuned_0.png"
    assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(Image.open(run.folder / name)))


@pytest.mark.slow
def test_a_branch_of_the_hub_that_moved_is_another_run(hub, pictures, tmp_path):
    """The same id means another UNet then, and half of the steps would be on each."""
    run, other = tmp_path / "run", "b" * 40
    words = ("--output_dir", run, "--train_data_dir", pictures, *HUB_MODEL)
    here("data.precompute", *words)
    here("train", "--output_dir", run, *TRAIN, *SHORT, "--max_train_steps", 1)
    shutil.copytree(hub, hub.parent / other)
    (hub.parent.parent / "refs" / "main").write_text(other)
    here("data.precompute", *words)
    with pytest.raises(UserError, match=f"revision {COMMIT} there, {other} here"):
        here("train", "--output_dir", run, *TRAIN, *SHORT, "--max_train_steps", 2)


def test_a_disk_that_a_download_fills_is_not_a_model_that_is_missing(hub, pictures, tmp_path, log, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "blob"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    words = ("--output_dir", tmp_path / "run", "--train_data_dir", pictures, *HUB_MODEL)
    message = refused(Forked("data.precompute", words, log), 3)
    assert f"the disk refused to write {tmp_path / 'blob'}: No space left" in message


MISSING = {  # what was not downloaded -> the command that finds out, what its line says
    "vae/diffusion_pytorch_model.safetensors": ("data.precompute", "no diffusion_pytorch_model.safetensors in vae/"),
    "text_encoder_2/model.safetensors": ("data.precompute", "no model.safetensors in text_encoder_2/"),
    "tokenizer/tokenizer.json": ("data.precompute", "tokenizer: .* its vocabulary is missing"),
    "model_index.json": ("data.precompute", "model_index.json: not there or damaged"),
    "unet/diffusion_pytorch_model.safetensors": ("train", "no diffusion_pytorch_model.safetensors in unet/"),
    "unet/config.json": ("train", "unet/config.json: not there or damaged"),
    "scheduler/scheduler_config.json": ("train", "scheduler_config.json: not there or damaged"),
    "": ("data.precompute", "someone/toy-sdxl: not a folder here, and not from the hub"),
}


@pytest.mark.slow
@pytest.mark.parametrize("missing", MISSING)
def test_what_is_not_in_the_hubs_cache_is_named(missing, hub, pictures, tmp_path, log):
    name, message = MISSING[missing]
    run = tmp_path / "run"
    words = ("--output_dir", run, "--train_data_dir", pictures, *HUB_MODEL)
    if name == "train":
        here("data.precompute", *words)
    (hub / missing).unlink() if missing else shutil.rmtree(hub.parent.parent)
    assert re.search(message, refused(trainer(run, log) if name == "train" else Forked(name, words, log), 2))
    assert not (run / "lora.safetensors").exists()


def test_a_folder_with_another_run_is_refused_before_the_model_is_fetched(hub, pictures, tmp_path, log):
    """Nobody downloads five gigabytes to be told that --rank is another one than yesterday."""
    run = tmp_path / "run"
    here("data.precompute", "--output_dir", run, "--train_data_dir", pictures, *HUB_MODEL)
    here("train", "--output_dir", run, *TRAIN, *SHORT, "--max_train_steps", 1)
    before = tree(run)
    (hub / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "rank 4 there, 5 here" in refused(trainer(run, log, *SHORT, "--max_train_steps", 1, "--rank", 5), 2)
    assert tree(run) == before


# ---- Bad data through the commands


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def folder_of(path, files, captions=None):
    """A folder of pictures, {file name: bytes}, with a caption each."""
    path.mkdir()
    for name, blob in files.items():
        (path / name).write_bytes(blob)
    captions = captions or [f"number {i}" for i in range(len(files))]
    rows = [json.dumps(dict(file_name=name, text=text)) + "\n" for name, text in zip(files, captions)]
    (path / "metadata.jsonl").write_text("".join(rows))
    return path


def test_every_kind_of_picture_is_cached_as_the_upright_rgb_that_one_sees(tmp_path):
    """Otherwise 16 bits clipped to white, transparency gone black or a phone's picture on its side are learned."""
    rng = np.random.default_rng(0)
    colour, grey = rng.integers(0, 256, (64, 96, 3), np.uint8), rng.integers(0, 256, (64, 96), np.uint8)
    grey[0, :2] = 0, 255  # a float's range
    clear = rng.random((64, 96)) < 0.5
    alpha, white = np.where(clear, 0, 255).astype(np.uint8), np.uint8(255)
    palette = Image.fromarray(colour).quantize(16)
    moving = dict(save_all=True, append_images=[palette.rotate(180)])
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {  # name: (the file, what it shows)
        "cmyk.tif": (encoded(Image.fromarray(colour).convert("CMYK"), "TIFF"), colour),
        "palette.png": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "la.png": (encoded(Image.fromarray(np.dstack([grey, alpha]), "LA")), np.where(clear, white, grey)),
        "rgba.png": (encoded(Image.fromarray(np.dstack([colour, alpha]))), np.where(clear[..., None], white, colour)),
        "one_bit.png": (encoded(Image.fromarray(clear)), np.where(clear, 255, 0)),
        "sixteen_bits.png": (encoded(Image.fromarray(grey.astype(np.uint16) * 257)), grey),
        "float.tif": (encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"), grey),
        "turned.png": (encoded(Image.fromarray(np.ascontiguousarray(np.rot90(colour))), exif=turned), colour),
        "moving.gif": (encoded(palette, "GIF", **moving), np.asarray(palette.convert("RGB"))),
    }
    plain = {
        name: encoded(Image.fromarray(np.broadcast_to(np.atleast_3d(shown), (64, 96, 3)).astype(np.uint8)))
        for name, (_, shown) in kinds.items()
    }
    precompute(tmp_path / "kinds", folder_of(tmp_path / "a", {name: blob for name, (blob, _) in kinds.items()}))
    precompute(tmp_path / "plain", folder_of(tmp_path / "b", plain))
    none = np.zeros(len(kinds), bool)
    rows = range(len(kinds))
    found, wanted = (Cache(tmp_path / name / "cache").batch(rows, none, none) for name in ("kinds", "plain"))
    for i, name in enumerate(kinds):
        assert all(np.array_equal(found[what][i], wanted[what][i]) for what in ("mean", "std", "time_ids")), name


def test_the_strangest_rows_are_kept_or_left_out_by_name(tmp_path, log):
    """There is one of each. The command ends, and the manifest lists exactly what cannot be used."""
    bomb = bytearray(encoded(Image.new("RGB", (8, 8))))
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    good = encoded(Image.effect_noise((80, 80), 50).convert("RGB"))
    rows = {  # name: (picture, caption, why it is left out)
        "one_pixel.png": (encoded(Image.new("RGB", (1, 1), "red")), "a point", None),
        "small.png": (encoded(Image.new("RGB", (20, 30), "blue")), "smaller than the square", None),
        "empty_caption.png": (good, "", None),
        "long_caption.png": (good, "foxes and birds " * 100, None),
        "thread.png": (encoded(Image.new("L", (65_500, 1))), "too long", "longer than 16:1"),
        "bomb.png": (bytes(bomb), "too large", "pixels"),
        "none.png": (good, None, "its caption is None, not text"),
        "number.png": (good, 5, "its caption is 5, not text"),
    }
    blobs, captions = {name: row[0] for name, row in rows.items()}, [row[1] for row in rows.values()]
    source = folder_of(tmp_path / "source", blobs, captions)
    stopped = precomputer(tmp_path / "stopped", source, log)
    assert refused(stopped, 2).startswith("error: 4 of 8 rows cannot be used, listed above; ")
    listed = [line for line in stopped.output.splitlines() if line.split(": ")[0] in rows]
    assert [line.split(": ")[0] for line in listed] == [name for name, (_, _, why) in rows.items() if why]
    process = precomputer(tmp_path / "run", source, log, "--skip_bad")
    assert process.wait() == 0, process.output
    assert "longer than CLIP reads: 1 caption;" in process.output and "4 rows left out" in process.output
    cache = Cache(tmp_path / "run" / "cache")
    assert cache.names(range(len(cache))) == [name for name, (_, _, why) in rows.items() if not why]
    left_out = dict(cache.manifest["skipped"])
    assert left_out.keys() == {name for name, (_, _, why) in rows.items() if why}
    assert all(rows[name][2] in why for name, why in left_out.items())


@pytest.mark.slow
def test_what_lies_among_the_pictures_and_is_none_is_left_out_by_name(tmp_path):
    """Pipes, devices, links to nothing, what a user may not read, and what would start a program."""
    source, programs = tmp_path / "source", tmp_path / "programs"
    (source / "closed").mkdir(parents=True)
    good = encoded(Image.effect_noise((80, 80), 50).convert("RGB"))
    for name in ("good", "closed/in", "eps", "denied", "pipe", "device", "nowhere", "mute", "latin"):
        (source / f"{name}.txt").write_text("a picture")
        if name not in ("pipe", "device", "nowhere"):
            (source / f"{name}.png").write_bytes(good)
    (source / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    os.mkfifo(source / "pipe.png")
    (source / "device.png").symlink_to("/dev/zero")
    (source / "nowhere.png").symlink_to(tmp_path / "gone")
    (source / "mute.txt").unlink()
    (source / "latin.txt").write_bytes(b"f\xfcchse")
    (source / "denied.png").chmod(0)
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    words = ("--output_dir", tmp_path / "run", "--train_data_dir", source, *PRECOMPUTE)
    user = dict(env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}, preexec_fn=as_a_user)
    wanted = {
        "closed": "a folder that cannot be read (Permission denied)",
        "denied.png": "Permission denied",
        "device.png": "not a file but a folder, pipe or device",
        "eps.png": "not a picture that can be read (none of PNG, ",
        "latin.png": "latin.txt: 'utf-8' codec can't decode",
        "mute.png": "no metadata.jsonl in the folder and no mute.txt next to it",
        "nowhere.png": "No such file or directory",
        "pipe.png": "not a file but a folder, pipe or device",
    }
    (source / "closed").chmod(0)
    try:
        command("data.precompute", *words, "--skip_bad", **user)
    finally:
        (source / "closed").chmod(0o755)
    cache = Cache(tmp_path / "run" / "cache")
    assert cache.names(range(len(cache))) == ["good.png"] and not (tmp_path / "started").exists()
    found = dict(cache.manifest["skipped"])
    assert found.keys() == wanted.keys() and all(found[name].startswith(wanted[name]) for name in wanted), found


def test_a_cache_of_the_earlier_format_keeps_its_captions(cached, pictures, tmp_path, done, log, capsys):
    """Format 2 had moments-HxW.rows, one caption a picture, and pictures in whatever colours they had."""
    run = tmp_path / "run"
    shutil.copytree(cached, run)
    cache = run / "cache"
    for kind in ("rows", "keys"):
        (cache / f"posteriors-64x64.{kind}").rename(cache / f"moments-64x64.{kind}")
    (cache / "captions.npy").unlink()
    manifest = json.loads((cache / "manifest.json").read_text())
    for name in ("checksum", "buckets", "posterior_shapes", "keys", "identity", "decoder"):
        del manifest[name]
    manifest |= dict(version=2, sizes=[[64, 64]], moments_shapes=[[2, 4, 8, 8]])
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (cache / "manifest.json").write_text(json.dumps(manifest | dict(checksum=checksum), indent=1))
    assert "written by another version; run python -m data.precompute again, it keeps" in refused(trainer(run, log), 2)
    precompute(run, pictures)
    out = capsys.readouterr().out
    assert "its format is 2, here it is 3: captions of the same encoders are kept, pictures are encoded again" in out
    assert f"{PICTURES} of {PICTURES} rows to encode: {PICTURES} images new; " in out
    assert not done["captions"] and len(done["pictures"]) == PICTURES
    found = content(run)
    assert all(blob == found[name] for name, blob in content(cached).items())


DATA = {  # flags -> what the line says
    "no such column of captions": (
        ("--dataset_name", "saved", "--caption_column", "words"),
        "--caption_column words: .* which has image, text",
    ),
    "no such column of images": (
        ("--dataset_name", "saved", "--image_column", "photo"),
        "--image_column photo: .* which has image, text",
    ),
    "no rows": (("--dataset_name", "none"), "--dataset_name none: no rows"),
    "no such dataset": (("--dataset_name", "nobody/nothing"), "--dataset_name nobody/nothing: "),
    "no such folder": (("--train_data_dir", "nowhere"), "--train_data_dir nowhere: no such folder"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_is_not_there_is_refused_before_a_model_is_looked_for(case, pictures, tmp_path, log, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for name, paths in (("saved", [str(pictures / "000.png")]), ("none", [])):
        datasets.Dataset.from_dict({"image": paths, "text": ["x"] * len(paths)}, features=features).save_to_disk(name)
    words, message = DATA[case]
    words = ("--output_dir", "run", "--pretrained_model_name_or_path", "nobody/nothing", *words)
    assert re.search(message, refused(Forked("data.precompute", words, log), 2))
    assert os.listdir(tmp_path / "run" / "cache") == [".writer"]


@pytest.fixture
def model(tmp_path):
    """A copy of the toy's model to be changed."""
    shutil.copytree(PIPELINE, tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change):
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def remove_vocabulary(model):
    (model / "tokenizer" / "tokenizer.json").unlink()


def make_captions_alike(model):
    for name in ("text_encoder", "text_encoder_2"):
        rewrite(model / name / "model.safetensors", lambda n, t: t * 0 if "token_embedding" in n else t)


def make_nan(model):
    rewrite(model / "text_encoder" / "model.safetensors", lambda n, t: t * torch.nan if "layers.0" in n else t)


ENCODERS = {  # what is wrong with the model -> (how it is done, what the line says)
    "no vocabulary": (remove_vocabulary, "its vocabulary is missing"),
    "all captions alike": (make_captions_alike, "the same for every caption"),
    "NaN": (make_nan, "not finite"),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_that_cannot_be_trusted_write_no_row(case, model, pictures, tmp_path, log):
    """They would be ten thousand embeddings of nothing, found out after the training."""
    damage, message = ENCODERS[case]
    damage(model)
    process = precomputer(tmp_path / "run", pictures, log, "--pretrained_model_name_or_path", model)
    assert message in refused(process, 2)
    assert not list((tmp_path / "run" / "cache").glob("[!.]*"))


def test_another_tokenizer_encoder_or_precision_encodes_again_what_it_makes(model, cached, pictures, tmp_path, done):
    """A cache half of one model and half of another would train on what no pipeline gives."""
    run = tmp_path / "run"
    shutil.copytree(cached, run)

    def encodes(captions, images, *flags):
        precompute(run, pictures, "--pretrained_model_name_or_path", model, *flags)
        assert (len(done["captions"]), len(done["pictures"])) == (captions, images)
        done["captions"].clear(), done["pictures"].clear()

    encodes(0, 0)  # the same model in another folder
    tokenizer = model / "tokenizer_2" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace('"pad_token": "!"', '"pad_token": "<|endoftext|>"'))
    encodes(PICTURES, 0)
    rewrite(model / "text_encoder" / "model.safetensors", lambda n, t: t * 1.01)
    encodes(PICTURES, 0)
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(vae, lambda n, t: t * 1.01 if "encoder.conv_out" in n else t)
    encodes(0, PICTURES)
    encodes(PICTURES, PICTURES, "--mixed_precision", "bf16")
    encodes(0, 0)  # back again costs nothing


def test_a_run_on_another_base_model_is_refused(model, run, tmp_path, log):
    """The pictures and captions are the same and the UNet is another: half of the steps would belong to each."""
    folder = copy(run, tmp_path)
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    rewrite(unet, lambda n, t: t * 1.01 if n == "conv_in.weight" else t)
    precompute(folder, run.pictures, "--pretrained_model_name_or_path", model)
    before = tree(folder)
    assert refused(trainer(folder, log), 2).endswith(": holds another run: another UNet than when it began")
    assert tree(folder) == before


@pytest.mark.slow
def test_one_flipped_bit_of_the_cache_stops_training_and_precompute_repairs_it(fresh, run, log):
    """If it were trained on, it would be in the weights and nowhere to be seen."""
    path = fresh / "cache" / "captions.rows"
    blob = bytearray(path.read_bytes())
    for at in range(30_000, len(blob), 15_000):  # every caption, so that the first step meets one
        blob[at] ^= 64
    path.write_bytes(blob)
    message = refused(trainer(fresh, log), 2)
    assert re.search(r"captions\.rows: row \d+ is damaged; run python -m data.precompute again, it repairs it", message)
    assert not (fresh / "lora.safetensors").exists() and not states(fresh)
    precompute(fresh, run.pictures)
    here("train", "--output_dir", fresh, *TRAIN)
    same_run(fresh, run.folder)


def poison(run, example):
    """Write NaN into a picture's posterior, under a good checksum."""
    cache = Cache(run / "cache")
    at, posteriors = int(cache.index[example]["picture"]), cache.posteriors[0]
    row = np.full_like(posteriors[at], np.nan)
    for path, place, blob in (
        (posteriors.path, at * row.nbytes, row.tobytes()),
        (posteriors.keys_path, at * 36 + 32, struct.pack("<I", zlib.crc32(row))),
    ):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(blob)


@pytest.mark.slow
def test_nan_ends_with_exit_code_4_as_often_as_it_is_met_and_the_last_good_state_stays(fresh, log):
    """A job queue that starts the run again must not get past it, nor lose what was good."""
    cache, values = Cache(fresh / "cache"), settings("train", train_batch_size=1, gradient_accumulation_steps=1)
    first = [Batches(cache, values, 1000).rows(step, 0)[0] for step in range(6)]
    step = next(step for step in range(2, 6) if first[step] not in first[:step])
    poison(fresh, first[step])
    for _ in range(2):
        message = refused(trainer(fresh, log, *SHORT, "--checkpointing_steps", 1), 4)
        assert re.search(rf"the loss is nan \(step {step + 1}, {first[step]:03d}\.png, timesteps \[\d+\]", message), (
            message
        )
        assert states(fresh)[-1] == f"{step:06d}.state" and vector(fresh, step).isfinite().all()
        assert not (fresh / "lora.safetensors").exists()
        assert [m["step"] for m in metrics(fresh)] == list(range(1, step + 1))


TOO_LARGE = (*SHORT, "--learning_rate", 1e6, "--max_train_steps", 1)


def test_weights_that_fp16_cannot_hold_are_never_exported(fresh):
    """They are finite in training and infinite in the file: black pictures for everyone who loads it."""
    (fresh / "lora.safetensors").write_bytes(b"the last good one")
    with pytest.raises(UserError, match="is not finite in fp16: .* was not written"):
        here("train", "--output_dir", fresh, *TRAIN, *TOO_LARGE)
    assert not list(fresh.glob("*.safetensors"))
    assert (
        fresh / "earlier-1" / "lora.safetensors"
    ).read_bytes() == b"the last good one"  # moved before the first step


def test_weights_that_fp16_cannot_hold_end_with_exit_code_4(fresh, log):
    refused(trainer(fresh, log, *TOO_LARGE), 4)


class Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def tensors_of(change):
    """-> a function that writes a file of weights again with change(its tensors)"""
    return lambda path: save_file(change(load_file(path)), path)


def without_partners(tensors):
    return {n: t for n, t in tensors.items() if not n.endswith("attn1_to_q.lora_up.weight")}


def full_of_nan(tensors):
    return {n: t * torch.nan if t.dim() else t for n, t in tensors.items()}


def narrower(tensors):
    return {n: t[:, :-1].contiguous() if "lora_down" in n else t for n, t in tensors.items()}


def renamed(tensors):
    return {n.replace("lora_unet_", "lora_net_"): t for n, t in tensors.items()}


BAD_WEIGHTS = {
    "pickle": (lambda path: torch.save({"lora": Opens(str(path.parent / "ran"))}, path), "not a readable .safetensors"),
    "a missing partner": (tensors_of(without_partners), r"lora_down.weight has no partner"),
    "NaN": (tensors_of(full_of_nan), "not a finite number"),
    "another shape": (tensors_of(narrower), "a LoRA for text of width 127"),
    "other names": (tensors_of(renamed), "128 layers of something else"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_draw_nothing(case, run, tmp_path, log):
    """If half of them were loaded, they would draw what looks like a bad training; a pickle would do what it likes."""
    folder = copy(run, tmp_path)
    damage, message = BAD_WEIGHTS[case]
    damage(folder / "lora.safetensors")
    before = tree(folder)
    said = refused(drawer(folder, log, "x"), 2)
    assert "lora.safetensors: " in said and re.search(message, said)
    assert tree(folder) == before and not (folder / "ran").exists()


# ---- What is not installed


def test_without_bitsandbytes_its_flag_is_torchs_adamw_and_a_line(fresh, log, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    process = trainer(fresh, log, "--use_8bit_adam", "--max_train_steps", 1)
    assert process.wait() == 0, process.output
    assert process.output.count("--use_8bit_adam: the package bitsandbytes is not installed") == 1


@pytest.mark.slow
def test_without_bitsandbytes_and_tensorboard_training_gives_the_same_bytes(fresh, run, log, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    process = trainer(fresh, log)
    assert process.wait() == 0, process.output
    same_run(fresh, run.folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["data.precompute", "train", "infer"])
def test_without_a_gpu_it_is_said_that_the_cpu_computes(name, run):
    """A driver that does not load makes a month of an hour, and the first line should say so."""
    assert "no GPU" in {"data.precompute": run.precompute, "train": run.train, "infer": run.infer}[name]
