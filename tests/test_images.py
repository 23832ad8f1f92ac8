"""Any picture -> upright RGB, or a refusal that names it."""

import contextlib
import io
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, icc_profile
from PIL import Image, ImageCms, features

from data import images
from data.common.errors import MachineError, UserError
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


# ---- Colours

P3 = icc_profile("P3", (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# sRGB as some programs write it, small: its curve in 26 points, between which it is a bit off
CURVE = [i / 25 / 12.92 if i < 2 else ((i / 25 + 0.055) / 1.055) ** 2.4 for i in range(26)]
OTHER_SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142))
OTHER_SRGB = icc_profile("sRGB", *OTHER_SRGB, [round(65535 * value) for value in CURVE])
COLOURS = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)


def cmyk_profile():
    """An ICC profile of inks that are not Pillow's: all of them are grey, full cyan and black of lightness 60 each.

    It is a table of 2 × 2 × 2 × 2 corners from CMYK to Lab.
    """
    ramp = bytes(range(256))
    corners = b"".join(bytes([255 - 102 * (c + k), 128, 128]) for c in (0, 1) for _ in range(4) for k in (0, 1))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners + ramp * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {
        b"A2B0": table,
        b"A2B1": table,
        b"wtpt": white,
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78),
    }
    tags |= {b"cprt": b"text\0\0\0\0none\0"}
    start, index, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        index += tag + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    return (head + struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp").ljust(128, b"\0") + index + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_a_profile_is_applied_in_every_format(kind):
    """Without it Display P3's red is learned as a duller one, and nothing says so."""
    options = {} if kind in ("PNG", "TIFF") else dict(quality=100, **(dict(lossless=True) if kind == "WEBP" else {}))
    found = pixels(encoded(Image.new("RGB", (16, 16), (200, 60, 40)), kind, icc_profile=P3, **options)).astype(int)
    wide, srgb = ImageCms.ImageCmsProfile(io.BytesIO(P3)), ImageCms.createProfile("sRGB")
    seen = ImageCms.profileToProfile(Image.new("RGB", (1, 1), (200, 60, 40)), wide, srgb, renderingIntent=1)
    assert abs(found - seen.getpixel((0, 0))).max() <= (0 if kind in ("PNG", "TIFF") else 4)
    assert seen.getpixel((0, 0))[0] > 210


def test_an_srgb_profile_changes_nothing():
    """Most pictures carry one, and the transform would round their numbers."""
    for profile in (SRGB, OTHER_SRGB):
        for mode in ("RGB", "RGBA", "L"):
            image = Image.fromarray(COLOURS).convert(mode)
            assert np.array_equal(pixels(encoded(image, icc_profile=profile)), pixels(encoded(image, icc_profile=None)))


def test_transparent_and_palette_pictures_keep_their_alpha_under_a_profile():
    """White shows through as white: the colour is brought to sRGB, and then laid over it."""
    image = Image.fromarray(COLOURS)
    seen = pixels(encoded(image, icc_profile=P3)).astype(float)
    image.putalpha(128)
    found = pixels(encoded(image, icc_profile=P3))
    assert abs(found - (seen * 128 + 255 * 127) / 255).max() <= 1
    few = Image.fromarray(COLOURS).quantize(4)
    shown = pixels(encoded(few.convert("RGB"), icc_profile=P3))
    assert np.array_equal(pixels(encoded(few, icc_profile=P3)), shown)


def test_cmyk_and_grey_with_a_profile():
    """As the profile says, and not as Pillow mixes ink without one. A profile of another kind is passed over."""
    inks = Image.new("CMYK", (4, 4), (255, 255, 0, 0))
    for kind in ("TIFF", "JPEG"):
        options = dict(quality=100) if kind == "JPEG" else {}
        found = pixels(encoded(inks, kind, icc_profile=cmyk_profile(), **options)).astype(int)
        assert np.ptp(found) <= 3 and abs(found - 143).max() < 8  # L* = 60
    assert (pixels(encoded(inks, "TIFF", icc_profile=P3)) == pixels(encoded(inks, "TIFF"))).all()
    grey = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8)[None])
    dark = P3.replace(b"RGB ", b"GRAY").replace(b"rTRC", b"kTRC")  # gamma 2.2, next to sRGB's curve lower in the darks
    found, plain = pixels(encoded(grey, icc_profile=dark)), pixels(encoded(grey))
    assert (found[..., 0] == found[..., 2]).all() and 2 < abs(found.astype(int) - plain).max() < 12
    assert (pixels(encoded(grey, icc_profile=cmyk_profile())) == plain).all()


@pytest.mark.parametrize("profile", [b"", b"x", P3[:200], P3[:128] + b"\xff" * 400, SRGB[:40] + bytes(3000)])
def test_a_damaged_profile_is_passed_over(profile):
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOURS), icc_profile=profile)), COLOURS)


def png_with(*chunks, image=None):
    """A PNG with chunks of one's own, (kind, body), behind its header."""
    data = encoded(image or Image.fromarray(COLOURS))
    made = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return data[:33] + b"".join(made) + data[33:]


def test_a_pngs_gamma_is_applied():
    """A stored number is light to the power of gAMA; 1 / 2.2 is sRGB's own, and an sRGB chunk outweighs it."""

    def gamma(value):
        return b"gAMA", struct.pack(">I", round(100_000 * value))

    for chunks in ([gamma(1 / 2.2)], [gamma(1), (b"sRGB", b"\0")], [gamma(0)]):
        assert np.array_equal(pixels(png_with(*chunks)), COLOURS)
    light = np.array([[0, 1, 55, 128, 255]], np.uint8)  # 55 / 255 is the light that sRGB writes as 128
    found = pixels(png_with(gamma(1), image=Image.fromarray(light)))[0, :, 0].tolist()
    assert found == [0, 13, 128, 188, 255]


