"""One picture out of many: base above LoRA for every prompt, and below them the prompt in letters of readable size."""

from PIL import Image, ImageDraw, ImageFont

CELL = 256  # pixels a side at which a picture is shown
MARGIN, LINE, COLUMNS = 8, 22, 8


def grid(rows, captions):
    """rows: {label: [pictures]}, with one picture per caption. -> PIL image, wrapped after COLUMNS captions."""
    font = ImageFont.load_default(size=17)
    blocks = [_block(rows, captions, start, font) for start in range(0, len(captions), COLUMNS)]
    out = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        out.paste(block, (0, top))
        top += block.height
    return out


def _block(rows, captions, start, font):
    captions = captions[start : start + COLUMNS]
    texts = [_wrap(caption, font) for caption in captions]
    label_width = max(int(font.getlength(label)) for label in rows) + 2 * MARGIN
    step = CELL + MARGIN
    height = MARGIN + len(rows) * step + max(map(len, texts)) * LINE + MARGIN
    block = Image.new("RGB", (label_width + len(captions) * step, height), "white")
    draw = ImageDraw.Draw(block)
    for y, (label, pictures) in enumerate(rows.items()):
        draw.text((MARGIN, MARGIN + y * step + CELL // 2), label, "black", font, anchor="lm")
        for x, picture in enumerate(pictures[start : start + COLUMNS]):
            small = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
            block.paste(small, (label_width + x * step, MARGIN + y * step))
    for x, lines in enumerate(texts):
        for n, line in enumerate(lines):
            draw.text((label_width + x * step, MARGIN + len(rows) * step + n * LINE), line, "black", font)
    return block


def _wrap(text, font):
    """Lines of `text` no wider than a cell."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > CELL and lines[-1]:
            lines.append("")
            longer = word
        while font.getlength(longer) > CELL:  # a very long word, or a language without spaces
            fits = next(n for n in range(1, len(longer)) if font.getlength(longer[: n + 1]) > CELL)
            lines[-1], longer = longer[:fits], longer[fits:]
            lines.append("")
        lines[-1] = longer
    return lines
