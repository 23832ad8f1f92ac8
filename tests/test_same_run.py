"""Which run a folder holds: said in words, with the commands that go on, before torch is imported."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    ROOT,
    STEPS,
    TRAIN,
    Forked,
    edit_captions,
    here,
    lines,
    one_line_error,
    precompute,
    settings,
    untitled,
    when,
)

from data.cache import INDEX, changed_facts, changed_rows
from data.common.errors import UserError
from train import same_run

ONE_BATCH = ("--train_batch_size", 8, "--gradient_accumulation_steps", 1)
LEARNED = ("--max_train_steps", 2, "--checkpointing_steps", 1)


def weights(run):
    return untitled(run / "lora.safetensors")


def refused(run, log, *more):
    """What python -m train says to somebody, who gets the last line on stderr. -> (lines before it, the error)"""
    process = Forked("train", ("--output_dir", run, *TRAIN, *map(str, more)), log)
    assert process.wait() == 2, process.output
    return process.output.splitlines(), one_line_error(process.output)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.mark.slow
def test_what_differs_is_said_as_people_say_it_with_two_commands_that_go_on(fresh, source, tmp_path, log):
    """A hash there and a hash here tell nobody that it was the caption that he edited."""
    here("train", "--output_dir", fresh, *TRAIN, *LEARNED)
    before = weights(fresh)
    edit_captions(source, lambda rows: [dict(rows[0], text="a fox that is blue"), *rows[1:]])
    precompute(fresh, source)
    said, error = refused(fresh, log, *LEARNED, "--rank", 5)
    assert error == f"error: {fresh}: holds another run: 1 caption changed since it began; rank 4 there, 5 here"
    commands = [line.split(": python -m train ")[1] for line in said if ": python -m train " in line]
    assert len(commands) == 2 and weights(fresh) == before
    for words in map(shlex.split, commands):
        here("train", *words)
    assert weights(fresh.parent / f"{fresh.name}-2") == weights(fresh) != before
    assert untitled(fresh / "earlier-1" / "lora.safetensors") == before
    assert {path.name for path in fresh.glob("lora*")} == {path.name for path in (fresh / "earlier-1").glob("lora*")}


@pytest.mark.slow
def test_three_runs_of_different_ranks_on_one_cache_at_once(cached, tmp_path):
    """People train one cache ten times. Each writes down where it is, and infer finds it."""
    shutil.copytree(cached / "cache", tmp_path / "cache")
    runs = []
    for rank in (2, 3, 4):
        words = ("--output_dir", tmp_path / f"r{rank}", "--cache_dir", tmp_path / "cache", *TRAIN)
        words += ("--rank", rank, "--max_train_steps", 1000)
        runs.append(Forked("train", words, tmp_path / f"log{rank}"))
    for rank, run in zip((2, 3, 4), runs):
        when(lambda rank=rank: lines(tmp_path / f"r{rank}" / "metrics.jsonl") >= 1, run)
    for run in runs:
        run.send(15)
    assert [run.wait() for run in runs] == [143] * 3
    done = lines(tmp_path / "r2" / "metrics.jsonl")
    here(
        "train", "--output_dir", tmp_path / "r2", *TRAIN, "--rank", 2, "--max_train_steps", done
    )  # without --cache_dir
    here("infer", "--output_dir", tmp_path / "r2", "--prompt", "x", "--num_inference_steps", 1)
    assert not (tmp_path / "r2" / "cache").exists()
    said, _ = refused(tmp_path / "r2", tmp_path / "log", "--rank", 5)
    assert f"--rank 5 --cache_dir {tmp_path}/cache" in " ".join(said)  # the cache that the run began with
    words = ("--output_dir", tmp_path / "r2", *TRAIN, "--rank", 5, "--max_train_steps", 1000, "--restart")
    again = Forked("train", words, tmp_path / "log5")
    old, new = tmp_path / "r2" / "earlier-1" / "metrics.jsonl", tmp_path / "r2" / "metrics.jsonl"
    when(lambda: old.exists() and lines(new) >= 1, again)
    again.send(2)
    assert again.wait() == 130 and "run the same command without --restart to go on" in again.output


def test_weights_whose_state_is_gone_are_moved_away_at_a_start_from_0(run, tmp_path, capsys):
    """They would stand among new ones, and nobody could tell them apart."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "state")
    here("train", "--output_dir", folder, *TRAIN, "--max_train_steps", 2, "--seed", 7)
    assert sorted(path.name for path in folder.glob("lora*")) == ["lora-000002.safetensors", "lora.safetensors"]
    assert len(list((folder / "earlier-1").glob("lora*"))) == STEPS // 2 + 1
    assert f"{folder}: what was here is in {folder}/earlier-1" in capsys.readouterr().out
    assert lines(folder / "metrics.jsonl") == 2


