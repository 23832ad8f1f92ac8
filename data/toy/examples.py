"""What the base model is trained on: pictures with captions and SDXL time ids. Pillow and numpy only.

Most examples are whole pictures. Some are crops of a larger rendering and some are enlarged from a smaller one. Their
time ids say so, and only because of that do time ids mean something to the model.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .world import SIZE, STYLES, Scene, caption, random_scene, render

CROPPED, ENLARGED = 0.10, 0.05  # shares of the examples


@dataclass(frozen=True)
class Example:
    scene: Scene
    style: str
    seed: int
    original: int = SIZE  # pixels a side, before resizing
    top: int = 0
    left: int = 0

    @property
    def text(self):
        return caption(self.scene) + STYLES[self.style].words

    @property
    def time_ids(self):
        """SDXL's (original height, width, crop top, left, target height, width)."""
        return self.original, self.original, self.top, self.left, SIZE, SIZE

    def picture(self):
        """-> uint8 (128, 128, 3)."""
        if self.original < SIZE:
            whole = render(self.scene, self.style, self.seed)
            small = whole.resize((self.original, self.original), Image.Resampling.BOX)
            return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        image = render(self.scene, self.style, self.seed, self.original)
        return np.asarray(image.crop((self.left, self.top, self.left + SIZE, self.top + SIZE)))


def picture(example):
    """Example.picture as a function, to be given to a process pool."""
    return example.picture()


def example(style, seed):
    """A random scene in `style`: whole, or for a few seeds (never in ink) a crop or an enlargement."""
    rng = random.Random(f"view|{seed}")
    kind, original, top, left = rng.random(), SIZE, 0, 0
    if style != "ink" and kind < CROPPED:
        original = rng.randrange(SIZE + 16, SIZE + 80)
        top, left = rng.randrange(original - SIZE + 1), rng.randrange(original - SIZE + 1)
    elif style != "ink" and kind < CROPPED + ENLARGED:
        original = rng.randrange(SIZE // 4, SIZE // 2)
    return Example(random_scene(seed), style, seed, original, top, left)


def examples(counts):
    """Examples for {style: how many}. No two share a seed, and none has a seed of the fine-tuning set."""
    return [example(style, 100_000 * i + n) for i, (style, count) in enumerate(counts.items()) for n in range(count)]
