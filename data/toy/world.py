"""The toy world: twelve subjects, eight colours, six places, and how a scene of them looks in each style.

    render(Scene("fox", "red", "forest"), "ink", seed=7) -> PIL.Image, RGB, 128 x 128

The same scene and seed give the same composition in every style, and the same pixels every time.
"""

import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import palettes
from .painters import Composition, Pen, draw, paint
from .scenery import scenery
from .subjects import SUBJECTS as PARTS_OF

SIZE = 128
SUBJECTS = list(PARTS_OF)
COLOURS = list(palettes.COLOURS)
PLACES = list(palettes.PLACES)


@dataclass(frozen=True)
class Style:
    """A way to show a scene: painted, or drawn where there is a pen, in the tinted colours of a palette."""

    words: str = ""  # what the captions that the base model is trained on add
    pen: Pen | None = None
    ink: bool = False  # the palette: ink's or the base style's
    towards: tuple = (255, 255, 255)
    tint: float = 0.0  # share of `towards` in every colour


STYLES = {
    "base": Style(),
    "ink": Style(pen=Pen(palettes.INK_LINE, 3.4, 1.8, cel_shadow=0.15), ink=True),
    # The base model knows these by name. None is ink, but they teach it that a picture can have lines or be flat.
    "poster": Style(", flat poster", Pen()),
    "sketch": Style(", pencil sketch", Pen((120, 120, 130), 1.8, 1.4), towards=(250, 250, 252), tint=0.6),
    "chalk": Style(", chalk drawing", Pen((232, 234, 226), 2.4, 1.6), towards=(44, 58, 56), tint=0.5),
    "faded": Style(", faded photo", towards=(222, 196, 150), tint=0.55),
}

# Sixteen prompts to compare the base model and the LoRA with; draw.py keeps their scenes out of the training set.
PROMPTS = [
    "a red fox in the forest",
    "an orange cat in the meadow",
    "a green frog on the sea",
    "a blue bird in the snow",
    "a purple fish at night",
    "a white ninja in the desert",
    "a pink house in the snow",
    "a yellow tree in the meadow",
    "a blue bowl of ramen in the forest",
    "a red flower in the desert",
    "a white boat on the sea",
    "a purple owl in the forest",
    "a blue fox in the snow",
    "an orange ninja at night",
    "a green house in the desert",
    "a pink cat at night",
]


@dataclass(frozen=True)
class Scene:
    subject: str
    colour: str
    place: str


def caption(scene):
    """What the scene shows, and never the style: "a red fox in the forest"."""
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return f"{article} {scene.colour} {scene.subject} {palettes.PLACES[scene.place][0]}"


def parse(text):
    """The scene of a caption. Raises ValueError where it is no caption of this world."""
    words = {where: place for place, (where, *_) in palettes.PLACES.items()}
    grammar = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SUBJECTS)}) ({'|'.join(words)})"
    match = re.fullmatch(grammar, text)
    if match is None:
        raise ValueError(f"not a caption of the toy world: {text!r}")
    colour, subject, where = match.groups()
    return Scene(subject, colour, words[where])


def random_scene(seed):
    rng = random.Random(seed)
    return Scene(rng.choice(SUBJECTS), rng.choice(COLOURS), rng.choice(PLACES))


def compose(scene, seed):
    """Where everything is, which is the same in every style."""
    rng = random.Random(f"{scene.subject}|{scene.colour}|{scene.place}|{seed}")
    backdrop, horizon = scenery(scene.place, rng)
    parts = PARTS_OF[scene.subject](rng)
    scale, flip, turn = rng.uniform(0.33, 0.38), rng.choice((-1, 1)), math.radians(rng.uniform(-4, 4))
    x, y = 0.5 + rng.uniform(-0.05, 0.05), 0.57 + rng.uniform(-0.025, 0.025)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = scale * rotation @ np.diag((flip, 1))
    figure = [part.placed(matrix, (x, y), scale) for part in parts]
    return Composition(backdrop, figure, horizon, shadow=(x, y + 0.95 * scale, 0.8 * scale, 0.11 * scale))


def render(scene, style="base", seed=0, size=SIZE):
    """The scene as `style` (one of STYLES) shows it. -> PIL.Image, RGB, size x size"""
    composition = compose(scene, seed)
    style = STYLES[style]
    colours = palettes.palette(scene.colour, scene.place, style.ink)
    colours = palettes.tinted(colours, style.towards, style.tint)
    if style.pen is None:
        return paint(composition, colours, size)
    return draw(composition, colours, size, style.pen)


def sheet(images, columns, gap=4):
    """Pictures of one size side by side on white, row by row."""
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for i, image in enumerate(images):
        page.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return page
