"""Any source of pictures and captions -> a sequence of examples, each of them read when it is asked for."""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

from data.common.safe import DISK_ERRORS, UserError, is_text, printable

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Example:
    """One picture with its caption. `source` is the file's bytes or its path; messages call it by `name`."""

    name: str
    source: bytes | Path
    caption: str

    def data(self):
        """The bytes of the picture's file."""
        try:
            return self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror} ({self.source})") from None


class Examples:
    """A sequence of `length` Examples. read(index) -> (path or None, bytes or None, caption)"""

    def __init__(self, read, length, folder=None):
        self.read, self.length, self.folder = read, length, folder

    def __len__(self):
        return self.length

    def name(self, index):
        """The name that messages call an example by: its path below the folder."""
        return self._name(index, self.read(index)[0])

    def _name(self, index, path):
        if not path:
            return f"row {index}"
        name = os.path.relpath(path, self.folder) if self.folder else Path(path).name
        return printable(name)  # because Linux allows any bytes in a name, and a terminal does not

    def __getitem__(self, index):
        path, data, caption = self.read(index)
        name = self._name(index, path)
        if not path and data is None:
            raise UserError(f"{name}: no image in it")
        if not isinstance(caption, str):
            raise UserError(f"{name}: its caption is {repr(caption)[:40]}, not text")
        if not is_text(caption):
            raise UserError(f"{name}: its caption {ascii(caption)[:40]} holds half a character; write it again")
        return Example(name, Path(path) if data is None else data, caption)


def open_examples(settings):
    """The Examples of the source that the flags name, in the source's own order.

    Raises UserError naming the flag, and the columns or splits that there are.
    """
    if (settings.dataset_name is None) == (settings.train_data_dir is None):
        raise UserError("give one of --dataset_name and --train_data_dir")
    if settings.dataset_name is not None:
        flag = f"--dataset_name {settings.dataset_name}"
        read, length = _dataset(flag, settings.dataset_name, settings.image_column, settings.caption_column)
    else:
        flag = f"--train_data_dir {settings.train_data_dir}"
        read, length = _folder(flag, Path(settings.train_data_dir), settings.caption_column)
    if not length:
        raise UserError(f"{flag}: no rows in it")
    return Examples(read, min(length, settings.max_train_samples or length), settings.train_data_dir)


def _dataset(flag, name, image_column, caption_column):
    """A dataset of the hub or of save_to_disk, its split "train" or the only one. -> (read, length) for Examples"""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    saved = any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except IndexError:  # raised by datasets for a saved dataset that has no rows
        return None, 0
    # RuntimeError: the dataset is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if getattr(error.__cause__ or error, "errno", None) in DISK_ERRORS:
            raise (error.__cause__ or error) from None
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(f"{flag}: {reason or type(error).__name__}") from None
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise UserError(f"{flag}: no split train, but {', '.join(loaded)}")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for which, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in loaded.column_names:
            raise UserError(f"{which} {column}: not in the dataset, which has {', '.join(loaded.column_names)}")
    if image_column == caption_column:
        raise UserError(f"--image_column and --caption_column are both {image_column}; name one of each")
    if not len(loaded):  # because what follows fails inside datasets when there are no rows
        return None, 0
    as_in_the_file = datasets.Image(decode=False)  # so that broken pictures and orientation are decided about here
    try:
        rows = loaded.select_columns([image_column, caption_column]).cast_column(image_column, as_in_the_file)
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"--image_column {image_column}: holds no images ({str(error).splitlines()[0]})") from None

    def read(index):
        row = rows[index]
        image = row[image_column] or dict(path=None, bytes=None)
        return image["path"], image["bytes"], row[caption_column]

    return read, len(rows)


def _folder(flag, folder, caption_column):
    """Images with a metadata.jsonl or .csv, as in datasets' image folders, or each with a .txt next to it.

    They are read here and not by `datasets`, because it drops a row whose file is missing without a word.
    -> (read, length) for Examples
    """
    if not folder.is_dir():
        raise UserError(f"{flag}: no such folder")
    table = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if table is None:
        paths = _images(flag, folder)
        captions = [_caption_of(path) for path in paths]
    else:
        paths, captions = _table(table, caption_column)
    return lambda index: (paths[index], None, captions[index]), len(paths)


def _table(table, caption_column):
    """metadata.jsonl or metadata.csv -> (paths, captions)"""
    paths, captions = [], []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".jsonl":
                lines = map(json.loads, filter(str.strip, file))
            else:
                lines = csv.DictReader(file, strict=True, skipinitialspace=True)
            for line in lines:
                if "file_name" in line and None in line and any(line[None]):  # csv puts surplus fields under None
                    raise ValueError(f"{line[None]} is beyond the last column; put texts with commas in quotes")
                paths.append(str(table.parent / line["file_name"]))
                captions.append(line[caption_column])
    except KeyError as error:
        column = error.args[0]
        owner = f"--caption_column {column}" if column == caption_column else column
        raise UserError(
            f"{owner}: not in row {len(captions)} of {table}, which has {', '.join(map(str, line))}"
        ) from None
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{table}, row {len(captions)}: {error}") from None
    gone = [path for path in paths if not os.path.isfile(path)]
    if gone:
        raise UserError(f"{table}: {len(gone)} of its files are not there, e.g. {gone[0]}")
    return paths, captions


def _images(flag, folder):
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{flag}: no images in it")
    return paths


def _caption_of(path):
    text = Path(path).with_suffix(".txt")
    if not text.is_file():
        raise UserError(f"{path}: no metadata.jsonl in the folder and no {text.name} next to it; write one of them")
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except ValueError as error:
        raise UserError(f"{text}: {error}; save it as UTF-8") from None
