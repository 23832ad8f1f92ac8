"""Curves of RUN/metrics.jsonl, of one run or several over one another: characters in a terminal, and a PNG.

read() and series() are for others who draw. Nothing here imports torch, so that a look takes no longer than it must.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from textwrap import wrap

from data.common.disk import atomic_write
from data.common.door import look_at
from data.common.errors import UserError, one_line
from data.common.flags import FP32, MOST, parse
from data.common.words import many

# Told apart by most who see few colours (Okabe and Ito's palette, 2008, without its yellow, and a brown).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8c564b")
ANSI = (34, 31, 32, 35, 33, 36, 90, 91)  # the same in a terminal, as near as its own colours are
HELD_OUT, TRAINED = "held_out/difference", "held_out/train_difference"
ERRORS = {HELD_OUT: "held_out/standard_error", TRAINED: "held_out/train_standard_error"}


def main(argv):
    settings = parse("train.metrics", argv)
    runs = list({Path(run).resolve(): Path(run) for run in settings.run}.values())
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs: {len(COLOURS)} at most are told apart; name fewer")
    output = Path(settings.output or runs[0] / "curves.png")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: the picture is a PNG; let its name end in .png")
    found = []
    for run in runs:
        look_at(run / "metrics.jsonl", "file")
        found.append(series(read(run)))
        if not found[-1]:
            raise UserError(f"{run}: no step in its metrics.jsonl, which python -m train writes; name a run's folder")
    look_at(output, "file", write=True)

    for line in in_characters(names(runs), found, _takes(sys.stdout, "⣿─±"), sys.stdout.isatty()):
        print(line)
    with atomic_write(output) as file:
        picture(names(runs), found).save(file, "PNG")
    print(output)


def _takes(stream, characters):
    """Whether a stream's encoding has these characters."""
    try:
        characters.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True


def names(runs):
    """The last parts of the runs' folders, as many as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    found = (["/".join(own[-count:]) for own in parts] for count in range(1, max(map(len, parts)) + 1))
    return [one_line(name) for name in next(some for some in found if len(set(some)) == len(some))]


# ---- Reading


def read(run):
    """-> the lines of RUN/metrics.jsonl, {name: value} each, by step; [] where there is no such file.

    Lines that are not whole (a run that trains is writing one) or are none of a training's are left out.
    """
    path, found = Path(run) / "metrics.jsonl", {}
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            step = line.get("step") if isinstance(line, dict) else None
            if type(step) is int and 0 < step <= MOST:
                found[step] = line
    return [found[step] for step in sorted(found)]


def series(lines):
    """-> {name: (steps, values)} of the lines' finite numbers, by the names that flat() gives them."""
    found = {}
    for line in lines:
        for name, value in flat(line).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return found


def flat(line):
    """-> {name: number} of a line, less its step and what is no finite number.

    What was measured on held-out pictures is held_out/difference and so on, a timestep band's held_out/band_0_250.
    """
    held_out = line.get("held_out")
    held_out = held_out if isinstance(held_out, dict) else {}
    bands = held_out.get("bands")
    found = line | {f"held_out/{name}": value for name, value in held_out.items()}
    for band in bands if isinstance(bands, list) else []:
        if isinstance(band, dict):
            found[f"held_out/band_{band.get('from')}_{band.get('to')}"] = band.get("difference")
    return {name: value for name, value in found.items() if name != "step" and _is_number(value)}


def _is_number(value):
    return type(value) in (int, float) and -FP32[1] <= value <= FP32[1]  # not so of NaN


# ---- What is drawn


