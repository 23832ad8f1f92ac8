"""Any source of pictures and captions -> examples. What is missing is named together with what there is."""

import json
import os

import pytest
from conftest import settings
from PIL import Image

from data.common.errors import UserError
from data.dataset import open_examples
from data.images import read_rgb


def write_images(folder, captions, suffix="png"):
    """Images whose red value is their index. -> their paths"""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:02d}.{suffix}" for i in range(len(captions))]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    return paths


def write_metadata(folder, captions, column="text"):
    rows = [
        json.dumps({"file_name": p.name, column: c}) + "\n" for p, c in zip(write_images(folder, captions), captions)
    ]
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def save_dataset(folder, captions, split=None, **columns):
    import datasets

    paths = write_images(folder.parent / "images", captions)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [str(p) for p in paths], "text": captions}, features=features)
    if columns:
        rows = rows.rename_columns(columns)
    (datasets.DatasetDict(dict.fromkeys(split, rows)) if split else rows).save_to_disk(str(folder))
    return folder


def examples(**values):
    return open_examples(settings("data.precompute", **values))


def image(example):
    return read_rgb(example.data(), example.name)


def content(found):
    return [(image(e).getpixel((0, 0))[0], *e.captions) for e in (found[i] for i in range(len(found)))]


CAPTIONS = ["a cat", 'Ünïcode, "quotes"', "three"]
WANTED = list(enumerate(CAPTIONS))


def test_a_folder_with_metadata(tmp_path):
    found = examples(train_data_dir=str(write_metadata(tmp_path / "d", CAPTIONS)))
    assert content(found) == WANTED
    assert found[1].name == "01.png"  # what an error calls it


def test_a_folder_with_text_files(tmp_path):
    """Also those in folders below, in the order of their names, and without the spaces around a caption."""
    paths = write_images(tmp_path / "d", CAPTIONS[:2]) + write_images(tmp_path / "d" / "more", CAPTIONS[2:], "JPG")
    for path, caption in zip(paths, CAPTIONS):
        path.with_suffix(".txt").write_text(f" {caption}\n", encoding="utf-8")
    found = examples(train_data_dir=str(tmp_path / "d"))
    assert [found[i].captions for i in range(len(found))] == [(caption,) for caption in CAPTIONS]
    assert len(examples(train_data_dir=str(tmp_path / "d"), max_train_samples=2)) == 2
    paths[1].with_suffix(".txt").unlink()
    found = examples(train_data_dir=str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"01\.png: no metadata.jsonl in the folder and no 01\.txt next to it"):
        found[1]


def test_a_dataset_saved_to_disk(tmp_path):
    assert content(examples(dataset_name=str(save_dataset(tmp_path / "d", CAPTIONS)))) == WANTED


def test_the_split_is_train_or_the_only_one(tmp_path):
    for name, splits in (("a", ["test", "train"]), ("b", ["all"])):
        assert content(examples(dataset_name=str(save_dataset(tmp_path / name, CAPTIONS, split=splits)))) == WANTED
    with pytest.raises(UserError, match="no split train, but one, two"):
        examples(dataset_name=str(save_dataset(tmp_path / "c", CAPTIONS, split=["one", "two"])))


def test_other_columns(tmp_path):
    folder = str(save_dataset(tmp_path / "d", CAPTIONS, image="photo", text="words"))
    assert content(examples(dataset_name=folder, image_column="photo", caption_column="words")) == WANTED
    with pytest.raises(UserError, match="--image_column image: not in the dataset, which has photo, words"):
        examples(dataset_name=folder)
    with pytest.raises(UserError, match="--caption_column text: not in the dataset, which has photo, words"):
        examples(dataset_name=folder, image_column="photo")


@pytest.mark.parametrize("asked, wanted", [(1, 1), (2, 2), (99, 3)])
def test_max_train_samples(asked, wanted, tmp_path):
    folder = str(write_metadata(tmp_path / "d", CAPTIONS))
    assert content(examples(train_data_dir=folder, max_train_samples=asked)) == WANTED[:wanted]