# ---- Texts, formats, memory


def itxt(keyword, text):
    return b"iTXt", keyword + b"\0\0\0\0\0" + text


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"workflow\0" + b"x" * 3_000_000),
        (b"zTXt", b"workflow\0\0" + zlib.compress(bytes(200_000_000))),
        itxt(b"prompt", b"x" * 3_000_000),
        (b"tEXt", b"icc_profile\0x"),
        (b"tEXt", b"gamma\0" + b"1"),
        (b"tEXt", b"transparency\0x"),
    ],
)
def test_a_pngs_texts_are_not_read(chunk):
    """Pillow refuses megabytes of a workflow, and takes a text that is called "gamma" for the picture's gamma."""
    assert np.array_equal(pixels(png_with(chunk)), COLOURS)


def test_a_text_that_turns_a_png_is_read():
    xmp = itxt(b"XML:com.adobe.xmp", b'<x tiff:Orientation="6"/>')
    assert np.array_equal(pixels(png_with(xmp)), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "ICNS", "DDS", "PDF", "IM"])
def test_other_formats_are_not_decoded_whatever_their_name(kind):
    """EPS would start Ghostscript."""
    data = encoded(Image.new("RGB", (64, 64)), kind)
    for read in (read_rgb, upright_size):
        with pytest.raises(UserError, match=r"^a\.png: not a picture that can be read \(none of PNG, JPEG"):
            read(data, "a.png")


MODES = [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"), ("I;16", "PNG")]


@pytest.mark.parametrize("mode, kind", [*MODES, ("F", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("I;16B", "TIFF")])
def test_strips_give_what_the_whole_gives(mode, kind, monkeypatch):
    """Only the picture itself is in memory as a whole, whatever it is converted from."""
    noise = np.random.default_rng(2)
    if mode == "F":
        image = Image.fromarray(noise.random((40, 30), np.float32))
    elif mode.startswith("I"):
        image = Image.fromarray(noise.integers(0, 65536, (40, 30), np.uint16))
    else:
        image = Image.fromarray(noise.integers(0, 256, (40, 30, 3), np.uint8))
        image = Image.merge("LAB", image.split()) if mode == "LAB" else image.convert(mode)
        if "A" in mode and mode != "LAB":
            image.putalpha(Image.fromarray(noise.integers(0, 256, (40, 30), np.uint8)))
    data = encoded(image, kind)
    whole = pixels(data)
    monkeypatch.setattr(images, "STRIP", 100)
    assert np.array_equal(pixels(data), whole)


def test_a_nan_in_any_strip_is_found(monkeypatch):
    monkeypatch.setattr(images, "STRIP", 4)
    for at in range(12):
        values = np.ones((3, 4), np.float32)
        values.flat[at] = np.nan
        with pytest.raises(UserError, match="row 3: .*not all finite"):
            read_rgb(encoded(Image.fromarray(values), "TIFF"), "row 3")


def test_formats_whose_decoders_hold_a_picture_twice_have_half_the_limit(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    for kind, most in (("PNG", 1000), ("WEBP", 500), ("AVIF", 500)):
        assert upright_size(encoded(Image.new("RGB", (20, most // 20)), kind), "x") == (most // 20, 20)
        with pytest.raises(UserError, match=rf"^x: .*\(20 × {most // 20 + 1} is more than {most:,} pixels"):
            upright_size(encoded(Image.new("RGB", (20, most // 20 + 1)), kind), "x")


def test_a_picture_that_the_memory_cannot_hold_is_named(monkeypatch):
    monkeypatch.setattr(Image.Image, "crop", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MachineError, match="^x: more pixels than this machine has memory for"):
        read_rgb(encoded(Image.new("L", (8, 8))), "x")


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    """With a worker on each of 32 cores, 32 pictures of 200 million pixels would be in memory at once."""
    at_once, most, seen = [], [], threading.Lock()
    eight_bit = images._eight_bit

    def slowly(image):
        with seen:
            at_once.append(image)
            most.append(len(at_once))
        time.sleep(0.02)
        with seen:
            at_once.pop()
        return eight_bit(image)

    monkeypatch.setattr(images, "_eight_bit", slowly)
    data = encoded(Image.new("L", (8, 8)))
    for limit, alone in ((100, False), (50, True)):
        monkeypatch.setattr(images, "LARGE", limit)
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: read_rgb(data, "x"), range(8)))
        assert (max(most) == 1) == alone


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "I;16", "RGBA", "F"])
def test_one_picture_takes_no_more_than_a_few_times_its_pixels(mode, tmp_path):
    """16 bits and floats were converted as a whole, in 8 bytes a number, several times over."""
    side, kind = 9000, "TIFF" if mode == "F" else "PNG"
    image = Image.new(mode, (side, side))
    image.save(tmp_path / "x", kind, **({} if kind == "TIFF" else dict(compress_level=1)))
    code = (
        "import sys, resource; from pathlib import Path; from data.images import read_rgb\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "data = Path(sys.argv[1]).read_bytes(); before = peak(); read_rgb(data, 'x'); print(peak() - before)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "x")]
    taken = int(subprocess.run(argv, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    assert taken < 9 * side**2 + 2**28  # the picture, at most 4 bytes a pixel, and its RGB
