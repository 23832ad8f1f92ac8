"""Sizes: what is cut away, what is kept, and what SDXL is told."""

import random

import numpy as np
import pytest
from PIL import Image

from data.buckets import geometry, nearest, resize_and_crop, sizes, time_ids
from data.common.safe import UserError


def some_sizes():
    r = random.Random(0)
    for _ in range(300):
        height = r.randint(1, 3000)
        yield height, min(3000, max(1, round(height * r.uniform(1 / 15, 15))))


def test_the_picture_covers_the_target_and_loses_least():
    """One side fits exactly, the other hangs over evenly, and the proportions stay."""
    for target in ((1024, 1024), (64, 64), (832, 1216)):
        for size in some_sizes():
            if max(size) > 16 * min(size):
                continue
            resized, (top, left) = geometry(size, target, "x")
            spare = resized[0] - target[0], resized[1] - target[1]
            assert min(spare) == 0
            assert (top, left) == (spare[0] // 2, spare[1] // 2)
            scale = max(target[0] / size[0], target[1] / size[1])
            assert abs(resized[0] - size[0] * scale) <= 0.5 and abs(resized[1] - size[1] * scale) <= 0.5


def test_a_sliver_is_refused_by_name():
    for size in ((65500, 1), (1, 65500), (17, 1), (100, 1601)):
        with pytest.raises(UserError, match=r"row 7.*16:1"):
            geometry(size, (1024, 1024), "row 7")
    assert geometry((1, 16), (64, 64), "x") == ((64, 1024), (0, 480))


def test_pixels_are_the_middle_of_the_picture():
    """Left third red, middle green, right blue: a square from the middle is green all over."""
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, :100, 0] = wide[:, 100:200, 1] = wide[:, 200:, 2] = 255
    for picture in (wide, wide.transpose(1, 0, 2)):
        pixels = resize_and_crop(Image.fromarray(picture), (64, 64), "x")
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        assert (pixels[4:-4, 4:-4] == (0, 255, 0)).all()


def test_a_picture_of_the_target_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    assert np.array_equal(resize_and_crop(Image.fromarray(pixels), (64, 128), "x"), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (63, 65), (64, 65), (2000, 130)])
def test_any_size_gives_the_target_size(size):
    image = Image.new("RGB", size[::-1], (10, 200, 30))
    pixels = resize_and_crop(image, (64, 128), "x")
    assert pixels.shape == (64, 128, 3) and (pixels == (10, 200, 30)).all()


def test_time_ids_are_original_size_crop_and_target_height_first():
    """Width and height swapped, or the crop counted in the original's pixels, would condition on a falsehood."""
    for size, target, wanted in (
        ((300, 600), (1024, 1024), (300, 600, 0, 512, 1024, 1024)),
        ((600, 300), (1024, 512), (600, 300, 0, 0, 1024, 512)),
        ((3000, 1024), (1024, 1024), (3000, 1024, 988, 0, 1024, 1024)),
    ):
        assert time_ids(size, target, "x") == (wanted, wanted)


def test_the_mirror_image_has_its_own_crop():
    """An odd pixel to spare lies right of the crop, so left of it in the mirror image."""
    plain, mirrored = time_ids((64, 67), (64, 64), "x")
    assert plain == (64, 67, 0, 1, 64, 64) and mirrored == (64, 67, 0, 2, 64, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 67, 3), np.uint8)
    crop = resize_and_crop(Image.fromarray(pixels), (64, 64), "x")
    assert np.array_equal(crop[:, ::-1], pixels[:, ::-1][:, mirrored[3] : mirrored[3] + 64])


@pytest.mark.parametrize("resolution", [64, 128, 512, 768, 1024])
def test_shapes_are_within_the_area_the_steps_and_two_to_one(resolution):
    shapes = sizes(resolution, several=True)
    assert len(set(shapes)) == len(shapes) and (resolution, resolution) in shapes
    assert sizes(resolution, several=False) == [(resolution, resolution)]
    for h, w in shapes:
        assert h % 64 == w % 64 == 0 and h * w <= resolution**2 and max(h, w) <= 2 * min(h, w) and (w, h) in shapes
    if resolution == 1024:  # some of those that SDXL was trained at
        assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344)} <= set(shapes)


def test_the_shape_is_the_one_that_loses_least():
    """By brute force: no other shape keeps more of the picture, but for those that are as good."""
    shapes = sizes(1024, several=True)

    def kept(size, shape):
        scale = max(shape[0] / size[0], shape[1] / size[1])
        return shape[0] * shape[1] / (size[0] * size[1] * scale**2)

    for size in some_sizes():
        chosen = shapes[nearest(size, shapes)]
        assert kept(size, chosen) >= max(kept(size, s) for s in shapes) - 1e-9
