"""Epochs become steps: one sum, printed, in which repeats, batches and what is held out count."""

import json
import shutil

import numpy as np
import pytest
from conftest import PICTURES, TRAIN, change_cache, command, here, lines, one_line_error, settings

from data.cache import Cache
from data.common.errors import UserError
from train.batches import Batches
from train.epochs import in_steps


@pytest.fixture
def folder(cached, tmp_path):
    """A run's folder with a cache of eight pictures."""
    shutil.copytree(cached, tmp_path / "run")
    return tmp_path / "run"


def repeated(run, times, held_out=()):
    def change(index):
        index["repeats"], index["held_out"] = times, [i in held_out for i in range(len(index))]
        return index

    change_cache(run, change)


UNEVEN = (10, 10, 1, 1, 1, 1, 1, 1)
SUMS = [
    (1, (), dict(), 10, "8 images × 10 epochs / 4 = 20 steps", 20),
    (2, (), dict(), 10, "8 images × 2 × 10 epochs / 4 = 40 steps", 40),
    (2, (0, 3), dict(train_batch_size=2), 1, "6 images × 2 × 1 epoch / 8 = 2 steps, rounded up", 2),
    (UNEVEN, (), dict(gradient_accumulation_steps=1), 3, "8 images, repeated to 26, × 3 epochs / 1 = 78 steps", 78),
    (UNEVEN, (0, 1), dict(gradient_accumulation_steps=3), 1, "6 images × 1 epoch / 3 = 2 steps", 2),
    (1, (), dict(train_batch_size=100), 1, "8 images × 1 epoch / 400 = 1 step, rounded up", 1),
]


@pytest.mark.parametrize("times, held_out, flags, epochs, line, steps", SUMS)
def test_the_sum(times, held_out, flags, epochs, line, steps, folder, capsys):
    repeated(folder, times, held_out)
    asked = settings("train", max_train_steps=None, num_train_epochs=epochs, **flags)
    found = in_steps(asked, folder / "cache", ["--num_train_epochs", str(epochs)])
    assert capsys.readouterr().out == f"{line}\n"
    assert found.max_train_steps == steps and found.num_train_epochs == epochs


def test_so_many_steps_have_every_picture_so_often(folder):
    """What the sum promises, by the draws themselves."""
    repeated(folder, UNEVEN)
    values = settings("train", max_train_steps=None, num_train_epochs=5, gradient_accumulation_steps=2)
    steps = in_steps(values, folder / "cache", []).max_train_steps
    batches = Batches(Cache(folder / "cache"), values, 1000)
    drawn = [row for step in range(steps) for slot in range(2) for row in batches.rows(step, slot)]
    assert np.bincount(drawn).tolist() == [5 * times for times in UNEVEN]


def test_which_flag_counts_is_said_where_both_are_given(folder, capsys):
    epochs = settings("train", max_train_steps=None, num_train_epochs=1)
    in_steps(epochs, folder / "cache", ["--max_train_steps=5", "--num_train_epochs", "1"])
    in_steps(settings("train"), folder / "cache", ["--num_train_epochs", "1", "--max_train_steps", "500"])
    in_steps(settings("train"), folder / "cache", ["--max_train_steps", "500"])
    assert capsys.readouterr().out.splitlines() == [
        "8 images × 1 epoch / 4 = 2 steps; --num_train_epochs counts, because it comes after --max_train_steps",
        "500 steps: --max_train_steps counts, because it comes after --num_train_epochs",
    ]


def test_epochs_without_end_are_refused(folder):
    asked = settings("train", max_train_steps=None, num_train_epochs=10**9)
    with pytest.raises(UserError, match="^--num_train_epochs 1000000000: 2,000,000,000 steps; at most 1,000,000,000"):
        in_steps(asked, folder / "cache", [])


@pytest.mark.slow
def test_the_command_trains_epochs_and_goes_on_for_more_of_them(folder, capsys):
    """Whatever the run was begun with: steps or epochs, fewer or more. The first line says what is repeated."""
    repeated(folder, 2)
    here("train", "--output_dir", folder, *TRAIN, "--num_train_epochs", 1)  # TRAIN has steps: 6, and 4 images a step
    said = capsys.readouterr().out
    assert "8 images × 2 × 1 epoch / 4 = 4 steps; --num_train_epochs counts" in said
    assert "8 pictures, repeated to 16 an epoch, none held out; batch 2 × 2 = 4 a step; 4 steps = 1.0 epochs" in said
    assert lines(folder / "metrics.jsonl") == 4
    here("train", "--output_dir", folder, *TRAIN, "--max_train_steps", 5)
    here("train", "--output_dir", folder, *TRAIN, "--num_train_epochs", 2, "--lr_scheduler", "constant")
    assert lines(folder / "metrics.jsonl") == 8 and "from step 5" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["identity"]["max_train_steps"] == 8


def test_epochs_of_a_cache_that_is_not_there_are_one_line(tmp_path):
    output = command("train", "--output_dir", tmp_path / "run", "--num_train_epochs", 2, code=2)
    assert "no finished cache here" in one_line_error(output)
    assert PICTURES == 8  # which the sums above count with
