"""python -m train.metrics RUN …: the curves of one run, or of several over one another, in a terminal and as a PNG."""

import sys
from pathlib import Path
from textwrap import wrap

from data.common.disk import atomic_write
from data.common.door import look_at
from data.common.errors import UserError, one_line
from data.common.flags import parse
from train.curves import FAINT, MAIN, OTHER, last, panels, read, series, steps_axis, thinned

# Told apart by most who see few colours (Okabe and Ito's palette, 2008, without its yellow, and a brown).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8c564b")
ANSI = (34, 31, 32, 35, 33, 36, 90, 91)  # the same in a terminal, as near as its own colours are


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
        found.append(series(read(run / "metrics.jsonl")))
        if not found[-1]:
            raise UserError(f"{run}: no step in its metrics.jsonl, which python -m train writes; name a run's folder")

    unicode = "utf" in (sys.stdout.encoding or "").lower()  # another stream may not have the characters
    for line in in_characters(names(runs), found, unicode, sys.stdout.isatty()):
        print(line)
    look_at(output, "file", write=True)  # after what needs no disk
    with atomic_write(output) as file:
        picture(names(runs), found).save(file, "PNG")
    print(output)


def names(runs):
    """The last parts of the runs' folders, as many as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    found = (["/".join(own[-count:]) for own in parts] for count in range(1, max(map(len, parts)) + 1))
    return [one_line(name) for name in next(some for some in found if len(set(some)) == len(some))]


# ---- In characters

WIDTH, ROWS = 79, 8  # of a chart with its labels; of its curve
LABELS = 10  # columns before a chart
COLUMNS = WIDTH - LABELS - 2
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode's braille, by row and column of a character


def in_characters(names, runs, unicode, colours):
    """runs: [series]. -> lines for a terminal. One run is a line of dots; of several each has its letter."""
    marks = [chr(ord("a") + n) for n in range(len(runs))] if len(runs) > 1 else ["" if unicode else "*"]
    if colours and len(runs) > 1:
        marks = [f"\x1b[{ansi}m{mark}\x1b[0m" for ansi, mark in zip(ANSI, marks)]
    lines = []
    for name, run, mark in zip(names, runs, marks):
        facts = wrap(f"{name}: {last(run)}", WIDTH - 2, subsequent_indent="  ")
        lines += [f"{mark} {facts[0]}" if len(runs) > 1 else facts[0], *facts[1:]]
    for panel in panels(runs, (MAIN,)):
        lines += ["", panel.title, *_chart(panel, steps_axis(runs), marks, "│└─" if unicode else "|+-")]
    return lines if unicode else [line.replace("±", "+-") for line in lines]


def _chart(panel, x, marks, frame):
    """marks: what each run is drawn with; the empty one is dots. -> lines"""
    cells = [[" "] * COLUMNS for _ in range(ROWS)]
    for curve in panel.curves:
        if mark := marks[curve.run]:
            for column, row in _dots(curve, x, panel.axis, COLUMNS, ROWS):
                cells[row][column] = mark
        else:
            for column, row in _dots(curve, x, panel.axis, 2 * COLUMNS, 4 * ROWS):
                before = cells[row // 4][column // 2].replace(" ", "\u2800")
                cells[row // 4][column // 2] = chr(ord(before) | DOTS[row % 4][column % 2])
    side, corner, floor = frame
    labels = {round((1 - panel.axis.place(value)) * (ROWS - 1)): text for value, text in panel.axis.ticks(4)}
    lines = [f"{labels.get(n, ''):>{LABELS}} {side}{''.join(row).rstrip()}" for n, row in enumerate(cells)]
    below = ""
    for step, text in x.ticks(6):
        start = LABELS + 2 + round(x.place(step) * (COLUMNS - 1)) - len(text) // 2
        below = f"{below:<{min(start, WIDTH - len(text))}}{text}"
    return [*lines, " " * (LABELS + 1) + corner + floor * (COLUMNS - 1), below]


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
LEFT, RIGHT, MARGIN = 150, 1155, 40  # where curves begin and end; where text begins
TEXT = 27  # the letters' size, which can be read where a telephone shows the picture 400 pixels wide
INK, PALE, RULE = "#222222", "#777777", "#e4e4e4"


class Page:
    """A white page of WIDE x `height` pixels, in which all sizes and places are given."""

    def __init__(self, height):
        from PIL import Image, ImageDraw, ImageFont

        self.image = Image.new("RGB", (WIDE * FINE, height * FINE), "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(TEXT * FINE)

    def text(self, x, y, text, colour=PALE, anchor="ls"):
        """anchor: Pillow's word for where in the text (x, y) is. The font has ASCII and ± alone."""
        text = "±".join(part.encode("ascii", "replace").decode() for part in text.split("±"))
        self.draw.text((x * FINE, y * FINE), text, colour, self.font, anchor=anchor)

    def line(self, points, colour, width, dots=0):
        """dots: the radius of one at each point."""
        points = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(points, colour, round(width * FINE), joint="curve")
        for point in points if dots else ():
            self.draw.circle(point, dots * FINE, colour)