def test_the_rows_that_changed_are_counted():
    old = np.zeros(4, INDEX)
    new = np.zeros(5, INDEX)
    names = ["a", "b", "b", "c"]
    assert changed_rows((old, names), (old, names)) == []
    assert changed_rows((old, names), (old, ["c", "a", "b", "b"])) == ["another order"]
    new["caption_digest"][:2], new["image_digest"][1], new["time_ids"][2, 0] = b"x", b"y", 7
    said = changed_rows((old, names), (new, ["a", "b", "b", "d", "e"]))
    assert said == [
        "2 captions changed",
        "1 image changed",
        "2 rows added",
        "1 row removed",
        "1 row at another resolution or crop",
    ]


@pytest.mark.slow
def test_another_length_and_other_orders_are_said_as_such(fresh, source, tmp_path, log):
    """The model and the VAE are the same. A run whose rows.npz is of an earlier version has the words that it had."""
    here("train", "--output_dir", fresh, *TRAIN, *LEARNED)
    edit_captions(source, lambda rows: [row | {"text": "a, b, c, d"} for row in rows])
    precompute(fresh, source)
    here("train", "--output_dir", fresh, *TRAIN, *LEARNED, "--restart")
    precompute(fresh, source, "--shuffle_caption", "--caption_variants", 3, "--max_token_length", 150)
    words = "captions in 3 orders instead of 1; captions at another length (75 there, 150 here)"
    assert refused(fresh, log)[1] == f"error: {fresh}: holds another run: {words}"
    with np.load(fresh / "rows.npz") as began:
        np.savez(fresh / "rows.npz", index=began["index"], names=began["names"])
    assert refused(fresh, log)[1].endswith("holds another run: the cache was encoded by another model or VAE")


def test_each_fact_of_how_rows_were_encoded_is_named():
    then = dict(text_shape=[77, 8], caption_variants=4, caption_orders="seed 1, 0 kept", decoder="x")
    then["identity"] = dict(text_encoders="t", vae="v")
    assert changed_facts(then, then) == []
    for changes, words in (
        (dict(caption_variants=1, caption_orders=None), "captions in 1 order instead of 4"),
        (dict(caption_orders="seed 2, 0 kept"), "captions in other orders"),
        (
            dict(text_shape=[227, 8], identity=dict(text_encoders="t-3chunks", vae="v")),
            "captions at another length (75 there, 225 here)",
        ),
        (dict(identity=dict(text_encoders="u", vae="v")), "captions by other text encoders or in another precision"),
        (dict(identity=dict(text_encoders="t", vae="w")), "images by another VAE or in another precision"),
        (dict(decoder="y"), "images by another decoder"),
    ):
        assert changed_facts(then, then | changes) == [words]


@pytest.mark.parametrize(
    "there, here, said",
    [
        (dict(unet="12ab", base="local-12ab"), dict(unet="34cd", base="local-34cd"), "another UNet than when it began"),
        (dict(base="local-12ab"), dict(base="org/model"), "another UNet than when it began"),
        (dict(base="org/a"), dict(base="org/b"), "base org/a there, org/b here"),
        (dict(scheduler="1"), dict(scheduler="2"), "another noise schedule or prediction type than when it began"),
        (dict(network_weights="1"), dict(network_weights="2"), "begun from other weights"),
        (dict(network_weights="1"), {}, "begun from a file of weights, and none is named here"),
        ({}, dict(network_weights="2"), "begun without a file of weights, and one is named here"),
    ],
)
def test_digests_are_said_in_words(there, here, said, tmp_path):
    with pytest.raises(same_run.AnotherRun) as error:
        same_run.check_same(tmp_path, there, here)
    assert str(error.value) == f"{tmp_path}: holds another run: {said}"