@dataclass(frozen=True)
class Curve:
    """Of one run in one panel. Lists of the same length."""

    run: int  # its position, for colour and letter
    steps: list
    values: list
    faint: tuple | None = None  # (steps, values) behind it: what it is the mean of
    errors: list | None = None  # standard errors
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: list
    axis: "Axis"  # of the values
    height: int  # pixels
    zero: bool = False  # 0 has a meaning, and a line


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    base: int | None = None  # of its logarithm; None: linear

    def place(self, value):
        """0 at the low end, 1 at the high end; what lies beyond is at the end."""
        if self.base:
            value = max(value, self.low)
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, most):
        """At most so many round values in its range."""
        if self.base:
            first, last = (math.log(end, self.base) for end in (self.low, self.high))
            first, last = math.ceil(first - 1e-9), math.floor(last + 1e-9)
            every = max(1, math.ceil((last - first + 1) / most))
            return [float(self.base) ** n for n in range(first, last + 1, every)]
        raw = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(raw))
        size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
        return [n * size for n in range(first, last + 1)]


def panels(runs, fine):
    """-> what there is to draw of loss, held-out difference, learning rate and loss scale, in this order.

    runs: [series]. fine: with each step's loss behind the mean, and the difference on pictures that were trained on.
    """
    out = [_loss(runs, fine), _held_out(runs, (TRAINED, HELD_OUT) if fine else (HELD_OUT,)), _rate(runs), _scale(runs)]
    return [panel for panel in out if panel]


def _loss(runs, fine):
    curves, shown = [], []
    for n, (steps, values) in _with(runs, "loss"):
        means = running_mean(values, _span(steps))
        curves.append(Curve(n, steps, means, (steps, values) if fine and _span(steps) > 1 else None))
        shown += means
        if fine:  # a few steps far from the others would press all of them flat; those are drawn at the edge
            cut = len(values) // 200
            shown += sorted(values)[cut : len(values) - cut]
    if not curves:
        return None
    spans = sorted({_span(steps) for _, (steps, _) in _with(runs, "loss")})
    means = f", mean of {' to '.join(map(str, dict.fromkeys((spans[0], spans[-1]))))} steps" if spans[-1] > 1 else ""
    return Panel(f"loss{means}", curves, _range(shown), 420)


def _span(steps):
    """How many steps' loss a mean is of: each is of other pictures and another noise, and tells little alone."""
    return len(steps) // 50 * 2 + 1


def _held_out(runs, which):
    curves, shown = [], [0.0]
    for name in which:
        for n, (steps, values) in _with(runs, name):
            errors = dict(zip(*runs[n].get(ERRORS[name], ([], []))))
            errors = [errors.get(step, 0.0) for step in steps]
            curves.append(Curve(n, steps, values, errors=errors, dashed=name == TRAINED))
            shown += [value + sign * error for value, error in zip(values, errors) for sign in (-1, 1)]
    if not curves:
        return None
    dashed = " (dashed: on trained pictures)" if any(curve.dashed for curve in curves) else ""
    return Panel(f"held-out loss minus the base's; below 0 is better{dashed}", curves, _range(shown), 330, zero=True)


def _rate(runs):
    """Logarithmic where the runs' peaks are far apart, and not for one that ends at 0."""
    curves = [Curve(n, steps, values) for n, (steps, values) in _with(runs, "lr")]
    peaks = [peak for curve in curves if (peak := max(curve.values)) > 0]
    if not curves:
        return None
    if peaks and max(peaks) >= 8 * min(peaks):
        return Panel("learning rate", curves, Axis(min(peaks) / 50, max(peaks) * 1.2, 10), 170)
    return Panel("learning rate", curves, _range([value for curve in curves for value in curve.values] + [0.0]), 170)


def _scale(runs):
    """Of powers of two. A scale of 1 throughout is that of a run without one."""
    curves = [Curve(n, steps, values) for n, (steps, values) in _with(runs, "loss_scale") if set(values) != {1}]
    shown = [value for curve in curves for value in curve.values if value > 0]
    return Panel("loss scale", curves, Axis(min(shown) / 1.5, max(shown) * 1.5, 2), 170) if shown else None


def _with(runs, name):
    return [(n, run[name]) for n, run in enumerate(runs) if name in run]


