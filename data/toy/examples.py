"""What the base model is trained on: pictures with captions and SDXL time ids. Pillow and numpy only.

Most examples are whole pictures. Some are crops of a larger rendering and some are enlarged from a smaller one, and
their time ids say so: that is what makes SDXL's time ids mean something.
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
            small = render(self.scene, self.style, self.seed).resize(
                (self.original, self.original), Image.Resampling.BOX
            )
            return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        image = render(self.scene, self.style, self.seed, self.original)
        return np.asarray(image.crop((self.left, self.top, self.left + SIZE, self.top + SIZE)))


def picture(example):
    """Example.picture as a function that a process pool can be given."""
    return example.picture()


def example(style, seed):
    rng = random.Random(f"view|{seed}")
    kind, original, top, left = rng.random(), SIZE, 0, 0
    if style != "ink" and kind < CROPPED:
        original = rng.randrange(SIZE + 16, SIZE + 80)
        top, left = rng.randrange(original - SIZE + 1), rng.randrange(original - SIZE + 1)
    elif style != "ink" and kind < CROPPED + ENLARGED:
        original = rng.randrange(SIZE // 4, SIZE // 2)
    return Example(random_scene(seed), style, seed, original, top, left)


def examples(counts):
    """Examples for {style: how many}; no two share a seed, and none has one of the fine-tuning set's."""
    return [example(style, 100_000 * i + n) for i, (style, count) in enumerate(counts.items()) for n in range(count)]