def test_a_caption_that_is_no_text_is_named(tmp_path):
    found = examples(train_data_dir=str(write_metadata(tmp_path / "numbers", [1, 2])))
    with pytest.raises(UserError, match=r"01.png: its caption is 2, not text"):
        found[1]
    found = examples(dataset_name=str(save_dataset(tmp_path / "none", ["a", None])))
    with pytest.raises(UserError, match=r"its caption is None, not text"):
        found[1]


def test_an_image_that_is_gone_is_named(tmp_path):
    found = examples(train_data_dir=str(write_metadata(tmp_path / "d", CAPTIONS)))
    example = found[2]
    (tmp_path / "d" / "02.png").unlink()
    with pytest.raises(UserError, match=r"02.png: No such file"):
        image(example)


def test_one_bad_picture_does_not_hide_the_others(tmp_path):
    """If datasets decoded the pictures, a broken one would end the whole iteration with a traceback."""
    write_metadata(tmp_path / "d", CAPTIONS)
    (tmp_path / "d" / "01.png").write_bytes(b"<html>404</html>")
    found = examples(train_data_dir=str(tmp_path / "d"))
    assert image(found[0]) and image(found[2])
    with pytest.raises(UserError, match=r"01.png: not a picture"):
        image(found[1])


def test_nothing_found_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        examples(train_data_dir=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="--train_data_dir .*nowhere: no such folder"):
        examples(train_data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no rows"):
        examples(train_data_dir=str(write_metadata(tmp_path / "none", [])))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("image,text\n")
    with pytest.raises(UserError, match="no data|no rows"):
        examples(dataset_name=str(tmp_path / "table"))
    with pytest.raises(UserError, match="--dataset_name nobody/nothing"):
        examples(dataset_name="nobody/nothing")


@pytest.mark.parametrize(
    "text, message",
    [("not json\n", "metadata.jsonl, row 0"), ('{"text": "x"}\n', "file_name.* which has text"), ("[1]\n", "row 0")],
)
def test_metadata_that_cannot_be_read_is_refused(text, message, tmp_path):
    write_metadata(tmp_path / "d", CAPTIONS)
    (tmp_path / "d" / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        examples(train_data_dir=str(tmp_path / "d"))


def test_a_caption_column_that_a_row_lacks_is_named_with_what_it_has(tmp_path):
    with pytest.raises(UserError, match="--caption_column words: not in .*metadata.jsonl, which has file_name, text"):
        examples(train_data_dir=str(write_metadata(tmp_path / "d", CAPTIONS)), caption_column="words")


def test_metadata_that_names_a_missing_file_is_refused(tmp_path):
    """datasets drops such a row without a word."""
    write_metadata(tmp_path / "d", CAPTIONS)
    (tmp_path / "d" / "01.png").unlink()
    found = examples(train_data_dir=str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"^01\.png: No such file"):
        found[1].data()


def test_a_folder_with_a_csv(tmp_path):
    write_images(tmp_path / "d", CAPTIONS)
    (tmp_path / "d" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f'{i:02d}.png,"{c.replace(chr(34), chr(34) * 2)}"\n' for i, c in WANTED)
    )
    assert content(examples(train_data_dir=str(tmp_path / "d"))) == WANTED


@pytest.mark.parametrize(
    "table, message",
    [
        (
            "file_name,text\n00.png,a cat, on a red sofa\n",
            r"row 0: \['on a red sofa'\] is beyond the last column; put texts with commas in quotes",
        ),
        ('file_name,text\n00.png,"a cat\n' + "01.png,a dog\n" * 20_000, "row 0: "),
    ],
)
def test_a_csv_whose_quotes_are_missing_is_refused(table, message, tmp_path):
    """Half of each caption would be trained on, or all rows as one."""
    write_images(tmp_path / "d", CAPTIONS)
    (tmp_path / "d" / "metadata.csv").write_text(table)
    with pytest.raises(UserError, match=f"metadata.csv, {message}"):
        examples(train_data_dir=str(tmp_path / "d"))


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    """With commas at the end of a line, a byte order mark at the beginning and quotes in the middle."""
    write_images(tmp_path / "d", ['a 5" nail', "two, three"])
    (tmp_path / "d" / "metadata.csv").write_text(
        'file_name,text\r\n00.png,a 5" nail,\r\n01.png, "two, three",,\r\n', encoding="utf-8-sig"
    )
    assert content(examples(train_data_dir=str(tmp_path / "d"))) == [(0, 'a 5" nail'), (1, "two, three")]


def test_a_text_file_of_windows_notepad(tmp_path):
    """It begins with a byte order mark, which belongs to no caption."""
    (path,) = write_images(tmp_path / "d", ["a cat"])
    path.with_suffix(".txt").write_text("a cat", encoding="utf-8-sig")
    assert examples(train_data_dir=str(tmp_path / "d"))[0].captions == ("a cat",)


def test_a_csv_with_semicolons_is_told_what_it_has(tmp_path):
    write_images(tmp_path / "d", ["x"])
    (tmp_path / "d" / "metadata.csv").write_text("file_name;text\n00.png;a cat, red\n")
    with pytest.raises(UserError, match="file_name: not in .*, which has file_name;text"):
        examples(train_data_dir=str(tmp_path / "d"))


def test_one_column_for_both_is_refused(tmp_path):
    with pytest.raises(UserError, match="--image_column and --caption_column are both text; name one of each"):
        examples(dataset_name=str(save_dataset(tmp_path / "d", CAPTIONS)), image_column="text")


def test_columns_that_are_not_asked_for_are_not_decoded(tmp_path):
    """A broken picture in another column would end the command, and good ones would cost time."""
    import datasets

    broken = [dict(path=None, bytes=b"<html>")] * 3
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), condition=datasets.Image())
    images = [dict(path=None, bytes=path.read_bytes()) for path in write_images(tmp_path / "p", CAPTIONS)]
    datasets.Dataset.from_dict(dict(image=images, text=CAPTIONS, condition=broken), features=features).save_to_disk(
        tmp_path / "d"
    )
    assert [caption for _, caption in content(examples(dataset_name=str(tmp_path / "d")))] == CAPTIONS