def _range(values):
    """A linear axis with some room around the values, but none on the other side of 0."""
    low, high = min(values), max(values)
    if low == high == 0:
        return Axis(0.0, 1.0)
    room = (high - low) * 0.06 or abs(high) * 0.1
    return Axis(low - room if low < 0 else max(0.0, low - room), high + room if high > 0 else min(0.0, high + room))


def running_mean(values, span):
    """The mean of `span` values around each, an odd number; at the ends of those that are there.

    Summed in whole numbers of 2**-60, which are exact, so that one huge value leaves nothing behind.
    """
    sums, half = [0, *accumulate(round(value * 2.0**60) for value in values)], span // 2
    ends = ((max(0, n - half), min(len(values), n + half + 1)) for n in range(len(values)))
    return [(sums[end] - sums[start]) / ((end - start) << 60) for start, end in ends]


def thinned(steps, values, stretches):
    """-> [(step, value)]: of each of so many stretches the lowest and the highest, so that no peak is lost."""
    if len(steps) <= 2 * stretches:
        return list(zip(steps, values))
    bounds = [n * len(steps) // stretches for n in range(stretches + 1)]
    found = {0, len(steps) - 1}
    for start, end in zip(bounds, bounds[1:]):
        found |= {min(range(start, end), key=values.__getitem__), max(range(start, end), key=values.__getitem__)}
    return [(steps[n], values[n]) for n in sorted(found)]


def _steps_axis(runs):
    steps = [end for run in runs for some, _ in run.values() for end in (some[0], some[-1])]
    return Axis(0, max(max(steps), 1))


def words(value, small=1e-4):
    """A number as people write it: 65,536, -0.0123; and 1e-5 where it is less than `small`, 1e9 where it is long."""
    if value and not small <= abs(value) < 1e7:
        power = math.floor(math.log10(abs(value) * (1 + 1e-9)))
        return f"{value / 10.0**power:.3g}e{power}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def labelled(ticks):
    """-> [(tick, its words)], all of them written in one way."""
    small = 1 if any(0 < abs(tick) < 1e-4 for tick in ticks) else 1e-4
    return [(tick, words(tick, small)) for tick in ticks]


def last(run):
    """How a run stands, in words. run: its series."""
    facts = []
    if "loss" in run:
        steps, values = run["loss"]
        facts.append(f"loss {words(running_mean(values, _span(steps))[-1])}")
    for name, where in ((HELD_OUT, "held out"), (TRAINED, "trained")):
        if name in run:
            steps, values = run[name]
            error = dict(zip(*run.get(ERRORS[name], ([], [])))).get(steps[-1])
            facts.append(f"{where} {words(values[-1])}" + ("" if error is None else f" ± {words(error)}"))
            lowest = values.index(min(values))
            if name == HELD_OUT and lowest < len(values) - 1:
                facts.append(f"lowest {words(values[lowest])} at step {steps[lowest]:,}")
    return ", ".join([many(max(some[-1] for some, _ in run.values()), "step"), *facts])


# ---- In characters

WIDTH, ROWS = 79, 8  # of a chart with its labels; of its curve
LABELS = 10  # columns before a chart
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode's braille, by row and column of a character


def in_characters(names, runs, unicode, colours):
    """runs: [series]. -> lines for a terminal. One run is a line of dots; of several each has its letter."""
    lines = []
    for n, (name, run) in enumerate(zip(names, runs)):
        facts = wrap(f"{name}: {last(run)}", WIDTH - 2, subsequent_indent="  ")
        mark = f"{_mark(n, colours)} " if len(runs) > 1 else ""
        lines += [f"{mark}{facts[0]}", *facts[1:]]
    for panel in panels(runs, fine=False):
        lines += ["", panel.title, *_chart(panel, _steps_axis(runs), len(runs) > 1, unicode, colours)]
    return lines if unicode else [line.replace("±", "+-") for line in lines]


def _mark(run, colours):
    letter = chr(ord("a") + run)
    return f"\x1b[{ANSI[run]}m{letter}\x1b[0m" if colours else letter


def _chart(panel, x, several, unicode, colours):
    columns = WIDTH - LABELS - 2
    cells = [[" "] * columns for _ in range(ROWS)]
    if several or not unicode:
        for curve in panel.curves:
            for column, row in _dots(curve, x, panel.axis, columns, ROWS):
                cells[row][column] = _mark(curve.run, colours) if several else "*"
    else:
        for curve in panel.curves:
            for column, row in _dots(curve, x, panel.axis, 2 * columns, 4 * ROWS):
                cell, dot = cells[row // 4][column // 2], DOTS[row % 4][column % 2]
                cells[row // 4][column // 2] = chr((0x2800 if cell == " " else ord(cell)) | dot)
    ticks = labelled(panel.axis.ticks(4))
    labels = {round((1 - panel.axis.place(tick)) * (ROWS - 1)): text for tick, text in ticks}
    side, corner, floor = "│└─" if unicode else "|+-"
    lines = [f"{labels.get(n, ''):>{LABELS}} {side}{''.join(row).rstrip()}" for n, row in enumerate(cells)]
    lines.append(" " * (LABELS + 1) + corner + floor * (columns - 1))
    below = [" "] * WIDTH
    for tick in x.ticks(6):
        if tick == int(tick):
            text = f"{tick:,.0f}"
            start = min(LABELS + 2 + round(x.place(tick) * (columns - 1)) - len(text) // 2, WIDTH - len(text))
            below[start : start + len(text)] = text
    return [*lines, "".join(below).rstrip()]


def _dots(curve, x, y, columns, rows):
    """(column, row) of each place that a curve goes through, row 0 above."""
    points = [
        (round(x.place(step) * (columns - 1)), round((1 - y.place(value)) * (rows - 1)))
        for step, value in thinned(curve.steps, curve.values, columns)
    ]
    for (left, above), (right, below) in zip(points, points[1:] or points):
        count = max(abs(right - left), abs(below - above), 1)
        for n in range(count + 1):
            yield left + round((right - left) * n / count), above + round((below - above) * n / count)


# ---- As a picture

WIDE, FINE = 1200, 3  # the picture's width, pixels; drawn so many times larger, because Pillow's lines have hard edges
LEFT, RIGHT, MARGIN = 150, 45, 40
TEXT, TITLE = 27, 31  # sizes of letters that can be read where a telephone shows the picture 400 pixels wide
INK, PALE, FAINT = "#222222", "#777777", "#e4e4e4"


class Page:
    """A white page of WIDE x `height` pixels, in which all sizes and places are given."""

    def __init__(self, height):
        from PIL import Image, ImageDraw, ImageFont

        self.image = Image.new("RGB", (WIDE * FINE, height * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {size: ImageFont.load_default(size * FINE) for size in (TEXT, TITLE)}

    def text(self, x, y, text, colour=INK, size=TEXT, anchor="ls"):
        """anchor: Pillow's word for where in the text (x, y) is."""
        self.draw.text((x * FINE, y * FINE), text, colour, self.fonts[size], anchor=anchor)

    def fitting(self, name, width):
        """A name of any letters, cut at its beginning where it is too long, "?" for those that the font lacks."""
        font = self.fonts[TITLE]
        box = bytes(font.getmask("\uffff"))
        name = "".join("?" if bytes(font.getmask(letter)) == box else letter for letter in name)
        while font.getlength(name) > width * FINE:
            name = f"…{name[2:]}"
        return name

    def line(self, points, colour, width=2.0, dashed=False):
        scaled = [(x * FINE, y * FINE) for x, y in points]
        for piece in _dashes(scaled, 14 * FINE, 9 * FINE) if dashed else [scaled]:
            self.draw.line(piece, colour, round(width * FINE), joint="curve")

    def dot(self, x, y, radius, colour):
        self.draw.circle((x * FINE, y * FINE), radius * FINE, colour)

    def finished(self):
        from PIL import Image

        return self.image.resize((WIDE, self.image.height // FINE), Image.Resampling.BOX)


def _dashes(points, length, gap):
    """The pieces of a line that are drawn when it is dashed."""
    pieces, piece, left, drawn = [], [points[0]], length, True
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        whole, at = math.dist((x0, y0), (x1, y1)), 0.0
        while whole - at > left:
            at += left
            turn = (x0 + (x1 - x0) * at / whole, y0 + (y1 - y0) * at / whole)
            if drawn:
                pieces.append([*piece, turn])
            piece, drawn = [turn], not drawn
            left = length if drawn else gap
        left -= whole - at
        piece.append((x1, y1))
    return [*pieces, piece] if drawn and len(piece) > 1 else pieces


def picture(names, runs):
    """runs: [series]. -> the panels below one another, a PIL image."""
    drawn, x = panels(runs, fine=True), _steps_axis(runs)
    heads = [wrap(last(run), 84) for run in runs]
    head = sum(50 + 38 * len(facts) for facts in heads)
    page = Page(MARGIN + head + sum(panel.height + 122 for panel in drawn) + 56)
    y = MARGIN
    for n, (name, facts) in enumerate(zip(names, heads)):
        page.line([(MARGIN, y + 12), (MARGIN + 44, y + 12)], COLOURS[n], 6)
        page.text(MARGIN + 62, y + 22, page.fitting(name, WIDE - RIGHT - MARGIN - 62), size=TITLE)
        for line, fact in enumerate(facts):
            page.text(MARGIN + 62, y + 60 + 38 * line, fact, PALE)
        y += 50 + 38 * len(facts)
    for panel in drawn:
        y += 72
        _panel(page, panel, x, y)
        y += panel.height + 50
    page.text((LEFT + WIDE - RIGHT) / 2, y + 26, "steps", PALE, anchor="ms")
    return page.finished()


def _panel(page, panel, x, top):
    bottom, right = top + panel.height, WIDE - RIGHT

    def at(step, value):
        return LEFT + x.place(step) * (right - LEFT), bottom - panel.axis.place(value) * panel.height

    page.text(MARGIN, top - 26, panel.title)
    for tick, text in labelled(panel.axis.ticks(max(4, panel.height // 60))):
        level = at(0, tick)[1]
        page.line([(LEFT, level), (right, level)], PALE if panel.zero and tick == 0 else FAINT, 1.6)
        page.text(LEFT - 16, level, text, PALE, anchor="rm")
    for tick in x.ticks(6):
        if tick == int(tick):
            page.line([(at(tick, 0)[0], bottom), (at(tick, 0)[0], bottom + 7)], PALE, 1.6)
            page.text(at(tick, 0)[0], bottom + 12, f"{tick:,.0f}", PALE, anchor="ma")
    for curve in panel.curves:
        if curve.faint:
            page.line([at(*point) for point in thinned(*curve.faint, right - LEFT)], _lighter(COLOURS[curve.run]), 1.4)
    page.line([(LEFT, bottom), (right, bottom)], PALE, 2)
    for curve in panel.curves:
        _curve(page, curve, at, right - LEFT)


def _curve(page, curve, at, columns):
    colour = COLOURS[curve.run]
    for step, value, error in zip(curve.steps, curve.values, curve.errors or []):
        page.line([at(step, value - error), at(step, value + error)], _lighter(colour), 4)
    points = [at(*point) for point in thinned(curve.steps, curve.values, columns)]
    if len(points) > 1:
        page.line(points, colour, 2.6 if curve.dashed else 3.6, curve.dashed)
    if len(points) == 1 or curve.errors and len(points) <= 40 and not curve.dashed:
        for point in points:
            page.dot(*point, 6, colour)


def _lighter(colour):
    """The colour, two thirds white."""
    parts = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{(part + 2 * 255) // 3:02x}" for part in parts)