def picture(names, runs):
    """runs: [series]. -> the panels below one another, a PIL image."""
    drawn, x = panels(runs), steps_axis(runs)
    heads = [wrap(last(run), 84) for run in runs]
    page = Page(MARGIN + sum(50 + 38 * len(facts) for facts in heads) + sum(122 + panel.height for panel in drawn) + 56)
    y = MARGIN
    for name, facts, colour in zip(names, heads, COLOURS):
        page.line([(MARGIN, y + 12), (MARGIN + 44, y + 12)], colour, 6)
        page.text(MARGIN + 62, y + 22, name if len(name) < 70 else f"...{name[-66:]}", INK)
        for n, fact in enumerate(facts):
            page.text(MARGIN + 62, y + 60 + 38 * n, fact)
        y += 50 + 38 * len(facts)
    for panel in drawn:
        _panel(page, panel, x, y + 72)
        y += panel.height + 122
    page.text((LEFT + RIGHT) / 2, y + 26, "steps", anchor="ms")
    return page.image.reduce(FINE)


def _panel(page, panel, x, top):
    def at(step, value):
        return LEFT + x.place(step) * (RIGHT - LEFT), top + (1 - panel.axis.place(value)) * panel.height

    bottom = top + panel.height
    thin = next((f" (thin: {curve.name})" for curve in panel.curves if curve.looks == OTHER), "")
    page.text(MARGIN, top - 26, panel.title + thin, INK)
    for value, text in panel.axis.ticks(max(4, panel.height // 60)):
        level = at(0, value)[1]
        page.line([(LEFT, level), (RIGHT, level)], RULE if value else PALE, 1.6)
        page.text(LEFT - 16, level, text, anchor="rm")
    for step, text in x.ticks(6):
        page.line([(at(step, 0)[0], bottom), (at(step, 0)[0], bottom + 7)], PALE, 1.6)
        page.text(at(step, 0)[0], bottom + 12, text, anchor="ma")
    page.line([(LEFT, bottom), (RIGHT, bottom)], PALE, 2)
    for curve in panel.curves:
        colour = COLOURS[curve.run]
        for step, ends in zip(curve.steps, curve.ranges() if curve.errors else ()):
            page.line([at(step, end) for end in ends], _lighter(colour), 4)
        few = len(curve.steps) == 1 or curve.errors and len(curve.steps) <= 40
        width, dots = {FAINT: (1.4, 0), OTHER: (2, 4), MAIN: (3.6, 6)}[curve.looks]
        points = [at(*point) for point in thinned(curve.steps, curve.values, RIGHT - LEFT)]
        page.line(points, _lighter(colour) if curve.looks == FAINT else colour, width, dots if few else 0)


def _lighter(colour):
    """The colour, two thirds white."""
    return tuple((part + 2 * 255) // 3 for part in bytes.fromhex(colour[1:]))
