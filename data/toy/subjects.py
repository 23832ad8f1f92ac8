"""The twelve subjects, each a list of parts from back to front, in a box from -1 to 1 with its feet at y = 0.95.

Colours are names: `main` is the colour the caption asks for, `dark` and `light` are its shades, all others are
materials of palettes.py. `rng` varies a tail or a sail. Eyes, mouths and windows are drawn large because the picture,
128 x 128 pixels, goes through a VAE that keeps one cell for 8 x 8 of them.
"""

import math

from .shapes import blob, detail, flat, form, line, mark, oval, path


def eyes(x, y, r):
    """A pair of dark eyes at (-x, y) and (x, y), each with a glint."""
    parts = []
    for side in (-1, 1):
        parts += [
            flat(oval(side * x, y, r, r * 1.25), "eye"),
            flat(oval(side * x - r * 0.3, y - r * 0.45, r * 0.42), "white"),
        ]
    return parts


def smile(x, y, width, stroke=0.06):
    return mark(path((x - width, y - width * 0.35), (x, y + width * 0.2), (x + width, y - width * 0.35)), "eye", stroke)


# fmt: off
# Every shape below is a table of points.


def fox(rng):
    tip = rng.uniform(-0.06, 0.06)
    parts = [
        form(blob((0.2, 0.78), (0.6, 0.64), (0.82 + tip, 0.24), (0.76 + tip, -0.1), (1.02 + tip, 0.16),
                  (1.0 + tip, 0.62), (0.62, 0.94), (0.2, 0.95)), "main"),
        flat(blob((0.77 + tip, -0.08), (1.02 + tip, 0.16), (1.02 + tip, 0.38), (0.9 + tip, 0.28), (0.78 + tip, 0.26)),
             "cream"),
        form(blob((-0.36, 0.1), (0.36, 0.1), (0.48, 0.6), (0.42, 0.95), (-0.42, 0.95), (-0.48, 0.6)), "main"),
        flat(blob((-0.2, 0.3), (0.2, 0.3), (0.24, 0.62), (0, 0.86), (-0.24, 0.62)), "cream"),
    ]
    for side in (-1, 1):
        parts += [
            form(blob((side * 0.14, -0.6), (side * 0.32, -0.8), (side * 0.6, -1.08), (side * 0.7, -0.74),
                      (side * 0.68, -0.36)), "main"),
            flat(blob((side * 0.36, -0.64), (side * 0.56, -0.9), (side * 0.58, -0.5)), "black"),
        ]
    return [
        *parts,
        form(blob((0, -0.72), (0.44, -0.64), (0.72, -0.26), (0.84, 0.06), (0.46, 0.26), (0, 0.38), (-0.46, 0.26),
                  (-0.84, 0.06), (-0.72, -0.26), (-0.44, -0.64)), "main"),
        flat(blob((0.8, 0.06), (0.4, -0.06), (0.13, 0.1), (0, -0.04), (-0.13, 0.1), (-0.4, -0.06), (-0.8, 0.06),
                  (-0.46, 0.25), (0, 0.37), (0.46, 0.25)), "cream"),
        *eyes(0.32, -0.2, 0.12),
        flat(oval(0, 0.16, 0.12, 0.09), "eye"),
    ]