@pytest.mark.slow
def test_what_changed_is_said_of_a_run_begun_before_pictures_could_repeat(fresh, source, log):
    here("train", "--output_dir", fresh, *TRAIN, *LEARNED)
    with np.load(fresh / "rows.npz") as began:
        index, names = began["index"], began["names"]
    np.savez(fresh / "rows.npz", index=index[[n for n in INDEX.names if n != "repeats"]], names=names)
    here("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 3)  # it goes on
    (source / "3_more").mkdir()
    shutil.move(source / "000.png", source / "3_more" / "000.png")
    edit_captions(source, lambda rows: [dict(rows[0], file_name="3_more/000.png"), *rows[1:]])
    precompute(fresh, source)
    assert "1 row added, 1 row removed since it began" in refused(fresh, log)[1]
    other = index.copy()
    other["repeats"][3] = 2
    assert changed_rows((index, names.tolist()), (other, names.tolist())) == ["1 row repeated otherwise"]


def test_a_run_begun_before_runs_were_written_down_goes_on(run, tmp_path):
    """It has no run.json; its state alone says what it is."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "run.json").unlink(), (folder / "rows.npz").unlink()
    here("train", "--output_dir", folder, *TRAIN)
    assert weights(folder) == weights(run.folder) and not (folder / "earlier-1").exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"cache_dir": 3, "identity": {}}', b"[" * 100_000])
def test_a_damaged_run_json_is_named(damage, run, tmp_path, log):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(damage)
    assert f"{tmp_path}/run/run.json: damaged" in refused(tmp_path / "run", log)[1]


def seconds(*words):
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    return time.perf_counter() - began


@pytest.mark.slow
def test_what_needs_no_model_is_refused_without_torch(run, tmp_path):
    """Importing it takes seconds. Measured against python with numpy, which the same machine has to start too."""
    base = min(seconds("train", "--nonsense") for _ in range(2))
    for words in (
        ("train", "--output_dir", tmp_path / "no cache"),
        ("train", "--output_dir", run.folder, *TRAIN, "--rank", 5),
        ("infer", "--output_dir", tmp_path / "nothing", "--prompt", "x"),
        ("infer", "--output_dir", run.folder, "--prompt", "x", "--lora_path", tmp_path / "gone.safetensors"),
        ("infer", "--output_dir", run.folder, "--prompt", "x", "--lora_path", run.folder / "state" / "000006.state"),
        ("train", "--output_dir", run.folder, *TRAIN, "--network_weights", run.folder / "state" / "000006.state"),
    ):
        assert min(seconds(*words) for _ in range(2)) < base + 1, words


def test_restart_of_an_empty_folder_is_a_start(fresh):
    here("train", "--output_dir", fresh, *TRAIN, *LEARNED, "--restart")
    assert not (fresh / "earlier-1").exists() and json.loads((fresh / "run.json").read_text())["cache_dir"] is None


@pytest.mark.slow
def test_a_second_restart_keeps_both(fresh):
    for _ in range(3):
        here("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 1, "--restart")
    assert [(fresh / f"earlier-{n}" / "lora.safetensors").exists() for n in (1, 2, 3)] == [True, True, False]
    assert same_run.earlier(fresh) == fresh / "earlier-3" and len(list((fresh / "cache").iterdir())) > PICTURES // 2


@pytest.mark.slow
def test_a_run_keeps_the_number_of_threads_that_it_began_with(cached, tmp_path, log):
    """On a CPU they decide the last bits: resumed on a machine with other cores, the run would end with other bytes."""
    threads = {"once": (2,), "resumed": (2, 1), "one": (1,)}
    for name, counts in threads.items():
        shutil.copytree(cached / "cache", tmp_path / name / "cache")
        for steps, count in zip((1, 3) if len(counts) > 1 else (3,), counts):
            words = [*TRAIN, *ONE_BATCH, "--max_train_steps", steps, "--output_dir", tmp_path / name]
            process = Forked("train", words, log, before=partial(torch.set_num_threads, count))
            assert process.wait() == 0, process.output
    losses = {name: [json.loads(line)["loss"] for line in open(tmp_path / name / "metrics.jsonl")] for name in threads}
    assert losses["once"] == losses["resumed"]
    assert losses["once"] != losses["one"]  # else this test would show nothing


def test_restart_without_a_cache_moves_nothing(run, tmp_path, log):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("cache"))
    assert "no finished cache here" in refused(folder, log, "--restart")[1]
    assert (folder / "state").exists() and not (folder / "earlier-1").exists()
    shutil.copytree(run.folder / "cache", folder / "cache")
    assert "rank 1000 is more than the widest" in refused(folder, log, "--rank", 1000, "--restart")[1]
    assert (folder / "state").exists() and not (folder / "earlier-1").exists()


@pytest.mark.parametrize(
    "name, value", [("base_precision", "int3"), ("lora_layers", "every-other"), ("lora_layers", 7)]
)
def test_a_choice_that_only_another_version_has_is_refused(name, value, tmp_path):
    """Of the flags that a run knows by itself: whoever goes on with it does not give them."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "000001.state").touch()
    began = dict(cache_dir=None, identity={"network_weights": "0123456789abcdef", name: value})
    (tmp_path / "run.json").write_text(json.dumps(began))
    asked = settings("train", output_dir=str(tmp_path), network_weights="gone.safetensors")
    with pytest.raises(UserError, match=rf"run\.json: {name} {value} is none of (attn|plain), "):
        same_run.with_the_weights_facts(tmp_path, same_run.with_its_base(tmp_path, asked), [], 128)
