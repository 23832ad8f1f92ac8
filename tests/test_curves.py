"""Curves: whatever stands in metrics.jsonl, what is drawn is what is there, in a terminal and as a picture."""

import json
import math
import random
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, Forked, command, here, one_line_error
from PIL import Image

from data.common.errors import UserError
from train import curves, plot
from train.curves import MAIN, Axis, panels, running_mean, series, thinned, words
from train.plot import names, picture


def read(run):
    return curves.read(run / "metrics.jsonl")


def write(run, steps, more=lambda step: {}, end=""):
    """A run's metrics.jsonl of so many steps, whose loss falls from 1 to 0.5."""
    run.mkdir(parents=True, exist_ok=True)
    base = dict(grad_norm=1.0, loss_scale=1.0, s_per_step=0.1)
    lines = (dict(base, step=n, loss=1 - 0.5 * n / steps, lr=1e-4) | more(n) for n in range(1, steps + 1))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return run


def held_out(step):
    """Every fifth step, less and less: -step / 1000."""
    facts = dict(
        difference=-step / 1000, standard_error=0.001, train_difference=-step / 500, train_standard_error=0.001
    )
    bands = [{"from": 0, "to": 250, "difference": -step / 100, "standard_error": 0.1}]
    return {} if step % 5 else dict(held_out=facts | dict(bands=bands, pictures=24))


def shown(*runs, unicode=True, colours=False):
    found = [series(read(run)) for run in runs]
    return plot.in_characters(names(runs), found, unicode, colours)


def chart(lines, title):
    """-> the rows of the chart under a title, without the labels at its side."""
    at = next(n for n, line in enumerate(lines) if line.startswith(title))
    return [line.split("│", 1)[1].ljust(67) for line in lines[at + 1 : at + 1 + plot.ROWS]]


# ---- Reading


def test_series_are_the_numbers_of_the_lines(tmp_path):
    found = series(read(write(tmp_path, 10, held_out)))
    assert found["loss"] == (list(range(1, 11)), [1 - 0.5 * n / 10 for n in range(1, 11)])
    assert found["held_out/difference"] == ([5, 10], [-0.005, -0.01])
    assert found["held_out/band_0_250"] == ([5, 10], [-0.05, -0.1])
    assert "step" not in found and not any("bands" in name for name in found)


ODD = [
    "garbage",
    "",
    "7",
    "null",
    "[1, 2]",
    "{}",
    '{"step": "3", "loss": 1}',
    '{"step": 2.5, "loss": 1}',
    '{"step": true, "loss": 1}',
    '{"step": -1, "loss": 1}',
    '{"step": 0, "loss": 1}',
    '{"step": 1' + "0" * 400 + "}",
    "[" * 100_000,
    '{"step": 4, "loss": 0.2',  # half a line, which a run that trains is writing
    "\0\0\0\0",
    '"' + "x" * 10**6 + '"',
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_lines_that_are_none_are_left_out(tmp_path, text):
    write(tmp_path, 3, end=text)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


VALUES = ["null", "NaN", "Infinity", "1e999", "-1e300", "1" + "0" * 400, '"0.5"', "[]", "{}", "true"]


@pytest.mark.parametrize("name", ["loss", "lr", "loss_scale", "held_out"])
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_that_are_no_numbers_are_gaps(tmp_path, name, value):
    write(tmp_path, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 5, "grad_norm": 2.0, "{name}": {value}}}\n')
        file.write(f'{{"step": 6, "held_out": {{"difference": {value}, "bands": {value}}}}}\n')
    found = series(read(tmp_path))
    assert found["grad_norm"][0] == [1, 2, 3, 4, 5] and found.get(name, ([4],))[0][-1] == 4
    shown(tmp_path), panels([found])


