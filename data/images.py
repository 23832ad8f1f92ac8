"""The bytes of any picture -> upright RGB.

Pillow's own convert("RGB") clips 16 bits to white, drops alpha and ignores EXIF.
"""

import contextlib
import io
import struct

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.common.safe import UserError

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
MAX_PIXELS = 2**28  # a larger picture is refused before it is decoded, because it may be a decompression bomb


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

    16-bit and float images are scaled, not clipped: 16 bits by 65535, floats from their own minimum to their maximum.
    An animation gives its first frame. Raises UserError naming `name`.
    """
    with _opened(data, name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            return Image.fromarray(_eight_bit(np.asarray(image, np.float64), image.mode)).convert("RGB")
        if image.mode == "P" or "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def upright_size(data, name):
    """The (height, width) that read_rgb will give, read from the header alone."""
    with _opened(data, name) as image:
        # Pillow turns TIFF files itself, so their size is that of the turned picture already
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]


@contextlib.contextmanager
def _opened(data, name):
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} × {image.height} is more than {MAX_PIXELS:,} pixels")
            yield image
    except UnidentifiedImageError:  # its own words hold an address in memory, which differs each time
        raise UserError(f"{name}: not a picture that can be read (no known format); replace or remove it") from None
    except DAMAGE as error:
        raise UserError(f"{name}: not a picture that can be read ({error}); replace or remove it") from None


def _eight_bit(pixels, mode):
    if not np.isfinite(pixels).all():
        raise ValueError("its pixels are not all finite numbers")
    if mode == "F":
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / max(high - low, 1e-12)
    else:
        pixels = pixels / 65535
    return np.round(pixels.clip(0, 1) * 255).astype(np.uint8)
