"""Which size a picture is trained at, how it gets there, and what SDXL is told about it. Sizes are (height, width), pixels."""

import math

import numpy as np
from PIL import Image

from data.common.safe import UserError

STEP = 64  # sides are multiples of it: 8 pixels a latent, and the UNet halves latents twice, with room to spare
MAX_RATIO = 16  # of a picture's sides: beyond it a crop shows a sliver and says nothing


def sizes(resolution, several):
    """The (height, width) that pictures are trained at: the square of `resolution`, or all shapes of no larger an area,
    sides in steps of 64 and at most 2:1, as SDXL was trained (Podell et al. 2023, section 2.3)."""
    if not several:
        return [(resolution, resolution)]
    tall = {}  # the largest of each proportion
    for width in range(STEP, resolution + 1, STEP):
        height = min(resolution**2 // width // STEP * STEP, 2 * width)
        if height >= width:
            tall[height / width] = (height, width)
    return sorted({*tall.values(), *((w, h) for h, w in tall.values())})


def nearest(size, choices):
    """Number of the choice whose proportions are nearest to those of `size`, the larger one of equals."""
    ratio = math.log(size[0] / size[1])
    return min(
        range(len(choices)),
        key=lambda i: (abs(math.log(choices[i][0] / choices[i][1]) - ratio), -choices[i][0] * choices[i][1]),
    )


def geometry(size, target, name):
    """How a picture of `size` covers `target` with the least loss -> (size after resizing, (top, left) of the centre crop).

    Raises UserError naming `name` when it is a sliver.
    """
    height, width = size
    if max(size) > MAX_RATIO * min(size):
        raise UserError(f"{name}: {width} × {height} pixels is longer than {MAX_RATIO}:1; crop or remove it")
    scale = max(target[0] / height, target[1] / width)
    resized = max(target[0], round(height * scale)), max(target[1], round(width * scale))
    return resized, ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)


def resize_and_crop(image, target, name):
    """RGB picture -> pixels uint8 (H, W, 3) of size `target`."""
    resized, (top, left) = geometry(image.size[::-1], target, name)
    if image.size[::-1] != resized:
        image = image.resize(resized[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + target[1], top + target[0])))


def time_ids(size, target, name):
    """SDXL's size conditioning (Podell et al. 2023, section 2.2): six integers, (original size, crop top left, target size).

    The crop offset counts in the resized picture, as in SDXL's training. True values matter: told 1024 for a 300-pixel
    file, the model learns that blurred is how 1024 looks. -> (of the picture, of its mirror image)
    """
    resized, (top, left) = geometry(size, target, name)
    mirrored_left = resized[1] - target[1] - left
    return (*size, top, left, *target), (*size, top, mirrored_left, *target)