def test_a_step_that_stands_there_twice_counts_once_and_steps_are_in_order(tmp_path):
    lines = [dict(step=3, loss=3.0), dict(step=1, loss=1.0), dict(step=3, loss=4.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert series(read(tmp_path))["loss"] == ([1, 3], [1.0, 4.0])


def test_no_file_has_no_lines(tmp_path):
    assert read(tmp_path) == [] and series([]) == {}


# ---- What is drawn


def test_a_running_mean_is_of_the_values_around():
    values = [random.Random(0).gauss(0, 1) for _ in range(50)]
    expected = [np.mean(values[max(0, n - 3) : n + 4]) for n in range(50)]
    assert running_mean(values, 7) == pytest.approx(expected)
    assert running_mean(values, 1) == pytest.approx(values)
    huge = running_mean([1e30, *values], 7)  # as a sum of floats forgets what it had before
    assert huge[5:] == pytest.approx(expected[4:])


def test_thinning_loses_no_peak():
    values = [0.0] * 10_000
    values[4711], values[815] = 9.0, -9.0
    points = thinned(list(range(1, 10_001)), values, 100)
    assert len(points) <= 202 and (4712, 9.0) in points and (816, -9.0) in points
    assert points == sorted(points) and points[0][0] == 1 and points[-1][0] == 10_000
    assert thinned([1, 2], [5.0, 6.0], 100) == [(1, 5.0), (2, 6.0)]


@pytest.mark.parametrize(
    "axis", [Axis(0, 1), Axis(-0.024, 0.0), Axis(1e-6, 4e-3, 10), Axis(9e3, 9e4, 2), Axis(0, 1e5), Axis(0, 3, least=1)]
)
def test_ticks_are_few_round_and_within(axis):
    ticks, texts = zip(*axis.ticks(6))
    assert 2 <= len(ticks) <= 7 and (not axis.least or ticks == (0, 1, 2, 3))
    steps = {f"{after / before if axis.base else after - before:.0e}" for before, after in zip(ticks, ticks[1:])}
    assert len(steps) == 1 and steps.pop()[0] in ("1248" if axis.base else "125")
    assert all(axis.low * (1 - 1e-9) - 1e-9 <= tick <= axis.high * (1 + 1e-9) for tick in ticks)
    assert len(set(texts)) == len(ticks)
    for tick, text in zip(ticks, texts):  # what is written is where the line is
        assert float(text.replace(",", "")) == pytest.approx(tick, rel=1e-6)


def test_words_of_numbers():
    numbers = (0.0, 65536, 1e-4, 1e-5, 2.5e-7, -0.0123, -5e-5, 2.0**40, -3e30)
    said = "0 65,536 0.0001 1e-5 2.5e-7 -0.0123 -5e-5 1.1e12 -3e30"
    assert [words(number) for number in numbers] == said.split()


def test_a_falling_loss_falls_from_left_to_right_and_every_dot_is_where_its_value_is(tmp_path):
    rows = chart(shown(write(tmp_path, 40)), "loss")
    heights = {}
    for row, line in enumerate(rows):
        for column, cell in enumerate(line):
            if 0x2800 < ord(cell) < 0x2900:
                heights.setdefault(column, row)
    columns = sorted(heights)
    assert columns[0] <= 2 and columns[-1] == 66 and len(columns) >= 60
    assert [heights[column] for column in columns] == sorted(heights.values())
    assert heights[columns[0]] == 0 and heights[columns[-1]] == plot.ROWS - 1


def test_braille_has_its_dots_where_unicode_says(tmp_path):
    """By the characters' names, such as BRAILLE PATTERN DOTS-178."""
    found = series(read(write(tmp_path, 500, lambda n: dict(loss=math.sin(n / 40)))))
    rows = chart(plot.in_characters(["x"], [found], unicode=True, colours=False), "loss")
    places = {"1": (0, 0), "2": (0, 1), "3": (0, 2), "4": (1, 0), "5": (1, 1), "6": (1, 2), "7": (0, 3), "8": (1, 3)}
    dots = set()
    for row, line in enumerate(rows):
        for column, cell in enumerate(line.rstrip()):
            for dot in unicodedata.name(cell).partition("DOTS-")[2]:
                dots.add((2 * column + places[dot][0], 4 * row + places[dot][1]))
    panel = panels([found], (MAIN,))[0]
    size = (2 * plot.COLUMNS, 4 * plot.ROWS)
    assert dots == set(plot._dots(panel.curves[0], Axis(0, 500), panel.axis, *size))


def test_several_runs_have_a_letter_each(tmp_path):
    low = write(tmp_path / "low", 30, lambda n: dict(loss=0.1))
    high = write(tmp_path / "high", 20, lambda n: dict(loss=0.9))
    lines = shown(low, high)
    assert [line.split(":")[0] for line in lines[:2]] == ["a low", "b high"]
    rows = chart(lines, "loss")
    a, b = (next(n for n, row in enumerate(rows) if letter in row) for letter in "ab")
    assert a > b and rows[a].count("a") > rows[b].count("b") * 1.4
    assert "\x1b[" in "".join(shown(low, high, colours=True)) and "\x1b[" not in "".join(lines)


@pytest.mark.parametrize("steps", [1, 2, 19, 500])
def test_a_terminal_of_80_columns_is_wide_enough(tmp_path, steps):
    run = write(tmp_path / "runs" / ("name " * 30), steps, held_out)
    other = write(tmp_path / "x", 3 * steps, lambda n: dict(loss=-1e30 * n, lr=0.0, loss_scale=2.0**40))
    for lines in (shown(run), shown(run, other), shown(run, other, unicode=False)):
        assert max(map(len, lines)) <= 79
    assert "".join(shown(run, other, unicode=False)).isascii()


def test_what_is_said_of_a_run(tmp_path):
    rising = lambda step: dict(held_out=dict(difference=(step - 10) ** 2 / 1e4 - 0.02, standard_error=0.0011))
    lines = " ".join(line.strip() for line in shown(write(tmp_path / "r", 12, rising))[:2])
    assert lines.startswith("r: 12 steps, loss 0.5, held out -0.0196 ± 0.0011, lowest -0.02 at step 10")


def test_there_is_a_panel_for_what_there_is(tmp_path):
    titles = lambda *runs: [panel.title.split(",")[0].split(";")[0] for panel in panels(list(runs))]
    plain = series(read(write(tmp_path / "a", 200)))
    full = series(read(write(tmp_path / "b", 20, lambda n: held_out(n) | dict(loss_scale=2.0**n))))
    assert titles(plain) == ["loss", "learning rate"]  # a scale that never moves is none
    assert titles(plain, full) == ["loss", "held-out loss minus the base's", "learning rate", "loss scale"]
    assert [curve.run for curve in panels([plain, full])[3].curves] == [1]
    assert panels([plain])[0].title == "loss, mean of 9 steps"
    assert panels([plain, full])[0].title == "loss, mean of 1 to 9 steps"


def test_learning_rates_far_apart_are_on_a_logarithmic_axis():
    run = lambda peak: dict(lr=([1, 2, 3], [peak / 2, peak, 0.0]))
    assert panels([run(1e-4), run(2e-4)])[0].axis.base is None
    axis = panels([run(1e-5), run(1e-3)])[0].axis
    assert axis.base == 10 and axis.place(1e-5) > 0.2 and axis.place(0.0) == 0 and axis.place(1e-3) > 0.9


@pytest.mark.parametrize("values", [(0.1, 1.0), (-2.0, -1.9), (0.0, 5.0), (-3.0, 0.0), (-1.0, 1.0), (2.0, 2.0), (0.0,)])
def test_an_axis_has_room_around_its_values_and_does_not_pass_0_for_it(values):
    axis = panels([dict(loss=(list(range(1, 1 + len(values))), list(values)))])[0].axis
    assert axis.low <= min(values) and axis.high >= max(values) and axis.low < axis.high
    assert (axis.low >= 0) == (min(values) >= 0) and (axis.high <= 0) <= (max(values) <= 0)


def test_one_outlier_does_not_press_the_others_flat():
    steps = list(range(1, 1001))
    values = [0.1 + 0.01 * math.sin(step) for step in steps]
    values[500] = 1e6
    assert panels([dict(loss=(steps, values))])[0].axis.high > 1  # its mean is there
    flat = [0.1] * 1000
    flat[500] = 50.0
    panel = panels([dict(loss=(steps, flat))])[0]
    assert panel.axis.high < 2 and panel.axis.place(50.0) == 1


def colour_of(page, colour):
    """(row, column) of each pixel of about this colour."""
    rgb = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
    return np.argwhere(np.abs(np.asarray(page, dtype=int) - rgb).max(axis=2) < 30)


@pytest.mark.slow
def test_the_picture_shows_each_run_in_its_colour_where_its_values_are(tmp_path):
    low = series(read(write(tmp_path / "low", 30, lambda n: dict(loss=0.1))))
    high = series(read(write(tmp_path / "high", 30, lambda n: dict(loss=0.9))))
    page = picture(["low", "high"], [low, high])
    assert page.width == 1200 and page.height < 2000
    top = 200  # below the legend
    panel = [spots[(spots[:, 0] > top) & (spots[:, 0] < 700)] for spots in (colour_of(page, c) for c in plot.COLOURS)]
    assert panel[0][:, 0].mean() > panel[1][:, 0].mean() + 200  # 0.1 is below 0.9
    assert all(spots[:, 1].max() > 1150 and spots[:, 1].min() < 220 for spots in panel[:2])
    assert not any(len(spots) for spots in panel[2:5])


def test_eight_colours_are_told_apart():
    rgb = [[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in plot.COLOURS]
    apart = [max(abs(a - b) for a, b in zip(x, y)) for n, x in enumerate(rgb) for y in rgb[:n]]
    assert min(apart) >= 60 and len(plot.ANSI) == len(rgb) == len(set(plot.ANSI))


# ---- The command


def test_the_command_draws_and_writes_the_picture(tmp_path, capsys):
    one, two = write(tmp_path / "x" / "run", 20, held_out), write(tmp_path / "y" / "run", 30)
    here("train.metrics", one, two, one)  # twice is once
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed if line[:2] in ("a ", "b ")] == ["a x/run", "b y/run"]
    assert printed[-1] == str(one / "curves.png") and not (two / "curves.png").exists()
    with Image.open(one / "curves.png") as page:
        assert page.format == "PNG" and page.width == 1200
    here("train.metrics", two, "--output", tmp_path / "there.png")
    assert (tmp_path / "there.png").exists() and not (two / "curves.png").exists()


def test_what_cannot_be_drawn_is_named(tmp_path):
    run = write(tmp_path / "run", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "taken.png").mkdir()
    for argv, message in [
        ([tmp_path / "nowhere"], "nowhere: no step in its metrics.jsonl"),
        ([run, tmp_path / "empty"], "empty: no step in its metrics.jsonl"),
        ([run / "metrics.jsonl"], "no step in its metrics.jsonl"),
        ([tmp_path / "folder"], "folder/metrics.jsonl: not a file"),
        ([run, "--output", tmp_path / "taken.png"], "taken.png: not a file"),
        ([run, "--output", tmp_path / "x.jpg"], "--output .*x.jpg: the picture is a PNG"),
        ([write(tmp_path / str(n), 2) for n in range(9)], "9 runs: 8 at most"),
        (["--output", "x.png"], "RUN"),
        ([run, ""], "RUN: empty"),
        ([run, "--output_dir", run], "--output_dir is a flag of python -m data.precompute"),
    ]:
        with pytest.raises(UserError, match=message):
            here("train.metrics", *argv)
    assert not (run / "curves.png").exists()


def test_the_real_command_needs_no_torch_and_no_terminal(tmp_path):
    """And says in ASCII what a stream of another encoding cannot have, and a bad run in one line."""
    run = write(tmp_path / "run", 40, held_out)
    code = "import runpy, sys\nsys.argv = ['x', sys.argv[1]]\nrunpy.run_module('train.metrics', run_name='__main__')\n"
    code += "print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    for encoding, sign in (("utf-8", "│"), ("ascii", "|")):
        env = dict(PYTHONIOENCODING=encoding, PATH="")
        done = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, env=env)
        assert not done.stderr and done.stdout.decode().splitlines()[-1] == "[]", done
        assert sign in done.stdout.decode() and b"\x1b" not in done.stdout
        assert encoding != "ascii" or done.stdout.isascii()
    assert "no step" in one_line_error(command("train.metrics", tmp_path, code=2))


@pytest.mark.slow
def test_a_hundred_thousand_steps_take_no_patience(tmp_path):
    more = lambda step: dict(loss=math.sin(step), images_per_s=9.0, peak_gib=9.8, overflows=0)
    run, began = write(tmp_path / "run", 100_000, more), time.perf_counter()
    here("train.metrics", run)
    assert time.perf_counter() - began < 15  # 1.3 on an idle machine


def test_odd_names_of_runs(tmp_path):
    """A terminal would obey what stands in one of them, and no font has the letters of another."""
    odd = [write(tmp_path / name, 5) for name in ("a\x1b[31mb", "名前", "x  y", "x y", "l" * 200)]
    lines = shown(*odd)
    assert not any(ord(letter) < 32 or ord(letter) == 127 for line in lines for letter in line)
    assert len({line.split(":")[0] for line in lines if line[1:2] == " "}) >= 5
    picture(names(odd), [series(read(run)) for run in odd])


def test_a_run_that_trains_can_be_looked_at(tmp_path):
    """The lock of its folder is the writer's, and stays so."""
    from data.common import door

    run = write(tmp_path / "run", 5, end='{"step": 6, "lo')
    with door.hold(run, "--output_dir"):
        process = Forked("train.metrics", [run], tmp_path / "log")
        assert process.wait() == 0 and "5 steps" in process.output
