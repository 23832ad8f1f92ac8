"""How long a training is: --num_train_epochs becomes steps once, here, and everything else counts steps."""

from dataclasses import replace

import numpy as np

from data.cache import Cache
from data.common.errors import UserError
from data.common.flags import ENDS, MOST
from data.common.words import many


def in_steps(settings, folder, argv):
    """The settings with max_train_steps, which those with num_train_epochs lack. The sum is printed.

    folder: of the run's cache. argv: the command line; where it has both flags, the sum says which one counts.
    """
    steps, epochs = (f"--{name}" for name in ENDS)
    both = {steps, epochs} <= {word.split("=")[0] for word in argv}
    if not settings.num_train_epochs:
        if both:
            print(f"{many(settings.max_train_steps, 'step')}: {steps} counts, because it comes after {epochs}")
        return settings
    cache, images_per_step = Cache(folder), settings.gradient_accumulation_steps * settings.train_batch_size
    whole, rest = divmod(cache.epoch * settings.num_train_epochs, images_per_step)
    found = whole + (rest > 0)
    if found > MOST:
        raise UserError(f"{epochs} {settings.num_train_epochs}: {found:,} steps; at most {MOST:,} are possible")
    words = f"{images(cache)} × {many(settings.num_train_epochs, 'epoch')} / {images_per_step} = {many(found, 'step')}"
    words += ", rounded up" if rest else ""
    print(words + (f"; {epochs} counts, because it comes after {steps}" if both else ""))
    return replace(settings, max_train_steps=found)


def images(cache):
    """An epoch's images: "64 images"; where each comes twice "64 images × 2"; else "64 images, repeated to 100,"."""
    repeats = np.unique(cache.index["repeats"][~cache.index["held_out"]])
    words = many(len(cache), "image")
    if len(repeats) > 1:
        return f"{words}, repeated to {cache.epoch:,},"
    return words if repeats[0] == 1 else f"{words} × {repeats[0]}"
