"""Any picture -> upright RGB, or a refusal that names it."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from data.common.safe import UserError
from data.images import read_rgb, upright_size, without_pillows_limit


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data):
    image = read_rgb(data, "row 3")
    assert image.mode == "RGB" and image.size[::-1] == upright_size(data, "row 3")
    return np.asarray(image)


UPRIGHT = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
STORED = {  # EXIF orientation -> how a camera that was held so stores UPRIGHT
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_to_pixels_and_size(orientation, kind):
    """A sideways picture teaches sideways people, and a size that is not turned with it tells SDXL a falsehood."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if kind == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), kind, exif=exif, **options)
    assert np.array_equal(pixels(data), UPRIGHT)


def test_cmyk():
    assert (pixels(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)).all()
    red = pixels(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).astype(int)
    assert (abs(red - (255, 0, 0)) < 12).all()


def test_transparency_is_laid_over_white():
    """If it were dropped, the colour that happens to stand behind it would appear: mostly black."""
    assert (pixels(encoded(Image.new("RGBA", (2, 2), (200, 0, 0, 0)))) == 255).all()
    half = pixels(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))).astype(int)
    assert (abs(half - (255, 127, 127)) <= 1).all()
    assert (pixels(encoded(Image.new("LA", (2, 2), (0, 0)))) == 255).all()
    assert (abs(pixels(encoded(Image.new("LA", (2, 2), (0, 64)))).astype(int) - 191) <= 1).all()
    assert (pixels(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))) == 255).all()
    assert (pixels(encoded(Image.new("L", (2, 2), 7), transparency=7)) == 255).all()


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(encoded(image, transparency=0)).tolist() == [[[255] * 3, [200, 100, 50]]]
    assert pixels(encoded(image, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]


def test_sixteen_bits_are_scaled_not_clipped():
    """Pillow's convert("RGB") makes everything above 255 of 65535 white."""
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_scaled_by_their_own_range():
    for values, wanted in (([[-2.0, 0.0, 2.0]], [0, 128, 255]), ([[5.0, 5.0, 5.0]], [0, 0, 0])):
        assert pixels(encoded(Image.fromarray(np.array(values, np.float32)), "TIFF"))[0, :, 0].tolist() == wanted


def test_one_bit_and_grey():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[0] * 3, [255] * 3]]
    assert pixels(encoded(Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = dict(lossless=True) if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all()


def test_one_pixel():
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def png_of_size(width, height):
    """A PNG whose header promises width × height and whose data are a few bytes: a decompression bomb."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


WHOLE = encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
BROKEN = {
    "empty": b"",
    "html": b"<!doctype html><html><body>404</body></html>",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "header only": WHOLE[:40],
    "text": b"a caption",
    "bomb": png_of_size(50_000, 50_000),
    "small bomb": png_of_size(17_000, 17_000),
    "NaN": encoded(Image.fromarray(np.array([[0, np.nan, 1]], np.float32)), "TIFF"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named(case):
    with pytest.raises(UserError, match="row 3.*replace or remove"):
        read_rgb(BROKEN[case], "row 3")


def test_a_bomb_is_refused_by_its_header():
    """precompute asks for the size of every picture before it decodes one."""
    for case in ("bomb", "small bomb"):
        with without_pillows_limit(), pytest.raises(UserError, match="row 3.* is more than 268,435,456 pixels"):
            upright_size(BROKEN[case], "row 3")


def test_pillows_own_limit_is_off_inside_and_back_behind():
    """A picture that Pillow refuses and that is below our limit."""
    limit, data = Image.MAX_IMAGE_PIXELS, encoded(Image.new("1", (14_000, 14_000)), "BMP")
    with without_pillows_limit():
        assert upright_size(data, "row 3") == (14_000, 14_000)
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match="row 3.*pixels"):
        upright_size(data, "row 3")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_give_a_picture_or_a_refusal():
    """Never another exception: one bad file of ten thousand must be named, not end in a traceback."""
    r = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])):
        whole = encoded(image, kind, **({} if kind in ("GIF", "BMP") else dict(exif=exif)))
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(r.randint(1, 4)):
                data[r.randrange(len(data) if r.random() < 0.5 else min(len(data), 120))] = r.randrange(256)
            if r.random() < 0.3:
                data = data[: r.randrange(len(data))]
            sizes = set()
            for read in (upright_size, lambda *args: read_rgb(*args).size[::-1]):
                with contextlib.suppress(UserError), without_pillows_limit():
                    sizes.add(read(bytes(data), "row 3"))
            # Its bucket and time ids are chosen by upright_size, and its pixels come from read_rgb.
            assert len(sizes) <= 1, sizes


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert upright_size(data, "x") == (20, 40) == read_rgb(data, "x").size[::-1]
