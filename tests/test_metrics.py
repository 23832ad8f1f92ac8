"""metrics.jsonl: each step once, whatever happened in between."""

import json
import math

import pytest
import torch

from train.metrics import Metrics


def write(path, start, *steps):
    with Metrics(path, start, 10, torch.device("cpu")) as metrics:
        for step in steps:
            metrics.log(step, 4, loss=0.5, lr=1e-4, grad_norm=1.0)


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_goes_on_at_its_step(tmp_path):
    """Killed at 5 with the state of 3, the run does steps 4 and 5 again; they must not stand there twice."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2, 3, 4, 5)
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # what a kill leaves
    write(path, 3, 4, 5, 6)
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_line_is_on_disk_when_its_step_is_done(tmp_path):
    """If lines waited in a buffer, the last steps before a crash would be missing, which are those that matter."""
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, 0, 10, torch.device("cpu")) as metrics:
        metrics.log(1, 4, loss=0.5, lr=1e-4)
        assert steps(path) == [1]


def test_a_line_says_what_it_promises(tmp_path):
    write(tmp_path / "m", 0, 1)
    line = json.loads((tmp_path / "m").read_text())
    assert line["loss"] == 0.5 and line["lr"] == 1e-4 and line["grad_norm"] == 1.0
    assert line["images_per_s"] > 0 and line["s_per_step"] > 0 and line["peak_gib"] > 0.01
    assert abs(line["images_per_s"] * line["s_per_step"] - 4) < 1e-6


def test_an_overflow_is_null_and_the_line_strict_json(tmp_path):
    """Python reads the Infinity that it writes; jq, JavaScript and pandas do not."""
    with Metrics(tmp_path / "m", 0, 10, torch.device("cpu")) as metrics:
        metrics.log(1, 4, loss=0.5, lr=1e-4, grad_norm=math.inf)
    line = json.loads((tmp_path / "m").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert line["grad_norm"] is None and line["loss"] == 0.5


def test_a_line_that_is_no_json_is_dropped(tmp_path):
    (tmp_path / "m").write_bytes(b'garbage\n{}\n7\nnull\n{"step": "1"}\n\xff\n')
    write(tmp_path / "m", 0, 1)
    assert steps(tmp_path / "m") == [1]
