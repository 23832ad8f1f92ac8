"""The picture of all pictures: each at its place, and no letter an empty box."""

from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from infer import letters
from infer.grid import LINES, TEXT, _wrap, grid
from infer.letters import Letters


@pytest.fixture
def bare():
    """A machine without fonts, where there are only Pillow's own letters."""
    caches = (letters._files, letters._font)
    for cache in caches:
        cache.cache_clear()
    with mock.patch.object(letters, "_FOLDERS", ()):
        yield Letters(TEXT)
    for cache in caches:
        cache.cache_clear()


def font_with(char):
    """Skip the test, visibly, where no font has a character that it is about."""
    if not letters._font(TEXT, char):
        pytest.skip(f"no font of this machine has {char}")
    return Letters(TEXT)


def drawn(text, of):
    """Pixels of a text, black on white."""
    image = Image.new("RGB", (600, 40), "white")
    of.draw(image, 4, 28, of.legible(text), "black")
    return np.asarray(image)


def solid(path, colour):
    Image.new("RGB", (64, 64), colour).save(path)
    return path


def numbered(pixels):
    """(..., 3) -> (...): one number for each colour."""
    return np.asarray(pixels) @ [2**16, 2**8, 1]


def places(found, colour):
    """-> (top, left) of a picture of one colour. It must be there whole."""
    ys, xs = np.where(found == numbered(colour))
    assert len(ys) and len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
    return ys.min(), xs.min()


def test_every_picture_is_at_its_place(tmp_path):
    """Rows are below each other, prompts beside each other; nine wrap in two even blocks, a group begins its own."""
    rows = []
    for y, label in enumerate(["base", "step 100", "a long name of a file, " * 4]):
        colours = [(200, 20 * i, 60 * y) for i in range(11)]
        rows.append((label, [solid(tmp_path / f"{y}_{i}.png", c) for i, c in enumerate(colours)]))
    prompts, unrelated = [f"a long prompt about number {i} " * 3 for i in range(9)], ["a dog", "a car"]
    found = numbered(grid(rows, [("prompts", prompts), ("without", unrelated)]))
    at = [[places(found, (200, 20 * i, 60 * y)) for i in range(11)] for y in range(3)]
    for row in at:
        assert [left for _, left in row] == [row[i % 5 if i < 9 else i - 9][1] for i in range(11)]
        assert len({top for top, _ in row}) == 3 and row[0][0] < row[5][0] < row[9][0]
    for i in range(11):
        assert at[0][i][0] < at[1][i][0] < at[2][i][0] and len({row[i][1] for row in at}) == 1
    assert at[2][0][0] < at[0][5][0] and at[2][5][0] < at[0][9][0]  # a block ends before the next begins


def test_two_small_groups_are_beside_each_other_apart(tmp_path):
    """What changes without the concept is seen next to what changes with it."""
    rows = [(str(y), [solid(tmp_path / f"{y}_{i}.png", (200, 20 * i, 60 * y)) for i in range(5)]) for y in range(3)]
    found = numbered(grid(rows, [("prompts", ["a"] * 3), ("a heading of several lines " * 4, ["b"] * 2)]))
    for y in range(3):
        tops, lefts = zip(*(places(found, (200, 20 * i, 60 * y)) for i in range(5)))
        apart = np.diff(lefts)
        assert len(set(tops)) == 1 and apart[0] == apart[1] == apart[3] < apart[2]


@pytest.mark.slow
def test_a_great_many_pictures_are_shown_smaller(tmp_path):
    path = solid(tmp_path / "x.png", (1, 2, 3))
    assert grid([("a", [path] * 4)] * 2, [(None, ["x"] * 4)]).width > 4 * 256
    large = grid([(str(i), [path] * 8) for i in range(70)], [(None, ["x"] * 8)])
    assert large.width < 9 * 192 and large.height < 70 * 200


