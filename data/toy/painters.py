"""Two ways to put parts on a canvas: soft and shaded (the base style), or drawn with flat colours and lines.

`paint` and `draw` take a Composition, whose coordinates are shares of the canvas, and return an RGB picture. All
sizes in pixels are those of a 128 pixel canvas and grow with it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .palettes import mix
from .shapes import oval

OVERSAMPLING = 4  # masks and lines are drawn this much larger and then reduced, which gives them clean edges


@dataclass(frozen=True)
class Composition:
    """What is where, before any style: parts in 0..1, the horizon's y, the subject's shadow as (x, y, rx, ry)."""

    backdrop: list
    figure: list
    horizon: float
    shadow: tuple


def paint(composition, colours, size):
    """The base style: a graded sky, every form lit from above left, soft shadows."""
    y = (np.arange(size) + 0.5) / size
    grade = np.clip(y / composition.horizon, 0, 1)[:, None, None]
    sky, horizon = (np.asarray(colours[name], np.float32) for name in ("sky", "horizon"))
    canvas = np.repeat((sky + (horizon - sky) * grade).astype(np.float32), size, axis=1)  # (size, size, 3)
    for part in composition.backdrop:
        _paint_part(canvas, part, colours[part.colour])
    canvas *= 1 - 0.5 * _soft_shadow(composition.shadow, size)[..., None]
    for part in composition.figure:
        _paint_part(canvas, part, colours[part.colour])
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _soft_shadow(shadow, size):
    """(size, size) in 0..1: the blurred ellipse on the ground under the subject."""
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon(_pixels(oval(*shadow), size), fill=255)
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(3 * size / 128)), np.float32) / 255


def _paint_part(canvas, part, colour):
    """Blend one part into the canvas (float, in place), shaded according to its kind."""
    size = len(canvas)
    stroke = part.width * size
    margin = 5 * size / 128 + stroke
    x0, y0 = np.maximum(np.floor(part.points.min(axis=0) * size - margin), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(part.points.max(axis=0) * size + margin), size).astype(int)
    if x1 <= x0 or y1 <= y0:
        return
    mask = Image.new("L", ((x1 - x0) * OVERSAMPLING, (y1 - y0) * OVERSAMPLING))
    points = _pairs((part.points * size - (x0, y0)) * OVERSAMPLING)
    if part.width:
        _stroke(ImageDraw.Draw(mask), points, 255, stroke * OVERSAMPLING)
    else:
        ImageDraw.Draw(mask).polygon(points, fill=255)
    mask = mask.reduce(OVERSAMPLING)
    cover = np.asarray(mask, np.float32)[..., None] / 255

    shade = np.broadcast_to(np.asarray(colour, np.float32), (*cover.shape[:2], 3))
    if part.kind in ("form", "detail", "line", "mark"):  # a little lighter above than below
        y = ((np.arange(y0, y1) + 0.5) / size - part.points[:, 1].min()) / max(1e-6, np.ptp(part.points[:, 1]))
        shade = shade * (1.10 - 0.24 * np.clip(y, 0, 1)).astype(np.float32)[:, None, None]
    if part.kind == "form":
        shade = _rounded(shade, mask, cover, size)
    if part.kind == "light":
        _glow(canvas, part, colour)
    window = canvas[y0:y1, x0:x1]
    window += (np.clip(shade, 0, 255) - window) * cover


def _rounded(shade, mask, cover, size):
    """Light on the rim that faces the upper left and a violet shadow on the other, from the mask's blurred slope."""
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(3.2 * size / 128)), np.float32) / 255
    slope_y, slope_x = np.gradient(height, 128 / size)
    lit = np.clip((slope_x * 0.55 + slope_y * 0.85) * 4.2, -0.6, 0.6)[..., None] * cover
    brighter = shade + (255 - shade) * lit * 0.8
    darker = shade * (1 + lit * 0.85) - np.array((18, 6, 30), np.float32) * lit
    return np.where(lit > 0, brighter, darker)


def _glow(canvas, part, colour):
    size = len(canvas)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (128 / size)
    cx, cy = part.points.mean(axis=0) * 128
    halo = 0.6 * np.exp(-np.maximum(np.hypot(x - cx, y - cy) - 8, 0) / 16)[..., None]
    canvas += (np.asarray(colour, np.float32) - canvas) * halo


@dataclass(frozen=True)
class Pen:
    """The lines of a drawn style, none where `line`, their colour, is None. Widths are pixels of a 128 pixel canvas."""

    line: tuple | None = None
    figure_width: float = 0.0
    backdrop_width: float = 0.0
    cel_shadow: float = 0.0  # how much darker the lower right rim of the subject's forms is


def draw(composition, colours, size, pen):
    """A drawn style: flat colours, lines where the pen has them, a hard shadow on the rim."""
    side = size * OVERSAMPLING
    unit = side / 128
    sky = mix(colours["sky"], colours["horizon"], 0.5)
    colours = {name: tuple(int(v) for v in rgb) for name, rgb in colours.items()}
    image = Image.new("RGB", (side, side), tuple(int(v) for v in sky))
    canvas = ImageDraw.Draw(image)
    for part in composition.backdrop:
        _draw_part(image, part, colours[part.colour], pen, pen.backdrop_width * unit)
    canvas.polygon(_pixels(oval(*composition.shadow), side), fill=tuple(int(0.8 * v) for v in colours["near"]))
    for part in composition.figure:
        _draw_part(image, part, colours[part.colour], pen, pen.figure_width * unit, pen.cel_shadow)
    return image.reduce(OVERSAMPLING)


def _draw_part(image, part, colour, pen, outline, cel_shadow=0.0):
    """One part in flat colour; `outline` is the width of a form's line in pixels of the image."""
    side = image.width
    canvas, points = ImageDraw.Draw(image), _pixels(part.points, side)
    if part.width:
        if pen.line and part.kind == "line":
            _stroke(canvas, points, pen.line, part.width * side + 1.4 * outline)
        _stroke(canvas, points, colour, part.width * side)
        return
    canvas.polygon(points, fill=colour)
    if cel_shadow and part.kind == "form":
        _shade_rim(image, part, tuple(int(v * (1 - cel_shadow)) for v in colour))
    if pen.line and part.kind != "flat":
        width = max(1, round(outline * (0.75 if part.kind == "detail" else 1)))
        canvas.line(points + points[:2], fill=pen.line, width=width, joint="curve")


def _shade_rim(image, part, colour):
    """Paint the form's lower right rim, which is the form less itself moved up and left."""
    side = image.width
    dx, dy = 4 * side / 128, 5 * side / 128
    corner = np.floor(part.points.min(axis=0) * side)
    width, height = np.ceil(part.points.max(axis=0) * side - corner).astype(int) + 1
    here, moved = Image.new("L", (width, height)), Image.new("L", (width, height))
    ImageDraw.Draw(here).polygon(_pairs(part.points * side - corner), fill=255)
    ImageDraw.Draw(moved).polygon(_pairs(part.points * side - corner - (dx, dy)), fill=255)
    image.paste(colour, tuple(corner.astype(int).tolist()), ImageChops.subtract(here, moved))


def _pixels(points, side):
    return _pairs(points * side)


def _pairs(points):
    """Array (n, 2) -> what Pillow draws: [(x, y)]."""
    return [tuple(p) for p in points.tolist()]


def _stroke(canvas, points, fill, width):
    """A line with round ends."""
    canvas.line(points, fill=fill, width=max(1, round(width)), joint="curve")
    for x, y in (points[0], points[-1]):
        canvas.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=fill)
