"""Buckets: what is cut away, what is kept, and what SDXL is told."""

import random

import numpy as np
import pytest
from PIL import Image

from data.buckets import geometry, make_buckets, nearest, resize_and_crop, time_ids
from data.common.errors import UserError


def some_sizes():
    r = random.Random(0)
    for _ in range(300):
        height = r.randint(1, 3000)
        yield height, min(3000, max(1, round(height * r.uniform(1 / 15, 15))))


def test_the_picture_covers_the_bucket_and_loses_least():
    """One side fits exactly, the other hangs over evenly, and the proportions stay."""
    for bucket in ((1024, 1024), (64, 64), (832, 1216)):
        for size in some_sizes():
            if max(size) > 16 * min(size):
                continue
            resized, (top, left) = geometry(size, bucket, "x")
            spare = resized[0] - bucket[0], resized[1] - bucket[1]
            assert min(spare) == 0
            assert (top, left) == (spare[0] // 2, spare[1] // 2)
            scale = max(bucket[0] / size[0], bucket[1] / size[1])
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


def test_a_picture_of_the_buckets_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    assert np.array_equal(resize_and_crop(Image.fromarray(pixels), (64, 128), "x"), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (63, 65), (64, 65), (2000, 130)])
def test_any_size_gives_the_buckets_size(size):
    image = Image.new("RGB", size[::-1], (10, 200, 30))
    pixels = resize_and_crop(image, (64, 128), "x")
    assert pixels.shape == (64, 128, 3) and (pixels == (10, 200, 30)).all()


def test_time_ids_are_original_size_crop_and_bucket_height_first():
    """Width and height swapped, or the crop counted in the original's pixels, would condition on a falsehood."""
    for size, bucket, wanted in (
        ((300, 600), (1024, 1024), (300, 600, 0, 512, 1024, 1024)),
        ((600, 300), (1024, 512), (600, 300, 0, 0, 1024, 512)),
        ((3000, 1024), (1024, 1024), (3000, 1024, 988, 0, 1024, 1024)),
    ):
        assert time_ids(size, bucket, "x") == (wanted, wanted)


def test_the_mirror_image_has_its_own_crop():
    """An odd pixel to spare lies right of the crop, so left of it in the mirror image."""
    plain, mirrored = time_ids((64, 67), (64, 64), "x")
    assert plain == (64, 67, 0, 1, 64, 64) and mirrored == (64, 67, 0, 2, 64, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 67, 3), np.uint8)
    crop = resize_and_crop(Image.fromarray(pixels), (64, 64), "x")
    assert np.array_equal(crop[:, ::-1], pixels[:, ::-1][:, mirrored[3] : mirrored[3] + 64])


@pytest.mark.parametrize("resolution", [64, 128, 512, 768, 1024])
def test_buckets_are_within_the_area_the_steps_and_two_to_one(resolution):
    buckets = make_buckets(resolution, several=True)
    assert len(set(buckets)) == len(buckets) and (resolution, resolution) in buckets
    assert make_buckets(resolution, several=False) == [(resolution, resolution)]
    for h, w in buckets:
        assert h % 64 == w % 64 == 0 and h * w <= resolution**2 and max(h, w) <= 2 * min(h, w) and (w, h) in buckets
    if resolution == 1024:  # some of those that SDXL was trained at
        assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344)} <= set(buckets)


def test_the_bucket_is_the_one_that_loses_least():
    """By brute force: no other bucket keeps more of the picture, but for those that are as good."""
    buckets = make_buckets(1024, several=True)

    def kept(size, bucket):
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        return bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)

    for size in some_sizes():
        chosen = buckets[nearest(size, buckets)]
        assert kept(size, chosen) >= max(kept(size, bucket) for bucket in buckets) - 1e-9


def test_of_equally_near_buckets_the_largest_is_taken():
    """A square one of a quarter of the area would throw three quarters of the pixels away."""
    assert nearest((100, 100), [(64, 64), (128, 128), (64, 128)]) == 1
