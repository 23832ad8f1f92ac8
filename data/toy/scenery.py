"""The six places: what lies behind a subject, from back to front, in a box from 0 to 1.

A place has few things, each big enough to survive the VAE. `rng` moves them as a view would vary, not as confetti.
"""

import math

import numpy as np

from .shapes import blob, detail, flat, form, light, line, mark, oval, path


def ground(level, swell, waves, phase, colour):
    """Everything below a wavy horizon."""
    x = np.linspace(-0.1, 1.1, 40)
    ridge = level + swell * np.sin(waves * x * math.tau + phase)
    return form([(-0.1, 1.2), *zip(x, ridge), (1.1, 1.2)], colour)


def pine(x, y, size, colour):
    left, right, top = x - 0.016 * size, x + 0.016 * size, y - 0.1 * size
    parts = [detail([(left, y), (right, y), (right, top), (left, top)], "wood")]
    for half, foot, top in ((0.115, 0.06, 0.24), (0.085, 0.17, 0.34)):
        triangle = [(x - half * size, y - foot * size), (x + half * size, y - foot * size), (x, y - top * size)]
        parts.append(detail(triangle, colour))
    return parts


def cactus(x, horizon):
    arms = [
        line(path((x + dx, horizon - top), (x + dx * 0.86, horizon - 0.03), (x, horizon)), "cactus", 0.042)
        for dx, top in ((-0.075, 0.09), (0.075, 0.14))
    ]
    return [*arms, line([(x, horizon - 0.21), (x, horizon + 0.08)], "cactus", 0.058)]


def cloud(x, y):
    around = ((-0.16, 0.035), (-0.09, -0.035), (0, -0.07), (0.09, -0.035), (0.16, 0.035), (0, 0.05))
    return detail(blob(*((x + dx, y + dy) for dx, dy in around)), "cloud")


def tuft(x, y, colour):
    blades = ((-0.04, -0.05), (-0.008, -0.015), (0.005, -0.07), (0.02, -0.015), (0.045, -0.05))
    return flat([(x - 0.035, y), *((x + dx, y + dy) for dx, dy in blades), (x + 0.035, y)], colour)


def spots(rng, count, top, bottom):
    """`count` positions spread over the width, each free within its own column."""
    return [((i + rng.uniform(0.25, 0.75)) / count, rng.uniform(top, bottom)) for i in range(count)]


def scenery(place, rng):
    """-> (parts, horizon): the backdrop of a place, and the height of its horizon in 0..1 from the top."""
    horizon = rng.uniform(0.57, 0.63)
    phase = rng.uniform(0, 6)
    left = rng.choice((True, False))
    x = rng.uniform(0.12, 0.24) if left else rng.uniform(0.76, 0.88)
    parts = [light(oval(x, rng.uniform(0.14, 0.2), 0.1), "moon" if place == "night" else "sun")]
    if place == "night":
        parts += [flat(oval(*spot, 0.016), "star") for spot in spots(rng, 6, 0.05, 0.45)]
    if place in ("sea", "meadow", "snow"):
        parts.append(cloud(1 - x + rng.uniform(-0.04, 0.04), rng.uniform(0.12, 0.2)))

    if place == "sea":
        parts.append(ground(horizon, 0, 1, 0, "far"))
    else:
        parts.append(ground(horizon - 0.06, 0.035, 1.1, phase, "far"))
    if place == "forest":
        for spot, size in zip((0.04, 0.2, 0.38, 0.62, 0.8, 0.96), (1.6, 1.25, 1.5, 1.5, 1.25, 1.6)):
            parts += pine(spot + rng.uniform(-0.03, 0.03), horizon + 0.03, size, "pine")
    elif place == "snow":
        for spot in (rng.uniform(0.05, 0.13), rng.uniform(0.87, 0.95)):
            parts += pine(spot, horizon + 0.05, 1.4, "frosted pine")
    elif place == "desert":
        for spot in (rng.uniform(0.08, 0.14), rng.uniform(0.86, 0.92)):
            parts += cactus(spot, horizon)
    parts.append(ground(horizon + 0.1, 0.02, 2.2 if place == "sea" else 0.8, phase, "near"))

    if place == "sea":
        for cx, cy in spots(rng, 4, 0.76, 0.95):
            crests = ((-0.09, 0), (-0.045, -0.025), (0, 0), (0.045, -0.025), (0.09, 0))
            parts.append(mark(path(*((cx + dx, cy + dy) for dx, dy in crests)), "wave", 0.02))
    elif place == "meadow":
        for cx, cy in spots(rng, 5, 0.76, 0.95):
            parts += [detail(oval(cx, cy, 0.032), "bloom"), flat(oval(cx, cy, 0.014), "gold")]
    elif place == "snow":
        parts += [flat(oval(*spot, 0.018), "flake") for spot in spots(rng, 7, 0.05, 0.55)]
    elif place == "forest":
        parts += [tuft(*spot, "grass") for spot in spots(rng, 4, 0.78, 0.96)]
    elif place == "night":
        parts += [tuft(*spot, "night grass") for spot in spots(rng, 4, 0.78, 0.96)]
    return parts, horizon
