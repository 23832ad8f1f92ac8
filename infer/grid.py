"""One picture out of many: a row for the base and for each LoRA, a column for each prompt, which stands above it."""

import math

from PIL import Image, ImageDraw

from data.common.words import first_of
from infer.letters import Letters

CELLS = (256, 192, 128, 64)  # pixels a side at which a picture is shown: the first that keeps the grid small enough
LARGEST = 2**25  # pixels of all of them together
COLUMNS = 8
MARGIN, GAP, APART = 24, 6, 30  # around all, between pictures, between blocks
TEXT, HEADING, LINE = 16, 20, 21  # sizes of letters, and from one baseline to the next
LABEL, TITLE = 168, 560  # the widest line of a row's label; room for the heading of a narrow group
LINES = 12  # of one prompt or label; what is longer ends in …
PAPER, INK, GREY, RULE = "#ffffff", "#1c1c1e", "#55555a", "#d8d8dc"


def grid(rows, groups):
    """-> PIL image.

    rows: [(label, [paths of pictures])], one picture per prompt. groups: [(heading or None, [prompts])], whose prompts
    are those of the columns, in their order. Groups that have room are beside each other, else below.
    """
    letters = Letters(TEXT)
    pictures = list(zip(*(paths for _, paths in rows)))  # a column for each prompt
    cell = next((cell for cell in CELLS if len(rows) * len(pictures) * cell**2 <= LARGEST), CELLS[-1])
    labels = [_wrap(label, letters, LABEL) for label, _ in rows]
    left = MARGIN + max(round(letters.width(line)) for lines in labels for line in lines) + 14
    parts, columns = [], iter(pictures)
    for heading, prompts in groups:
        each = math.ceil(len(prompts) / math.ceil(len(prompts) / COLUMNS))  # nine are five and four, not eight and one
        for first in range(0, len(prompts), each):
            parts.append((None if first else heading, list(zip(prompts[first : first + each], columns))))
    beside = [parts] if len(pictures) <= COLUMNS else [[part] for part in parts]
    blocks = [_block(labels, some, cell, left, letters) for some in beside]
    height = 2 * MARGIN + sum(block.height for block in blocks) + APART * (len(blocks) - 1)
    out = Image.new("RGB", (max(block.width for block in blocks), height), PAPER)
    top = MARGIN
    for block in blocks:
        out.paste(block, (0, top))
        top += block.height + APART
    if letters.lacking:
        print(f"grid.png: no font of this machine has {first_of(letters.lacking)}; what it lacks is named in brackets")
    return out


def _block(labels, parts, cell, left, letters):
    """-> PIL image. labels: each row's, in lines. parts: [(heading or None, [(prompt, its pictures)])], side by side.
    left: where the pictures begin."""
    title, step, drawn = Letters(HEADING), cell + GAP, []
    for heading, columns in parts:
        width = len(columns) * step - GAP
        lines = _wrap(heading, title, width if len(parts) > 1 else max(width, TITLE)) if heading else []
        columns = [(_wrap(prompt or '""', letters, cell - 8), paths) for prompt, paths in columns]
        drawn.append((lines, columns, max([width, *map(title.width, lines)])))
    rule = max(len(lines) for lines, *_ in drawn) * (HEADING + 6) + 4
    top = (rule + 14 if rule > 4 else 0) + max(len(text) for _, some, _ in drawn for text, _ in some) * LINE + 4
    width = left + round(sum(width for *_, width in drawn)) + APART * (len(drawn) - 1) + MARGIN
    block = Image.new("RGB", (width, top + len(labels) * step - GAP), PAPER)
    x = left
    for lines, columns, width in drawn:
        _write(block, x, rule - 10, lines, title, INK)
        if lines:
            ImageDraw.Draw(block).line((x, rule, x + width, rule), RULE, 1)
        for text, paths in columns:
            _write(block, x, top - 10, text, letters, INK)
            for y, path in enumerate(paths):
                with Image.open(path) as picture:
                    block.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (x, top + y * step))
            x += step
        x += APART - GAP
    for y, lines in enumerate(labels):
        middle = top + y * step + cell / 2 + TEXT * 0.36 + (len(lines) - 1) * LINE / 2
        _write(block, left - 14, round(middle), lines, letters, GREY, to_the_right=True)
    return block


def _write(image, x, bottom, lines, letters, colour, to_the_right=False):
    """Lines of text, the last one on the baseline `bottom`; they begin at x, or end there."""
    for n, line in enumerate(reversed(lines)):
        begin = x - letters.width(line) if to_the_right else x
        letters.draw(image, begin, bottom - n * round(letters.size * 1.3), line, colour)


def _wrap(text, letters, width):
    """Lines of `text` no wider than `width`, LINES of them at most."""
    lines = [""]
    for word in letters.legible(text[: LINES * width]).split():
        longer = f"{lines[-1]} {word}".strip()
        if letters.width(longer) > width and lines[-1]:
            lines.append("")
            longer = word
        while letters.width(longer) > width:  # a very long word, or a language without spaces
            fits = next(n for n in range(1, len(longer)) if letters.width(longer[: n + 1]) > width)
            lines[-1], longer = longer[:fits], longer[fits:]
            lines.append("")
        lines[-1] = longer
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while letters.width(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], f"{last}…"]
    return lines
