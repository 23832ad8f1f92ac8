"""Which bucket a picture is trained in, how it gets there, and what SDXL is told about it.

A bucket is a (height, width) in pixels, as every size here.
"""

import math

import numpy as np
from PIL import Image

from data.common.errors import UserError

STEP = (
    64  # sides are multiples of it, because a latent is 8 pixels wide and the UNet halves latents twice; with room left
)
MAX_RATIO = 16  # of a picture's longer side to its shorter one; beyond it a crop shows a sliver and says nothing


def make_buckets(resolution, several):
    """The buckets of a run: the square of `resolution`, or with `several` all proportions up to 2:1, in steps of 64.

    None of them has a larger area than the square, as when SDXL was trained (Podell et al. 2023, section 2.3).
    """
    if not several:
        return [(resolution, resolution)]
    tall = {}  # the largest bucket of each proportion
    for width in range(STEP, resolution + 1, STEP):
        height = min(resolution**2 // width // STEP * STEP, 2 * width)
        if height >= width:
            tall[height / width] = (height, width)
    return sorted({*tall.values(), *((width, height) for height, width in tall.values())})


def nearest(size, buckets):
    """The index of the bucket whose proportions are nearest to those of `size`; of equally near ones, the largest."""
    ratio = math.log(size[0] / size[1])

    def distance(i):
        height, width = buckets[i]
        return abs(math.log(height / width) - ratio), -height * width

    return min(range(len(buckets)), key=distance)


def geometry(size, bucket, name):
    """How a picture of `size` covers the bucket with the least loss.

    -> (its size after resizing, (top, left) of the centre crop). Raises UserError naming `name` when it is a sliver.
    """
    height, width = size
    if max(size) > MAX_RATIO * min(size):
        raise UserError(f"{name}: {width} × {height} pixels is longer than {MAX_RATIO}:1; crop or remove it")
    scale = max(bucket[0] / height, bucket[1] / width)
    resized = max(bucket[0], round(height * scale)), max(bucket[1], round(width * scale))
    return resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


def resize_and_crop(image, bucket, name):
    """RGB picture -> its pixels in the bucket, uint8 (H, W, 3)."""
    resized, (top, left) = geometry(image.size[::-1], bucket, name)
    if image.size[::-1] != resized:
        image = image.resize(resized[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + bucket[1], top + bucket[0])))


def time_ids(size, bucket, name):
    """SDXL's size conditioning (Podell et al. 2023, section 2.2): six integers, (original size, crop top left, bucket).

    The crop is counted in the resized picture, as in SDXL's training. The original size must be true, because a model
    that is told 1024 for a 300-pixel file learns that blurred is how 1024 looks.
    -> (those of the picture, those of its mirror image)
    """
    resized, (top, left) = geometry(size, bucket, name)
    mirrored_left = resized[1] - bucket[1] - left
    return (*size, top, left, *bucket), (*size, top, mirrored_left, *bucket)