def cat(rng):
    tip = rng.uniform(-0.12, 0.12)
    parts = [
        line(path((0.3, 0.85), (0.76, 0.85), (0.92, 0.45), (0.82 + tip, 0.0)), "main", 0.19),
        form(blob((-0.34, 0.1), (0.34, 0.1), (0.5, 0.65), (0.44, 0.95), (-0.44, 0.95), (-0.5, 0.65)), "main"),
        flat(oval(0, 0.64, 0.26, 0.26), "light"),
    ]
    for side in (-1, 1):
        parts += [
            form([(side * 0.12, -0.64), (side * 0.64, -1.08), (side * 0.7, -0.3)], "main"),
            flat([(side * 0.34, -0.68), (side * 0.57, -0.9), (side * 0.6, -0.5)], "blush"),
        ]
    parts += [form(oval(0, -0.24, 0.76, 0.6), "main"), flat(oval(0, 0.04, 0.34, 0.23), "light")]
    parts += [mark([(x, -0.78 + abs(x) * 0.2), (x * 0.7, -0.54)], "dark", 0.1) for x in (-0.22, 0.0, 0.22)]
    parts += [flat(oval(side * 0.54, 0.02, 0.13, 0.09), "blush") for side in (-1, 1)]
    return [
        *parts,
        *eyes(0.34, -0.24, 0.13),
        flat(oval(0, -0.05, 0.085, 0.06), "eye"),
        mark(path((-0.2, 0.06), (-0.1, 0.14), (0, 0.03), (0.1, 0.14), (0.2, 0.06)), "eye", 0.06),
    ]


def frog(rng):
    lean = rng.uniform(-0.04, 0.04)
    parts = []
    for side in (-1, 1):
        parts += [form(oval(side * 0.68, 0.6, 0.3, 0.36, side * 20), "main"),
                  form(oval(side * 0.62, 0.9, 0.32, 0.1), "dark")]
    parts += [form(oval(lean, 0.44, 0.66, 0.52), "main"), flat(oval(lean, 0.6, 0.42, 0.34), "cream")]
    parts += [form(oval(side * 0.46, -0.54, 0.33, 0.34), "main") for side in (-1, 1)]
    parts.append(form(oval(0, -0.1, 0.88, 0.5), "main"))
    for side in (-1, 1):
        parts += [
            detail(oval(side * 0.46, -0.56, 0.23, 0.24), "white"),
            flat(oval(side * 0.43, -0.54, 0.13, 0.15), "eye"),
            flat(oval(side * 0.62, 0.04, 0.14, 0.09), "blush"),
        ]
    return [*parts, mark(path((-0.48, -0.06), (-0.22, 0.13), (0, 0.17), (0.22, 0.13), (0.48, -0.06)), "eye", 0.075)]


def bird(rng):
    lift = rng.uniform(-0.1, 0.1)
    legs = [line([(x, 0.6), (x, 0.92)], "gold", 0.09) for x in (-0.1, 0.22)]
    feet = [line([(x - 0.1, 0.93), (x + 0.16, 0.93)], "gold", 0.09) for x in (-0.1, 0.22)]
    return [
        form(blob((-0.5, 0.1), (-0.95, -0.16 + lift), (-1.06, 0.12 + lift), (-0.95, 0.34 + lift), (-0.45, 0.45)),
             "dark"),
        *legs,
        *feet,
        form([(0.7, -0.5), (1.18, -0.2), (0.7, 0.06)], "gold"),
        form(blob((0.14, -0.8), (-0.04, -1.08), (0.26, -1.0), (0.44, -1.14), (0.5, -0.8)), "dark"),
        form(blob((0.35, -0.9), (0.78, -0.66), (0.84, -0.2), (0.74, 0.3), (0.3, 0.7), (-0.2, 0.72), (-0.64, 0.42),
                  (-0.68, 0.1), (-0.32, -0.1), (-0.08, -0.62)), "main"),
        flat(blob((0.76, 0.0), (0.7, 0.36), (0.3, 0.66), (0.0, 0.64), (0.34, 0.3)), "cream"),
        form(blob((0.12, 0.0), (-0.2, -0.06), (-0.64, 0.08 + lift), (-0.84, 0.36 + lift), (-0.3, 0.48), (0.14, 0.32)),
             "dark"),
        flat(oval(0.44, -0.4, 0.14, 0.17), "eye"),
        flat(oval(0.4, -0.47, 0.06), "white"),
        flat(oval(0.52, -0.1, 0.13, 0.085), "blush"),
    ]


