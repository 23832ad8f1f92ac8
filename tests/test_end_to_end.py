"""The real commands, as a user types them: what they write, what they say, and how they end."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    PRECOMPUTE,
    PROMPTS,
    ROOT,
    STEPS,
    TOKEN,
    TRAIN,
    command,
    lines,
    one_line_error,
    start,
    untitled,
    when,
)
from PIL import Image
from safetensors.torch import load_file

WANTED = {
    *(".lock", "cache/.lock", "cache/.writer", "compare/.lock"),
    *("run.json", "rows.npz"),
    "cache/manifest.json",
    "cache/index.npy",
    "cache/captions.npy",
    "cache/names.txt",
    "cache/captions.rows",
    "cache/captions.keys",
    "cache/posteriors-64x64.rows",
    "cache/posteriors-64x64.keys",
    "lora.safetensors",
    *(f"lora-{step:06d}.safetensors" for step in (2, 4, 6)),
    *(f"state/{step:06d}.state" for step in (4, 6)),
    "metrics.jsonl",
    *(f"compare/{kind}_{i}.png" for kind in ("baseline", "finetuned") for i in range(2)),
    "compare/grid.png",
    "compare/report.json",
    "compare/report.html",
}


def files(folder):
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


def test_every_file_that_is_promised_and_no_other(run):
    """No temporary file and no second copy: the folder holds what the documentation names."""
    assert set(files(run.folder)) == WANTED
    manifest = json.loads((run.folder / "cache" / "manifest.json").read_text())
    assert {"model", "vae", "resolution", "rows", "content"} <= set(manifest) and manifest["rows"] == PICTURES
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in log] == list(range(1, STEPS + 1))
    for m in log:
        assert {"loss", "lr", "grad_norm", "loss_scale", "images_per_s", "peak_gib"} <= set(m)
        assert np.isfinite([m["loss"], m["grad_norm"]]).all() and m["images_per_s"] > 0
    assert all(t.isfinite().all() for t in load_file(run.folder / "lora.safetensors").values())
    for name in ("baseline_0", "finetuned_1", "grid"):
        assert Image.open(run.folder / "compare" / f"{name}.png").mode == "RGB"
    report = json.loads((run.folder / "compare" / "report.json").read_text())
    assert report["prompts"] == list(PROMPTS) and all(change > 0 for change in report["mean_pixel_change"])


def test_the_last_save_is_the_export(run):
    last, export = load_file(run.folder / f"lora-{STEPS:06d}.safetensors"), load_file(run.folder / "lora.safetensors")
    assert last.keys() == export.keys() and all(torch.equal(last[name], export[name]) for name in last)


def test_the_output_says_what_was_done(run):
    what = f"{PICTURES} captions new, {PICTURES} images new"
    for done in ("to encode", "encoded"):
        assert f"{PICTURES} of {PICTURES} rows {done}: {what}; " in run.precompute
    assert f"train: {STEPS} of {STEPS} steps, loss " in run.train
    assert str(run.folder / "compare" / "grid.png") in run.infer


def test_the_token_is_in_no_byte_that_was_written(run):
    for name, path in files(run.folder).items():
        assert TOKEN.encode() not in path.read_bytes(), name
    assert TOKEN not in run.precompute + run.train + run.infer


def test_what_people_publish_holds_no_path_and_no_caption(run):
    captions = [json.loads(line)["text"] for line in (run.pictures / "metadata.jsonl").read_text().splitlines()]
    for path in run.folder.glob("*.safetensors"):
        blob = path.read_bytes()
        for secret in (str(run.folder.parent), str(ROOT), str(run.pictures), os.path.expanduser("~"), *captions):
            assert secret.encode() not in blob, secret


@pytest.mark.slow
def test_refusals_of_every_command(run, tmp_path):
    """Real processes with everything imported: one line, exit code 2."""
    output = command("train", "--output_dir", tmp_path / "empty", "--mixed_precision", "no", code=2)
    assert "no finished cache here; run python -m data.precompute" in one_line_error(output)
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder)
    output = command("train", "--output_dir", folder, *TRAIN, "--rank", 5, code=2)
    assert "rank 4 there, 5 here" in one_line_error(output)
    words = ("--output_dir", folder, "--train_data_dir", tmp_path / "nowhere")
    assert "--train_data_dir" in one_line_error(command("data.precompute", *words, *PRECOMPUTE, code=2))
    (folder / "lora.safetensors").write_bytes(b"not weights")
    assert "lora.safetensors" in one_line_error(command("infer", "--output_dir", folder, "--prompt", "x", code=2))
    for path in (folder / "state").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert "every state is damaged" in one_line_error(command("train", "--output_dir", folder, *TRAIN, code=2))


@pytest.mark.slow
def test_a_finished_run_started_again_exits_0(run, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(run.folder, folder)
    assert "finished" in command("train", "--output_dir", folder, *TRAIN)
    assert untitled(folder / "lora.safetensors") == untitled(run.folder / "lora.safetensors")


@pytest.mark.slow
def test_stopped_by_every_signal_in_turn_ends_with_the_same_bytes(run, fresh):
    """python -m train itself, stopped by SIGTERM, SIGINT and SIGKILL in turn, once with a second command next to it."""
    folder = fresh
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        done = lines(folder / "metrics.jsonl")
        process = start("train", "--output_dir", folder, *TRAIN)
        when(lambda: lines(folder / "metrics.jsonl") > done, process)
        if signum == signal.SIGTERM:
            process.send_signal(signal.SIGSTOP)
            refused = command("train", "--output_dir", folder, *TRAIN, code=2)
            assert f"process {process.pid} is working here" in one_line_error(refused)
            process.send_signal(signal.SIGCONT)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in output, output
    command("train", "--output_dir", folder, *TRAIN)
    assert untitled(folder / "lora.safetensors") == untitled(run.folder / "lora.safetensors")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in log] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_make_runs_the_presets_commands(tmp_path):
    """The Makefile's toy path with few steps: its flags are accepted, its files are there."""
    words = ["make", "precompute", "train", "compare", f"PYTHON={sys.executable}", f"RUN={tmp_path / 'toy'}"]

    def said(*words):
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    plan = said(*words, "-n")
    order = [plan.index(name) for name in ("data.toy.draw", "-m data.precompute", "-m train", "-m infer")]
    assert order == sorted(order)
    naruto = said(*words, "-n", "PRESET=naruto")
    assert "stabilityai/stable-diffusion-xl-base-1.0" in naruto and "data.toy" not in naruto
    wrong = subprocess.run([*words, "-n", "PRESET=other"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "none of toy, naruto" in wrong.stderr
    assert said("make", "help").count("make ") > 6


BENCHMARKS = {
    "step": [],
    "precompute": ["--toy"],
    "full_size": ["--toy", "--single"],
    "job": ["--toy"],
    "ranks": ["--toy"],
    "many_rows": ["--rows", 10, 30],
    "contact_sheet": ["--pictures", 12],
}


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", BENCHMARKS.items())
def test_every_benchmark_runs(name, flags, tmp_path):
    """On a small model, so the figures mean nothing: the machine that they are for costs money."""
    if torch.cuda.is_available():
        pytest.skip("takes minutes on a GPU")
    command(f"tests.bench.{name}", tmp_path, *flags)
    assert json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu(fresh, tmp_path):
    """fp16 with the scaler and 8-bit AdamW: it resumes, and gives almost the same weights as without a stop."""
    flags = [*TRAIN, "--mixed_precision", "fp16", "--use_8bit_adam"]
    folders = [fresh, tmp_path / "twin"]
    shutil.copytree(folders[0] / "cache", folders[1] / "cache")
    command("train", "--output_dir", folders[0], *flags)
    command("train", "--output_dir", folders[1], *flags, "--max_train_steps", 3)
    command("train", "--output_dir", folders[1], *flags)
    one, other = (load_file(folder / "lora.safetensors") for folder in folders)
    for name, tensor in one.items():  # almost, because CUDA's sums have no fixed order
        torch.testing.assert_close(tensor, other[name], rtol=0.05, atol=5e-3)
    command("infer", "--output_dir", folders[0], "--prompt", *PROMPTS, "--num_inference_steps", 2)
    report = json.loads((folders[0] / "compare" / "report.json").read_text())
    assert report["peak_gib"] > 0 and all(change > 0 for change in report["mean_pixel_change"])


def made(*words):
    return subprocess.run(["make", "-n", "PYTHON=python", *words], cwd=ROOT, capture_output=True, text=True)


def test_a_preset_may_be_a_name_with_its_variables_or_a_file_and_others_are_named(tmp_path):
    one = made("train", "PRESET=cats", "cats.precompute=--x", "cats.train=--rank 7").stdout
    assert '-m train --output_dir "$RUN"' in one and "--rank 7" in one
    mine = tmp_path / "dogs.mk"
    mine.write_text("dogs.precompute = $(SDXL)\ndogs.train = --rank 9\ndogs.compare = --prompt x\n")
    assert "--rank 9" in made("train", f"PRESET={mine}").stdout
    assert "stable-diffusion-xl-base-1.0" in made("precompute", f"PRESET={mine}").stdout
    assert "my cats.mk: a preset's name or file has no spaces" in made("train", "PRESET=my cats.mk").stderr
    unknown = made("train", "PRESET=others")
    assert unknown.returncode and "PRESET=others is none of toy, naruto, mine" in unknown.stderr
    shipped = made("precompute", "train", "compare", "PRESET=mine").stdout
    assert "sdxl-vae-fp16-fix" in shipped and "--learning_rate 1e-4" in shipped and "score" not in shipped


@pytest.mark.parametrize("name", ["a b", "a;touch hurt", "$(touch hurt)", "it's", '"quoted"', "a&b"])
def test_a_runs_folder_of_any_name_is_one_word_for_make(name, tmp_path):
    """make check once deleted /x/run when RUN was "/x/run 2"."""
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    tool.chmod(0o755)
    words = [
        "make",
        "-s",
        "train",
        f"RUN={name.replace('$', '$$')}",
        f"CACHE={name.replace('$', '$$')}",
        f"PYTHON={tool}",
    ]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[told.index("--output_dir") + 1] == told[told.index("--cache_dir") + 1] == name
    assert not (ROOT / "hurt").exists()


def test_make_check_removes_nothing_but_what_it_made(tmp_path):
    tool, run = tmp_path / "tool", tmp_path / "run 2"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o755)
    for folder in (tmp_path / "run", run, run / "check"):
        folder.mkdir()
        (folder / "lora.safetensors").write_bytes(b"a week of work")
    subprocess.run(["make", "-s", "check", f"RUN={run}", f"PYTHON={tool}"], cwd=ROOT, check=True)
    assert len(list(tmp_path.rglob("lora.safetensors"))) == 3 and len(list(run.iterdir())) == 2
