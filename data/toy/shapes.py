"""The vocabulary of a picture: a part is an outline or a stroke, a colour name and a kind.

Points are arrays of shape (n, 2): x to the right, y down, in the units of whoever draws (a subject lives in a box
from -1 to 1, a backdrop in 0 to 1). How a part looks is the painter's business (painters.py).
"""

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Part:
    """One shape of a picture.

    Its kind: a `form` is big and rounded, a `detail` is small and has an outline of its own, a `flat` has none, a
    `light` glows. A `line` is a stroke of `width` along the points, such as a limb or a mast, outlined as forms are.
    A `mark` is a stroke without an outline, such as a mouth or a stripe.
    """

    points: np.ndarray
    colour: str
    kind: str
    width: float = 0.0

    def placed(self, matrix, offset, scale):
        """This part moved by x -> matrix @ x + offset, with its strokes scaled too."""
        return replace(self, points=self.points @ np.asarray(matrix).T + offset, width=self.width * scale)


def form(points, colour):
    return Part(np.asarray(points, float), colour, "form")


def detail(points, colour):
    return Part(np.asarray(points, float), colour, "detail")


def flat(points, colour):
    return Part(np.asarray(points, float), colour, "flat")


def light(points, colour):
    return Part(np.asarray(points, float), colour, "light")


def line(points, colour, width):
    return Part(np.asarray(points, float), colour, "line", width)


def mark(points, colour, width):
    return Part(np.asarray(points, float), colour, "mark", width)


def oval(x, y, rx, ry=None, tilt=0.0, start=0.0, stop=360.0, samples=36):
    """Points of an ellipse around (x, y), or of its arc from `start` to `stop`; angles in degrees, clockwise."""
    ry = rx if ry is None else ry
    angle = np.radians(np.linspace(start, stop, samples, endpoint=stop - start < 360))
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    return np.stack([x + u * c - v * s, y + u * s + v * c], axis=1)


def spline(points, closed=True, samples=8):
    """A smooth (Catmull-Rom) curve through the points, `samples` for each of them."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = (np.arange(samples) / samples)[:, None]
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:])
    ]
    return np.concatenate(pieces if closed else [*pieces, p[-1:]])


def path(*points):
    """An open smooth curve, for strokes."""
    return spline(points, closed=False)


def blob(*points):
    """A closed smooth curve, for forms."""
    return spline(points)