def fish(rng):
    sway = rng.uniform(-0.1, 0.1)
    stripes = [mark(path((x, -0.46), (x + 0.12, -0.02), (x + 0.02, 0.44)), "dark", 0.13) for x in (-0.36, 0.04)]
    return [
        form(blob((-0.5, 0.0), (-0.8, -0.54 + sway), (-1.08, -0.54 + sway), (-0.92, 0.0), (-1.08, 0.54 + sway),
                  (-0.8, 0.54 + sway)), "dark"),
        form(blob((-0.34, -0.44), (-0.24, -0.94), (0.3, -0.88), (0.44, -0.44)), "dark"),
        form(blob((-0.1, 0.44), (-0.28, 0.9), (0.12, 0.84), (0.3, 0.46)), "dark"),
        form(blob((1.0, -0.02), (0.74, -0.44), (0.2, -0.64), (-0.3, -0.46), (-0.68, 0.0), (-0.3, 0.48), (0.2, 0.64),
                  (0.74, 0.42)), "main"),
        flat(blob((0.96, 0.1), (0.5, 0.2), (-0.1, 0.22), (-0.5, 0.14), (-0.28, 0.44), (0.2, 0.6), (0.72, 0.4)),
             "light"),
        *stripes,
        detail(oval(0.6, -0.16, 0.21, 0.22), "white"),
        flat(oval(0.64, -0.15, 0.12, 0.14), "eye"),
        flat(oval(0.6, -0.21, 0.05), "white"),
        mark(path((0.98, 0.12), (0.84, 0.18), (0.72, 0.12)), "eye", 0.06),
        detail(oval(1.0, -0.56, 0.12), "glass"),
        detail(oval(0.94, -0.88, 0.085), "glass"),
    ]


def ninja(rng):
    knot = rng.uniform(-0.08, 0.08)
    parts = [
        form(blob((0.5, -0.56), (0.84, -0.68 + knot), (1.12, -0.46 + knot), (1.04, -0.24 + knot), (0.8, -0.38 + knot),
                  (0.5, -0.36)), "dark"),
        line([(-0.74, 0.0), (0.7, 0.76)], "steel", 0.11),
        line([(-0.92, -0.1), (-0.7, 0.02)], "black", 0.17),
        form(blob((-0.32, 0.1), (0.32, 0.1), (0.46, 0.5), (0.4, 0.94), (0.07, 0.94), (0, 0.8), (-0.07, 0.94),
                  (-0.4, 0.94), (-0.46, 0.5)), "main"),
    ]
    for side in (-1, 1):
        parts += [line(path((side * 0.3, 0.26), (side * 0.58, 0.38), (side * 0.54, 0.64)), "main", 0.23),
                  detail(oval(side * 0.54, 0.68, 0.13), "skin")]
    return [
        *parts,
        flat([(-0.42, 0.52), (0.42, 0.52), (0.44, 0.68), (-0.44, 0.68)], "black"),
        form(oval(0, -0.34, 0.74, 0.66), "main"),
        detail(blob((-0.64, -0.4), (0, -0.46), (0.64, -0.4), (0.64, -0.08), (0, 0.04), (-0.64, -0.08)), "skin"),
        form(blob((-0.7, -0.68), (0, -0.8), (0.7, -0.68), (0.74, -0.44), (0, -0.54), (-0.74, -0.44)), "dark"),
        detail(oval(0, -0.66, 0.2, 0.12), "steel"),
        *eyes(0.29, -0.22, 0.12),
    ]


