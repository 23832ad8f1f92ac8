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
LABEL = 168  # the widest line of a row's label
LINES = 12  # of one prompt or label; what is longer ends in …
PAPER, INK, GREY, RULE = "#ffffff", "#1c1c1e", "#55555a", "#d8d8dc"


def grid(rows, groups):
    """-> PIL image.

    rows: [(label, [paths of pictures])], one picture per prompt. groups: [(heading or None, [prompts])], whose prompts
    are those of the columns, in their order; a group begins a new block, as more than COLUMNS prompts do.
    """
    letters = Letters(TEXT)
    count = sum(len(prompts) for _, prompts in groups)
    cell = next((cell for cell in CELLS if len(rows) * count * cell**2 <= LARGEST), CELLS[-1])
    labels = [_wrap(label, letters, LABEL) for label, _ in rows]
    left = MARGIN + max(round(letters.width(line)) for lines in labels for line in lines) + 14
    blocks, start = [], 0
    for heading, prompts in groups:
        each = math.ceil(len(prompts) / math.ceil(len(prompts) / COLUMNS))  # nine are five and four, not eight and one
        for first in range(0, len(prompts), each):
            some = prompts[first : first + each]
            pictures = [paths[start + first : start + first + len(some)] for _, paths in rows]
            blocks.append(_block(labels, pictures, some, None if first else heading, cell, left, letters))
        start += len(prompts)
    width = max(block.width for block in blocks)
    out = Image.new("RGB", (width, 2 * MARGIN + sum(b.height for b in blocks) + APART * (len(blocks) - 1)), PAPER)
    top = MARGIN
    for block in blocks:
        out.paste(block, (0, top))
        top += block.height + APART
    if letters.lacking:
        print(f"grid.png: no font of this machine has {first_of(letters.lacking)}; what it lacks is named in brackets")
    return out


def _block(labels, pictures, prompts, heading, cell, left, letters):
    """-> PIL image. labels: each row's, in lines. pictures: each row's paths. left: where the pictures begin."""
    above = [_wrap(prompt or '""', letters, cell - 8) for prompt in prompts]
    title = Letters(HEADING)
    top = (HEADING + 24 if heading else 0) + max(map(len, above)) * LINE + 4
    step = cell + GAP
    width = left + len(prompts) * step - GAP
    if heading:
        heading = title.legible(heading)
        width = max(width, MARGIN + round(title.width(heading)))
    block = Image.new("RGB", (width + MARGIN, top + len(labels) * step - GAP), PAPER)
    if heading:
        title.draw(block, MARGIN, HEADING, heading, INK)
        ImageDraw.Draw(block).line((MARGIN, HEADING + 10, width, HEADING + 10), RULE, 1)
    for x, lines in enumerate(above):  # they end where the picture begins
        for n, line in enumerate(lines):
            letters.draw(block, left + x * step, top - 10 - (len(lines) - 1 - n) * LINE, line, INK)
    for y, (lines, paths) in enumerate(zip(labels, pictures)):
        middle = top + y * step + cell // 2 + TEXT * 0.36 - (len(lines) - 1) * LINE / 2
        for n, line in enumerate(lines):
            letters.draw(block, left - 14 - letters.width(line), round(middle + n * LINE), line, GREY)
        for x, path in enumerate(paths):
            with Image.open(path) as picture:
                block.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (left + x * step, top + y * step))
    return block


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
