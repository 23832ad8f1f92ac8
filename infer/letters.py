"""Text of any script in pixels: each character in a font of this machine that has it, never an empty box."""

import functools
import math
import os
import re
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from data.common.errors import printable

_FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"),
}.get(sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"))
# The first that is there draws the most; the others what it lacks, plain ones before those of a style.
_FIRST = ("dejavusans", "notosansregular", "segoeui", "arialunicode", "arial", "helvetica", "liberationsansregular")
_STYLES = "bold|italic|oblique|light|thin|black|medium|extra|semi|condensed|narrow|mono|serif|math|symbol|emoji|emj"
_NO_FONT = ("lastresort",)  # it has a box for everything
_BITMAPS = (109, 160, 136, 128, 64)  # the one size of a font whose characters are pictures
_MISSING = "\U0010ffff"  # no character
_EMOJI = "\ufe0f"  # behind a character: in an emoji's colours
_JOINER, _TONES = "\u200d", "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"  # several characters are one emoji
_OPEN, _CLOSE = "\x02\x03"  # the brackets around a name, which no text has until all is named
_HEBREW_ARABIC = r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]+"


class Letters:
    """How text looks at a size in pixels. lacking: in words, what was asked for and no font has."""

    def __init__(self, size):
        self.size, self.lacking = size, []

    def legible(self, text):
        """The text on one line, with what no font has in plain letters where there are such, else named in brackets.

        Characters that have no shape of their own, such as controls and marks of direction, are left out.
        """
        out = ""
        for char in _with_shapes(text):
            plain = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c))
            belongs = char in (_EMOJI, _JOINER)  # to the character before it, as marks do
            if out.endswith(_CLOSE) and (belongs or unicodedata.category(char)[0] == "M"):
                continue
            if char == " " or belongs or _font(self.size, char):
                out += char
            elif all(_font(self.size, c) for c in plain):
                out += plain
            else:
                out += f"{_OPEN}{_in_words(char)}{_CLOSE}"
        out = re.sub(f"({_OPEN}[^{_CLOSE}]+{_CLOSE})( *\\1)+", r"\1", out)  # a sentence is not named letter by letter
        self.lacking = list(dict.fromkeys(self.lacking + re.findall(f"{_OPEN}([^{_CLOSE}]+)", out)))
        return out.replace(_OPEN, "[").replace(_CLOSE, "]")

    def width(self, text):
        """Pixels, of a text that legible() gave."""
        return sum(font.getlength(piece) * scale for font, scale, piece in self._pieces(text))

    def draw(self, image, x, baseline, text, colour):
        """Put a text that legible() gave into `image`, from x on, on that baseline."""
        for font, scale, piece in self._pieces(text):
            width = font.getlength(piece)
            if scale == 1:
                ImageDraw.Draw(image).text((x, baseline), piece, colour, font, anchor="ls", embedded_color=True)
            else:
                ascent, descent = font.getmetrics()
                tile = Image.new("RGBA", (math.ceil(width), ascent + descent))
                ImageDraw.Draw(tile).text((0, ascent), piece, colour, font, anchor="ls", embedded_color=True)
                small = tile.resize([max(1, round(side * scale)) for side in tile.size], Image.Resampling.LANCZOS)
                image.paste(small, (round(x), round(baseline - ascent * scale)), small)
            x += width * scale

    def _pieces(self, text):
        """-> [(font, scale, characters)]: neighbours in one font."""
        pieces = []
        for char, then in zip(text, f"{text[1:]} "):
            before = pieces[-1][0] if pieces else None
            if before and _needs_no_other(before, char):
                found = before
            else:
                found = _font(self.size, char, then == _EMOJI and unicodedata.category(char)[0] == "S")
            if found == before:
                pieces[-1][1] += char
            elif found:
                pieces.append([found, char])
        return [(font, scale, piece if _joins() else _turned(piece)) for (font, scale), piece in pieces]


def _with_shapes(text):
    """The characters of a text that are drawn, or say how others are."""
    for char in " ".join(printable(text).split()):
        has_none = unicodedata.category(char) in ("Cc", "Cf") or "\ufe00" <= char < _EMOJI or char == "\u20e3"
        if char in (_EMOJI, _JOINER, *_TONES):
            has_none = not _joins()
        if not has_none:
            yield char


def _needs_no_other(found, char):
    """Whether a character stays in the font of the one before it, as spaces, marks and most punctuation do."""
    if char in (_EMOJI, _JOINER, *_TONES):
        return True
    kind = unicodedata.category(char)
    return (kind[0] in "ZM" or kind in ("Pe", "Pf", "Po", "Pd")) and _has(found[0], char)


@functools.cache
def _joins():
    """Whether Pillow can join letters and emoji and knows what runs to the left; it needs two libraries for it."""
    return features.check("raqm") and features.check("fribidi")


def _turned(text):
    """The text as it is drawn from left to right, with Hebrew and Arabic turned round."""
    return re.sub(rf"{_HEBREW_ARABIC}(\s+{_HEBREW_ARABIC})*", lambda found: found[0][::-1], text)


def _in_words(char):
    """What a character is called when it cannot be drawn: its script, for a letter, or its own name.

    >>> _in_words("\\u0928"), _in_words("\\u4e2d"), _in_words("\\U0001f98a"), _in_words("\\ue000")
    ('Devanagari', 'CJK', 'fox face', 'U+E000')
    """
    name = unicodedata.name(char, "")
    if not name:
        return f"U+{ord(char):04X}"
    if unicodedata.category(char)[0] in "LMN":
        script = name.split()[0].split("-")[0]
        return script if script == "CJK" else script.title()
    return name.lower()


@functools.cache
def _font(size, char, as_emoji=False):
    """-> (font, scale) of the first font that has the character, None when none has it."""
    files = _files()
    if as_emoji or ord(char) >= 0x1F000:
        files = sorted(files, key=lambda path: not re.search("emoji|emj", path.stem.lower()))
    for found in (_opened(path, size) for path in (*files, None)):
        if found and _has(found[0], char):
            return found
    return None


@functools.lru_cache(10_000)
def _has(font, char):
    """Whether a font has a glyph for the character, and not what it draws for all that it lacks."""
    shape, missing = (font.getmask(c, mode="L") for c in (char, _MISSING))
    return shape.size != missing.size or bytes(shape) != bytes(missing)


@functools.cache
def _opened(path, size):
    """-> (font, scale), with a scale where the font has but another size; None when it is none. No path: Pillow's."""
    if path is None:
        return ImageFont.load_default(size), 1.0
    for there in (size, *_BITMAPS):
        try:
            font = ImageFont.truetype(path, there)
            font.getmask(_MISSING)
        except OSError:
            continue
        return font, size / there
    return None


@functools.cache
def _files():
    """Paths of all fonts in the folders where this system has them, the plainest first."""
    folders = [Path(os.path.expandvars(folder)).expanduser() for folder in _FOLDERS]
    paths = [p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf", ".ttc")]

    def order(path):
        name = re.sub(r"[^a-z0-9]", "", path.stem.lower())
        first = _FIRST.index(name) if name in _FIRST else len(_FIRST)
        return first, len(re.findall(_STYLES, name)), name

    return sorted((p for p in paths if not p.stem.lower().startswith(_NO_FONT)), key=order)