def house(rng):
    side = rng.choice((-1, 1))
    door, pane = side * 0.34, -side * 0.32
    return [
        detail([(0.34, -0.9), (0.6, -0.9), (0.6, -0.2), (0.34, -0.2)], "wood"),
        form([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.94), (-0.72, 0.94)], "light"),
        form(blob((-1.0, -0.02), (-0.5, -0.52), (0, -1.0), (0.5, -0.52), (1.0, -0.02), (0.84, 0.1), (0, 0.04),
                  (-0.84, 0.1)), "main"),
        form([(door - 0.23, 0.94), (door - 0.23, 0.4), (door, 0.26), (door + 0.23, 0.4), (door + 0.23, 0.94)], "main"),
        flat(oval(door + 0.11, 0.66, 0.055), "gold"),
        detail([(pane - 0.27, 0.24), (pane + 0.27, 0.24), (pane + 0.27, 0.72), (pane - 0.27, 0.72)], "glass"),
        mark([(pane, 0.24), (pane, 0.72)], "black", 0.065),
        mark([(pane - 0.27, 0.48), (pane + 0.27, 0.48)], "black", 0.065),
        detail(oval(0, -0.42, 0.18), "glass"),
    ]


def tree(rng):
    crown = ((-0.5, 0.02, 0.42, "dark"), (0.52, 0.0, 0.42, "dark"), (0, -0.02, 0.44, "dark"),
             (-0.4, -0.42, 0.45, "main"), (0.42, -0.44, 0.45, "main"), (0, -0.66, 0.45, "main"), (0, -0.2, 0.4, "main"))
    sway = rng.uniform(-0.05, 0.05)
    fruit = ((-0.5, -0.36), (0.06, -0.7), (0.5, -0.4), (-0.06, -0.2))
    return [
        form(blob((-0.17, 0.1), (0.17, 0.1), (0.18, 0.6), (0.38, 0.95), (0, 0.88), (-0.38, 0.95), (-0.18, 0.6)),
             "wood"),
        *(form(oval(x + sway * (0.5 - y), y, r, r * 0.9), colour) for x, y, r, colour in crown),
        *(detail(oval(x + sway * (0.5 - y), y, 0.1), "light") for x, y in fruit),
    ]


def ramen(rng):
    tilt = rng.uniform(-0.06, 0.06)
    rim = oval(0, 0.02, 0.96, 0.36, stop=180, samples=20)
    hull = path((-0.96, 0.02), (-0.82, 0.5), (-0.44, 0.8), (0.44, 0.8), (0.82, 0.5), (0.96, 0.02))
    return [
        *(line(path((x, -0.6), (x + 0.1, -0.76), (x - 0.08, -0.92), (x + 0.05, -1.06)), "cloud", 0.1)
          for x in (-0.42, 0.0)),
        *(line([(x, -0.08), (x + 0.58, -0.98 + tilt)], "wood", 0.1) for x in (0.28, 0.5)),
        form(oval(0, 0.0, 0.96, 0.38), "dark"),
        flat(oval(0, -0.02, 0.84, 0.3), "gold"),
        *(mark(path((x, 0.06), (x + 0.12, -0.12), (x + 0.26, 0.1)), "noodle", 0.1) for x in (-0.62, -0.3, 0.06)),
        detail(oval(-0.38, -0.12, 0.28, 0.19, -10), "white"),
        flat(oval(-0.38, -0.11, 0.15, 0.11), "yolk"),
        detail(oval(0.2, -0.14, 0.25, 0.18), "white"),
        flat(oval(0.2, -0.14, 0.12, 0.09), "swirl"),
        detail([(0.5, -0.34), (0.76, -0.3), (0.72, 0.04), (0.48, 0.06)], "black"),
        form([*rim, *hull], "main"),
        mark(path((-0.8, 0.36), (-0.42, 0.55), (0, 0.6), (0.42, 0.55), (0.8, 0.36)), "light", 0.1),
        detail([(-0.38, 0.8), (0.38, 0.8), (0.32, 0.96), (-0.32, 0.96)], "dark"),
    ]