def test_a_dataset_that_is_a_program_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "d.py").write_text("")
    with pytest.raises(UserError, match="--dataset_name .*cripts are no longer supported"):
        examples(dataset_name=str(tmp_path / "d"))


def test_one_source_is_needed_and_not_two(tmp_path):
    for values in ({}, dict(dataset_name="a", train_data_dir="b")):
        with pytest.raises(UserError, match="one of --dataset_name and --train_data_dir"):
            examples(**values)


# ---- A folder as it is


def captioned(path, caption="a cat"):
    path.with_suffix(".txt").write_text(caption)
    return path


def names(found):
    return [found[i].name for i in range(len(found))]


def test_every_suffix_of_a_known_format_is_a_picture(tmp_path):
    suffixes = ("png", "PNG", "jpg", "JPEG", "jpe", "jfif", "webp", "avif", "AVIF", "gif", "bmp", "TIF")
    for i, suffix in enumerate(suffixes):
        kind = {"jfif": "JPEG", "jpe": "JPEG", "TIF": "TIFF"}.get(suffix, suffix.upper().replace("JPG", "JPEG"))
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(captioned(tmp_path / f"{i:02d}.{suffix}"), kind)
    found = examples(train_data_dir=str(tmp_path))
    assert [name[:2] for name in names(found)] == [f"{i:02d}" for i in range(12)] and not found.notes
    for i in range(12):
        assert abs(image(found[i]).getpixel((0, 0))[0] - 20 * i) <= 3


def test_what_other_programs_left_is_passed_over_and_counted(tmp_path):
    """macOS's ._x next to x, Jupyter's copies, a zip's __MACOSX; what is no picture; a caption without one."""
    for path in write_images(tmp_path, ["a", "b"]):
        captioned(path)
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")
    captioned(write_images(tmp_path / ".ipynb_checkpoints", ["a"])[0])
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._00.png").write_bytes(b"x")
    for name in ("x.heic", "y.HEIC", "lonely.txt", "README"):
        (tmp_path / name).write_text("x")
    found = examples(train_data_dir=str(tmp_path))
    assert names(found) == ["00.png", "01.png"]
    hidden, others = found.notes
    assert f"{tmp_path}: passed over: 4 hidden files, " in hidden
    assert "passed over: 2 .heic, 1 without a suffix, 1 .txt, e.g. README; pictures are .apng .avif " in others


