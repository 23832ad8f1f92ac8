"""The bytes of any picture -> upright RGB, in the colours that one sees.

Pillow's own convert("RGB") clips 16 bits to white, drops alpha, ignores EXIF, and takes the numbers of every colour
space for sRGB's.
"""

import contextlib
import functools
import io
import struct
import threading

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from data.common.errors import MachineError, UserError

# The formats that are decoded, whatever a file is called, and the suffixes that such files have. Pillow knows more,
# but some of them start a program (EPS), or decode before their size is known.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
SUFFIXES = {suffix for suffixes in FORMATS.values() for suffix in suffixes}
DECODER = f"Pillow {PIL.__version__}, to sRGB"  # part of a picture's key, because another one gives other pixels
DAMAGE = (  # what Pillow raises for damaged bytes, and for a picture above its limit of pixels
    Image.DecompressionBombError,
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AttributeError,
    struct.error,
)
MAX_BYTES = 2**31  # of a file
MAX_PIXELS = 2**28  # a larger picture is refused before it is decoded, because it would take more than 2 GiB
TWICE = {"WEBP", "AVIF"}  # their decoders hold a picture twice as often, so half as many pixels are the limit
LARGE = 2**25  # pixels; larger pictures are decoded one at a time
STRIP = 2**22  # pixels that are converted at a time, so that only the picture itself is in memory as a whole
SAME = 2  # of 255: colours that differ by no more look the same
_one_large = threading.Lock()


@contextlib.contextmanager
def without_pillows_limit():
    """In here MAX_PIXELS alone decides; Pillow's own limit warns at a third of it and refuses at two thirds.

    It is Pillow's global, so a command sets it once around all of its threads.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_rgb(data, name):
    """Decode to a PIL image in mode RGB, turned as its EXIF orientation says, with transparency laid over white.

    Colours under an ICC profile or a PNG's gamma are brought to sRGB. 16-bit and float images are scaled, not clipped:
    16 bits by 65535, floats from their own minimum to their maximum. An animation gives its first frame.
    Raises UserError naming `name`.
    """
    with _opened(data, name) as image:
        large = image.width * image.height > LARGE
        with _one_large if large else contextlib.nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            to_srgb = _colours(image)
            if image.mode == "RGB" and not to_srgb and "transparency" not in image.info:
                return image
            scale, rgb = _eight_bit(image), Image.new("RGB", image.size)
            for top, strip in _strips(image):
                rgb.paste(_over_white(scale(strip) if scale else strip, to_srgb or _as_it_is), (0, top))
            return rgb


def upright_size(data, name):
    """The (height, width) that read_rgb will give, read from the header alone."""
    with _opened(data, name) as image:
        # Pillow turns TIFF files itself, so their size is that of the turned picture already
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]


@contextlib.contextmanager
def _opened(data, name):
    try:
        with Image.open(io.BytesIO(_without_texts(data)), formats=list(FORMATS)) as image:
            most = MAX_PIXELS // (2 if image.format in TWICE else 1)
            if image.width * image.height > most:
                raise ValueError(f"{image.width} × {image.height} is more than {most:,} pixels")
            yield image
    except UnidentifiedImageError:  # its own words hold an address in memory, which differs each time
        known = ", ".join(FORMATS)
        raise UserError(f"{name}: not a picture that can be read (none of {known}); replace or remove it") from None
    except DAMAGE as error:
        raise UserError(f"{name}: not a picture that can be read ({error}); replace or remove it") from None
    except MemoryError:
        raise MachineError(f"{name}: more pixels than this machine has memory for; make it smaller") from None


SIGNATURE = b"\x89PNG\r\n\x1a\n"
TURNING = {b"XML:com.adobe.xmp", b"Raw profile type exif"}  # texts of a PNG in which its orientation may stand


def _without_texts(data):
    """A PNG without its texts, except those that may turn it. What is no PNG stays as it is.

    Some programs write a whole workflow there. Pillow refuses a text of more than 1 MiB, reads all of them, and takes
    one called "gamma" for the picture's gamma.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        keyword = data[at + 8 : at + 88].split(b"\0")[0] if kind in (b"tEXt", b"zTXt", b"iTXt") else None
        if keyword is None or keyword in TURNING:
            kept.append(memoryview(data)[at : at + 12 + length])
        at += 12 + length
    kept.append(data[at:])
    return b"".join(kept)


def _strips(image):
    """Yield (top, the picture's rows from there on), STRIP pixels at a time."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _eight_bit(image):
    """A function: strip of 16 bits or floats -> grey strip of 8 bits; None where the picture has 8 bits already."""
    if image.mode == "F":
        extremes = np.array([[f(_pixels(strip)) for f in (np.min, np.max)] for _, strip in _strips(image)])
        low, high = extremes[:, 0].min(), extremes[:, 1].max()
        if not np.isfinite([low, high]).all():
            raise ValueError("its pixels are not all finite numbers")
        return lambda strip: _grey((_pixels(strip) - low) / max(high - low, 1e-12))
    if image.mode.startswith("I"):
        return lambda strip: _grey(_pixels(strip) / 65535)
    return None


def _pixels(strip):
    return np.asarray(strip, np.float64)


def _grey(pixels):
    return Image.fromarray(np.round(pixels.clip(0, 1) * 255).astype(np.uint8))


def _over_white(strip, to_srgb):
    """8-bit strip of any mode -> RGB. Only what is opaque has a colour of its own to be brought to sRGB."""
    if strip.mode == "P" or "A" in strip.mode or "a" in strip.mode or "transparency" in strip.info:
        strip = strip.convert("RGBA")
        colour = to_srgb(strip.convert("RGB"))
        colour.putalpha(strip.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", strip.size, "white"), colour).convert("RGB")
    return to_srgb(strip)


def _as_it_is(strip):
    return strip.convert("RGB")


def _colours(image):
    """A function: strip without transparency -> RGB in sRGB; None where the picture's numbers are sRGB's already.

    A profile that is damaged or belongs to another kind of picture is passed over, as viewers do.
    """
    if image.mode == "F":
        return None
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    if profile:
        mode, transform = _transform(profile)
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        fits = {"RGB": image.mode != "CMYK", "L": grey, "CMYK": image.mode == "CMYK", None: False}[mode]
        return (lambda strip: transform.apply(strip.convert(mode))) if fits else None
    # PNG 1.2, section 10.5: a stored number is light ** gamma. 1 / 2.2 is how sRGB is written there.
    if gamma and "srgb" not in image.info and abs(2.2 * gamma - 1) > 0.05:
        table = [round(255 * _srgb((i / 255) ** (1 / gamma))) for i in range(256)]
        return lambda strip: strip.convert("RGB").point(table * 3)
    return None


def _srgb(light):
    """Light, 0 to 1 -> sRGB's number for it, 0 to 1 (IEC 61966-2-1)."""
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


@functools.lru_cache(maxsize=64)
def _transform(profile):
    """An ICC profile's bytes -> (the mode of pictures that it is for, littlecms's transform to sRGB).

    (None, None) where it is damaged, for no such mode, or so near to sRGB that nobody would see the difference.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip())
        if not mode:
            return None, None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, None
    if mode != "CMYK":
        levels = np.arange(0, 256, 15 if mode == "RGB" else 1, np.uint8)
        colours = np.stack(np.meshgrid(*[levels] * 3), axis=-1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
        there = np.asarray(transform.apply(Image.fromarray(colours)), int)
        if abs(there - (colours if mode == "RGB" else colours[..., None])).max() <= SAME:
            return None, None
    return mode, transform
