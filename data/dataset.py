"""Any source of pictures and captions -> a sequence of examples, each read only when asked for."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from data.images import read_rgb
from data.safe import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Example:
    """One picture with its caption. `source` is the file's bytes or its path; `name` is what messages call it."""

    name: str
    source: bytes | Path
    caption: str

    def data(self):
        try:
            return self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror} ({self.source})") from None

    def image(self):
        """Upright RGB (PIL)."""
        return read_rgb(self.data(), self.name)


class Examples:
    """A sequence of Examples over rows: a datasets.Dataset, or a list of dicts whose image is a path."""

    def __init__(self, rows, image_column, caption_column, most):
        self.rows, self.image_column, self.caption_column = rows, image_column, caption_column
        self.length = min(len(rows), most or len(rows))

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        row = self.rows[number]
        image, caption = row[self.image_column], row[self.caption_column]
        if image is None:
            raise UserError(f"row {number}: no image in column {self.image_column}")
        name = f"row {number} ({Path(image['path']).name})" if image["path"] else f"row {number}"
        if not isinstance(caption, str):
            raise UserError(f"{name}: its caption is {caption!r}, not text")
        return Example(name, image["bytes"] or Path(image["path"]), caption)


def open_examples(settings):
    """What the flags name, in its own order.

    Raises UserError naming the flag, and the columns or splits there are.
    """
    if (settings.dataset_name is None) == (settings.train_data_dir is None):
        raise UserError("give one of --dataset_name and --train_data_dir")
    if settings.dataset_name is not None:
        flag, image_column = f"--dataset_name {settings.dataset_name}", settings.image_column
        rows = _dataset(flag, settings.dataset_name, image_column, settings.caption_column)
    else:
        flag, image_column = f"--train_data_dir {settings.train_data_dir}", "image"
        rows = _folder(flag, Path(settings.train_data_dir), settings.caption_column)
    if not len(rows):
        raise UserError(f"{flag}: no rows in it")
    return Examples(rows, image_column, settings.caption_column, settings.max_train_samples)


def _dataset(flag, name, image_column, caption_column):
    """A dataset of the hub, or of save_to_disk: split "train", or the only one. -> rows"""
    import datasets

    datasets.disable_progress_bars()
    saved = any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(f"{flag}: {reason or type(error).__name__}") from None
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise UserError(f"{flag}: no split train, but {', '.join(loaded)}")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for which, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in loaded.column_names:
            raise UserError(f"{which} {column}: not in the dataset, which has {', '.join(loaded.column_names)}")
    if not len(loaded):  # what follows fails on it inside datasets
        return []
    # decode=False: the bytes come as they are in the file, so that we decide about broken pictures and orientation
    return loaded.cast_column(image_column, datasets.Image(decode=False))


def _folder(flag, folder, caption_column):
    """Images with metadata.jsonl or .csv (datasets' image folder), or each with a .txt. -> rows

    Read here and not by `datasets`, which drops a row whose file is missing without a word.
    """
    if not folder.is_dir():
        raise UserError(f"{flag}: no such folder")
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if not jsonl.is_file() and not table.is_file():
        return [_captioned(path, caption_column) for path in _images(flag, folder)]
    path = jsonl if jsonl.is_file() else table
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = map(json.loads, filter(str.strip, text.split("\n"))) if path == jsonl else csv.DictReader(io.StringIO(text))
        for number, line in enumerate(lines):
            rows.append({"image": dict(path=str(folder / line["file_name"]), bytes=None), caption_column: line[caption_column]})
    except KeyError as error:
        column = error.args[0]
        owner = f"--caption_column {column}" if column == caption_column else column
        raise UserError(f"{owner}: not in row {number} of {path}, which has {', '.join(map(str, line))}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}, row {len(rows)}: {error}") from None
    missing = [row["image"]["path"] for row in rows if not Path(row["image"]["path"]).is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of its files are not there, e.g. {missing[0]}")
    return rows


def _images(flag, folder):
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f"{flag}: no images in it")
    return images


def _captioned(path, caption_column):
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise UserError(f"{path}: no metadata.jsonl in the folder and no {text.name} beside it; write one of them")
    return {"image": dict(path=str(path), bytes=None), caption_column: text.read_text(encoding="utf-8").strip()}