def test_folders_and_links_are_followed_and_loops_are_not(tmp_path):
    elsewhere = write_images(tmp_path / "elsewhere", ["a", "b"])
    for path in elsewhere:
        captioned(path)
    folder = tmp_path / "d"
    captioned(write_images(folder / "sub", ["a"])[0])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "up").symlink_to(folder)
    captioned(folder / "one.png").symlink_to(elsewhere[1])
    captioned(folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    found = examples(train_data_dir=str(folder))
    assert names(found) == ["dangling.png", "linked/00.png", "linked/01.png", "one.png", "sub/00.png"]
    assert image(found[3]).getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(UserError, match="^dangling.png: No such file"):
        found[0].data()


def test_pictures_that_a_table_does_not_list_are_said(tmp_path):
    write_metadata(tmp_path, CAPTIONS)
    write_images(tmp_path / "10_ball", ["a", "b"])
    (tmp_path / "readme.md").write_text("x")
    found = examples(train_data_dir=str(tmp_path))
    assert content(found) == WANTED
    others, unlisted = found.notes
    assert "passed over: 1 .md, e.g. readme.md" in others
    assert "passed over: 2 pictures not in metadata.jsonl, e.g. 10_ball/00.png" in unlisted


def test_what_a_row_of_a_table_lacks_is_that_rows_fault(tmp_path):
    """A file or a caption in one row; a column that no row has is the table's fault."""
    write_images(tmp_path, CAPTIONS)
    (tmp_path / "01.png").unlink()
    rows = [dict(file_name="00.png", text="a"), dict(file_name="01.png", text="b"), dict(file_name="02.png")]
    rows += [dict(text="c"), dict(file_name=5, text="d"), dict(file_name="a\0b", text="e")]
    rows += [dict(file_name="00.png", text=[]), dict(file_name="00.png", text=["a", None])]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, said = examples(train_data_dir=str(tmp_path)), []
    for i in range(len(found)):
        try:
            found[i].data()
        except UserError as error:
            said.append(str(error))
    wanted = [
        "01.png: No such file",
        "02.png: no text in its row of metadata.jsonl",
        "row 3: no image in it",
        "row 4: no image in it",
        "a\0b: embedded null byte",
        "00.png: its list of captions is empty",
        "00.png: its caption is None, not text",
    ]
    assert len(said) == len(wanted) and all(map(str.startswith, said, wanted)), said


def test_a_pipe_a_device_and_a_folder_are_no_pictures(tmp_path):
    """A pipe that nobody fills would hold the command for ever, and a device has no end."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c").mkdir()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,y\nc,z\n")
    found = examples(train_data_dir=str(tmp_path))
    for i in range(3):
        with pytest.raises(UserError, match=r"^(a.png|b.png|c): not a file but a folder, pipe or device; remove it"):
            found[i].data()


def test_a_file_that_is_larger_than_any_picture_is_not_read(tmp_path):
    write_metadata(tmp_path, ["a"])
    os.truncate(tmp_path / "00.png", 2**31 + 1)
    with pytest.raises(UserError, match=r"^00.png: 2.0 GiB; a picture's file has at most 2"):
        examples(train_data_dir=str(tmp_path))[0].data()


def test_several_captions(tmp_path):
    """The lines of a .txt and a list in a row are captions each; a line break in a table's caption is none."""
    (path,) = write_images(tmp_path / "texts", ["a"])
    path.with_suffix(".txt").write_text("a red ball\r\n\n  1girl, ball \n", newline="")
    assert examples(train_data_dir=str(tmp_path / "texts"))[0].captions == ("a red ball", "1girl, ball")
    found = examples(train_data_dir=str(write_metadata(tmp_path / "table", [["a", "b"], "two\nlines"])))
    assert [found[i].captions for i in range(2)] == [("a", "b"), ("two\nlines",)]


@pytest.mark.parametrize("line", ["[" * 100_000, '"file_name text"', "null", "5"])
def test_lines_of_a_table_that_are_no_rows_are_refused(line, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match="metadata.jsonl, row 0: ") as error:
        examples(train_data_dir=str(tmp_path))
    assert len(str(error.value)) < 400


# ---- As kohya's tools have it


def test_a_caption_file_counts_as_a_text_file_and_a_text_file_counts_more(tmp_path):
    both, one = write_images(tmp_path, ["a", "b"])
    both.with_suffix(".txt").write_text("of the .txt")
    both.with_suffix(".caption").write_text("of the .caption")
    one.with_suffix(".caption").write_text("a cat\na dog\n", encoding="utf-8-sig")
    found = examples(train_data_dir=str(tmp_path))
    assert [found[i].captions for i in range(2)] == [("of the .txt",), ("a cat", "a dog")]
    assert found.notes == [f"{tmp_path}: passed over: 1 .caption file next to a .txt, which counts, e.g. 00.caption"]


def test_a_folder_like_kohyas_that_is_named_itself_names_the_one_above(tmp_path, monkeypatch):
    """Its number and words count only below the folder that is named, as in kohya's tools."""
    folder = tmp_path / "k" / "10_a"
    captioned(write_images(folder, ["a"])[0], "a cat")
    unused = "the number and the words of its own name are not used"
    monkeypatch.chdir(folder)
    for named, above in ((str(folder), str(tmp_path / "k")), (f"{folder}/", str(tmp_path / "k")), (".", "..")):
        found = examples(train_data_dir=named)
        advice = f"name the folder above it for that: --train_data_dir {above}"
        assert found.notes == [f"{named.rstrip('/')}: {unused}; {advice}"] and found[0].repeats == 1
    assert examples(train_data_dir=above).notes == [] and examples(train_data_dir=above)[0].repeats == 10
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "x"}')  # which counts only where it lies
    assert examples(train_data_dir=str(folder)).notes[-1] == f"{folder}: {unused}"