@pytest.mark.parametrize("text", ["x" * 300, "a " + "Donaudampfschifffahrt" * 5 + " b", "one two three " * 20])
def test_no_line_is_wider_than_its_cell_and_no_letter_is_lost(text):
    of = Letters(TEXT)
    lines = _wrap(text, of, 256)
    assert all(0 < of.width(line) <= 256 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_text_without_end_is_cut_and_says_so():
    for text in ("word " * 10_000, "x" * 10**6):
        lines = _wrap(text, Letters(TEXT), 256)
        assert len(lines) == LINES and lines[-1].endswith("…") and Letters(TEXT).width(lines[-1]) <= 256


# ---- Letters


def test_what_has_no_shape_is_left_out():
    """Line ends, controls, marks of direction, half a surrogate pair: a terminal's or a web page's, not a picture's."""
    odd = "two\nlines\t<lora:x:1>\u202e\u200f\u200b\x07\x1b[31m \ud83d end\u00ad"
    assert Letters(TEXT).legible(odd) == "two lines <lora:x:1>[31m ? end"


@pytest.mark.parametrize("char", "中赤한Жאم")
def test_a_character_comes_from_a_font_that_has_it(char):
    """Parity with that font itself, asked for by its file; the first font's own would be a box."""
    of = font_with(char)
    font, scale = letters._font(TEXT, char)
    box = font.getmask("\U0010ffff")
    assert scale == 1 and bytes(font.getmask(char)) != bytes(box) and of.lacking == []
    image = Image.new("RGB", (600, 40), "white")
    ImageDraw.Draw(image).text((4, 28), char, "black", ImageFont.truetype(font.path, TEXT), anchor="ls")
    assert np.array_equal(drawn(char, of), np.asarray(image)) and of.legible(char) == char


def test_letters_of_two_scripts_stand_beside_each_other():
    """A text of two fonts is as wide as both, and the second begins where the first ends."""
    of = font_with("中")
    assert of.width("fox 中") == pytest.approx(of.width("fox ") + of.width("中"))
    left = drawn("fox ", of)[:, : 4 + int(of.width("fox "))]
    assert np.array_equal(drawn("fox 中", of)[:, : left.shape[1]], left)


def test_emoji_are_small_and_in_colour():
    """Their font has one size, of 109 pixels."""
    of = font_with("🦊")
    found = drawn("🦊", of).astype(int)
    ys, xs = np.where((found != 255).any(-1))
    assert 0.8 * TEXT < np.ptp(ys) < 1.6 * TEXT and 0.8 * TEXT < np.ptp(xs) < 1.8 * TEXT
    assert (found.max(-1) - found.min(-1)).max() > 80  # of which a font's grey has nothing
    assert of.width("🦊") < 2 * TEXT
    assert not np.array_equal(drawn("❤\ufe0f", of), drawn("❤", of))


def test_an_emoji_of_several_characters_is_one():
    of = font_with("🦊")
    if not features.check("raqm") or not features.check("fribidi"):
        pytest.skip("Pillow has no libraries to join characters here")
    assert of.width(of.legible("👩🏽\u200d🚀")) == pytest.approx(of.width("🦊"))


def test_what_no_font_has_is_named(bare):
    """In plain letters where there are such, else by script, once for a whole word, or by its name."""
    if letters._font(TEXT, "é"):
        pytest.skip("Pillow's own font has more than plain letters")
    assert bare.legible("café 𝐀bc a red fox") == "cafe Abc a red fox" and bare.lacking == []
    assert bare.legible("नमस्ते दुनिया fox") == "[Devanagari] fox"
    assert bare.legible("[a] [a] न a न x\u0363") == "[a] [a] [Devanagari] a [Devanagari] x"
    assert bare.legible("赤い狐 🦊\ufe0f \ue000") == "[CJK][Hiragana][CJK] [fox face] [U+E000]"
    assert bare.lacking == ["Devanagari", "CJK", "Hiragana", "fox face", "U+E000"]
    box = bytes(ImageFont.load_default(TEXT).getmask("\U0010ffff"))
    for text in ("नमस्ते", "赤い狐", "🦊"):
        for font, _, piece in bare._pieces(bare.legible(text)):
            assert all(bytes(font.getmask(char)) != box for char in piece)


def test_marks_are_not_drawn_without_their_letter():
    """A font's dotted circle under a vowel sign would look like a box."""
    has = letters._font(TEXT, "न")
    assert Letters(TEXT).legible("नमस्ते fox") == ("नमस्ते fox" if has else "[Devanagari] fox")


def test_it_is_said_once_what_no_font_has(bare, tmp_path, capsys):
    path = solid(tmp_path / "x.png", (1, 2, 3))
    grid([("base", [path] * 3)], [(None, ["नमस्ते", "दुनिया", "a fox 🦊"])])
    said = capsys.readouterr().out
    assert said == "grid.png: no font of this machine has Devanagari and 1 more; what it lacks is named in brackets\n"


def test_without_libraries_hebrew_is_turned_here():
    """Drawn from left to right as it is stored it would be read backwards; what is between two words goes with them."""
    assert letters._turned("a שלום עולם, b ג 7") == "a םלוע םולש, b ג 7"


def test_damaged_fonts_are_passed_over(tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    assert letters._opened(tmp_path / "damaged.ttf", TEXT) is None