def flower(rng):
    turn, lean = rng.uniform(0, 60), rng.uniform(-0.08, 0.08)
    parts = [
        line(path((0, -0.2), (0.04 + lean, 0.4), (0, 0.95)), "leaf", 0.13),
        form(blob((0.02, 0.76), (0.24, 0.44), (0.7, 0.36), (0.5, 0.74), (0.1, 0.9)), "leaf"),
        form(blob((0.0, 0.84), (-0.26, 0.58), (-0.7, 0.54), (-0.48, 0.86), (-0.1, 0.94)), "leaf"),
    ]
    for radius, shift, colour in ((0.52, 0.0, "dark"), (0.42, 0.5, "main")):
        for petal in range(6):
            angle = turn + (petal + shift) * 60
            x, y = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            parts.append(form(oval(x, y - 0.36, 0.32, 0.25, angle), colour))
    return [*parts, form(oval(0, -0.36, 0.36), "gold"), *eyes(0.15, -0.42, 0.075), smile(0, -0.22, 0.15)]


def boat(rng):
    wind = rng.uniform(-0.05, 0.09)
    return [
        line([(-0.02, -1.0), (-0.02, 0.5)], "wood", 0.12),
        form([(-0.02, -1.06), (0.34, -0.92 + wind), (-0.02, -0.78)], "main"),
        form(blob((0.08, -0.76), (0.36, -0.52), (0.64 + wind, -0.08), (0.7, 0.26), (0.32, 0.3), (0.08, 0.28)), "light"),
        form(blob((-0.12, -0.7), (-0.38, -0.32), (-0.62, 0.2), (-0.32, 0.3), (-0.12, 0.28)), "light"),
        form(blob((-1.0, 0.36), (-0.5, 0.42), (0.5, 0.42), (1.04, 0.28), (0.88, 0.64), (0.6, 0.94), (-0.6, 0.94),
                  (-0.88, 0.66)), "main"),
        *(detail(oval(x, 0.68, 0.12), "glass") for x in (-0.42, 0.0, 0.42)),
    ]


def owl(rng):
    lean = rng.uniform(-0.04, 0.04)
    parts = []
    for side in (-1, 1):
        parts += [form([(side * 0.18, -0.74), (side * 0.66, -1.08), (side * 0.66, -0.4)], "dark"),
                  detail(oval(side * 0.24, 0.92, 0.2, 0.1), "gold")]
    parts += [
        form(blob((0, -0.88), (0.52, -0.76), (0.74, -0.32), (0.7, 0.3), (0.52, 0.78), (0, 0.95), (-0.52, 0.78),
                  (-0.7, 0.3), (-0.74, -0.32), (-0.52, -0.76)), "main"),
        flat(blob((lean, 0.06), (0.38, 0.16), (0.44, 0.48), (0.28, 0.78), (0, 0.87), (-0.28, 0.78), (-0.44, 0.48),
                  (-0.38, 0.16)), "cream"),
        *(mark(path((x - 0.13, y), (x, y + 0.1), (x + 0.13, y)), "dark", 0.08)
          for x, y in ((-0.17, 0.36), (0.17, 0.36), (0, 0.6))),
    ]
    for side in (-1, 1):
        parts += [
            form(blob((side * 0.6, -0.06), (side * 0.92, 0.2), (side * 0.84, 0.62), (side * 0.58, 0.84),
                      (side * 0.5, 0.3)), "dark"),
            detail(oval(side * 0.32, -0.34, 0.35), "cream"),
            flat(oval(side * 0.3, -0.33, 0.22), "gold"),
            flat(oval(side * 0.29, -0.33, 0.14, 0.16), "eye"),
            flat(oval(side * 0.29 - 0.05, -0.4, 0.055), "white"),
        ]
    return [*parts, detail([(-0.13, -0.18), (0.13, -0.18), (0, 0.1)], "gold")]


# fmt: on


SUBJECTS = {
    "fox": fox,
    "cat": cat,
    "frog": frog,
    "bird": bird,
    "fish": fish,
    "ninja": ninja,
    "house": house,
    "tree": tree,
    "bowl of ramen": ramen,
    "flower": flower,
    "boat": boat,
    "owl": owl,
}