def test_folders_like_kohyas_say_how_often_and_what(tmp_path):
    """The number counts wherever the captions are from; the words only where there are none."""
    for name, caption in (("10_red fox", None), ("2_red fox", "of its own"), ("plain", "x"), ("3_a/12_b_c", None)):
        (path,) = write_images(tmp_path / "d" / name, ["a"])
        if caption:
            captioned(path, caption)
    captioned(write_images(tmp_path / "d" / "2_red fox" / "more", ["a"])[0], "deeper")
    captioned(write_images(tmp_path / "d" / "1999_summer", ["a"])[0], "a year")
    found = examples(train_data_dir=str(tmp_path / "d"))
    assert {(e.name, e.repeats, e.captions) for e in (found[i] for i in range(len(found)))} == {
        ("10_red fox/00.png", 10, ("red fox",)),
        ("1999_summer/00.png", 1, ("a year",)),
        ("2_red fox/00.png", 2, ("of its own",)),
        ("2_red fox/more/00.png", 2, ("deeper",)),
        ("3_a/12_b_c/00.png", 12, ("b_c",)),
        ("plain/00.png", 1, ("x",)),
    }
    assert "the number in 1999_summer repeats nothing: it has more than 3 digits" in found.notes[0]
    named = "2 pictures without a caption: theirs is their folder's name, e.g. 10_red fox/00.png: 'red fox'"
    assert found.notes[1:] == [f"{tmp_path / 'd'}: {named}"]
    rows = [
        {"file_name": f"{name}/00.png", "text": name} for name in ("10_red fox", "plain", "2_red fox/../3_a/12_b_c")
    ]
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = examples(train_data_dir=str(tmp_path / "d"))
    assert [(found[i].repeats, *found[i].captions) for i in range(3)] == [
        (10, "10_red fox"),
        (1, "plain"),
        (12, "2_red fox/../3_a/12_b_c"),
    ]


def test_a_folder_that_repeats_nothing_at_all_is_refused(tmp_path):
    write_images(tmp_path / "0_cat", ["a"])
    with pytest.raises(UserError, match="^0_cat/00.png: its folder's number says 0 times an epoch"):
        examples(train_data_dir=str(tmp_path))[0]
