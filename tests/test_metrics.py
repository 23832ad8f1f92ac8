"""metrics.jsonl: each step once, whatever happened in between."""

import json
import math

import pytest
import torch

from train.metrics import Metrics


class Told:
    """What trackers are told."""

    def __init__(self):
        self.lines, self.pictures, self.closed = [], [], 0

    def log(self, step, line):
        self.lines.append((step, line))

    def show(self, step, pictures):
        self.pictures.append((step, pictures))

    def close(self):
        self.closed += 1


def metrics_of(path, start=0, steps=10, told=None):
    return Metrics(path, start, steps, torch.device("cpu"), told or Told())


def write(path, start, *steps):
    with metrics_of(path, start) as metrics:
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
    with metrics_of(path) as metrics:
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
    with metrics_of(tmp_path / "m") as metrics:
        metrics.log(1, 4, loss=0.5, lr=1e-4, grad_norm=math.inf)
    line = json.loads((tmp_path / "m").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert line["grad_norm"] is None and line["loss"] == 0.5


def test_a_line_that_is_no_json_is_dropped(tmp_path):
    (tmp_path / "m").write_bytes(b'garbage\n{}\n7\nnull\n{"step": "1"}\n\xff\n')
    with open(tmp_path / "m", "a") as file:
        file.write(f'{{"step": {10**400}}}\n{"[" * 100_000}\n')
    write(tmp_path / "m", 0, 1)
    assert steps(tmp_path / "m") == [1]


# ---- What was measured on held-out pictures, and the trackers


def test_what_was_measured_stands_in_its_steps_line_with_null_for_what_is_not_finite(tmp_path):
    bands = [{"from": 0, "to": 250, "difference": -math.inf}, {"from": 250, "to": 500, "difference": 0.25}]
    with metrics_of(tmp_path / "m") as metrics:
        metrics.log(1, 4, loss=0.5, lr=1e-4)
        metrics.log(2, 4, loss=0.5, lr=1e-4, held_out=dict(difference=math.nan, pictures=24, bands=bands))
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m").read_text().splitlines())
    assert "held_out" not in first
    assert second["held_out"] == dict(difference=None, pictures=24, bands=[bands[0] | {"difference": None}, bands[1]])


def test_the_bar_shows_the_last_difference_until_the_next_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.progress.SECONDS", 0)
    with metrics_of(tmp_path / "m") as metrics:
        for step, difference in [(1, None), (2, -0.01234), (3, None), (4, math.inf), (5, 0.2)]:
            more = {} if difference is None else dict(held_out=dict(difference=difference))
            metrics.log(step, 4, loss=0.5, lr=1e-4, **more)
    said = [line.partition("held_out ")[2].split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["", "-0.0123", "-0.0123", "-0.0123", "0.2"]


def test_trackers_are_told_what_the_file_says(tmp_path):
    told = Told()
    with metrics_of(tmp_path / "m", told=told) as metrics:
        for step in (1, 2):
            metrics.log(step, 4, loss=0.5, lr=1e-4, grad_norm=math.inf, held_out=dict(difference=0.5))
            metrics.show(step, {} if step == 1 else {"a": "picture"})
    assert told.lines == [(n, json.loads(line)) for n, line in enumerate((tmp_path / "m").read_text().splitlines(), 1)]
    assert told.pictures == [(1, {}), (2, {"a": "picture"})] and told.closed == 1


def test_trackers_are_closed_when_a_run_ends_early(tmp_path):
    told = Told()
    with pytest.raises(ZeroDivisionError), metrics_of(tmp_path / "m", told=told):
        raise ZeroDivisionError
    assert told.closed == 1
