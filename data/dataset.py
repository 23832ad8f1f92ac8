"""Any source of pictures and captions -> a sequence of examples, each of them read when it is asked for."""

import collections
import csv
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from data.common.disk import DISK_ERRORS
from data.common.errors import UserError, is_text, printable
from data.common.words import many, shortened
from data.images import MAX_BYTES, SUFFIXES

TEXTS = (".txt", ".caption")  # what a picture's captions are in, next to it; where both are there, the first counts


@dataclass(frozen=True)
class Example:
    """One picture with its captions, of which training draws one each time.

    `source` is the file's bytes or its path; messages call the picture by `name`; an epoch has it `repeats` times.
    """

    name: str
    source: bytes | Path
    captions: tuple[str, ...]
    repeats: int = 1

    def data(self):
        """The bytes of the picture's file. Raises UserError for what is no file, such as a pipe that nobody fills."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            facts = os.stat(self.source)
            if not stat.S_ISREG(facts.st_mode):
                raise UserError(f"{self.name}: not a file but a folder, pipe or device; remove it")
            if facts.st_size > MAX_BYTES:
                raise UserError(f"{self.name}: {facts.st_size / 2**30:.1f} GiB; a picture's file has at most 2")
            return self.source.read_bytes()
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            raise UserError(f"{self.name}: {error.strerror} ({self.source})") from None
        except ValueError as error:  # a zero byte in the path
            raise UserError(f"{self.name}: {error}") from None


class Examples:
    """A sequence of `length` Examples. read(index) -> (path or None, bytes or None, its captions)

    The captions are one string, a list of strings, or the UserError that says why there are none.
    notes: what there was besides the examples, a line each.
    """

    def __init__(self, read, length, folder=None, notes=()):
        self.read, self.length, self.folder, self.notes = read, length, folder, notes

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
        path, data, captions = self.read(index)
        name = self._name(index, path)
        if isinstance(captions, UserError):
            raise UserError(f"{name}: {captions}")
        if not path and data is None:
            raise UserError(f"{name}: no image in it")
        captions = tuple(captions) if isinstance(captions, list) else (captions,)
        if not captions:
            raise UserError(f"{name}: its list of captions is empty")
        for caption in captions:
            if not isinstance(caption, str):
                raise UserError(f"{name}: its caption is {repr(caption)[:40]}, not text")
            if not is_text(caption):
                raise UserError(f"{name}: its caption {ascii(caption)[:40]} holds half a character; write it again")
        repeats, _ = kohyas(path, self.folder) if self.folder else (1, None)
        if not repeats:
            raise UserError(f"{name}: its folder's number says 0 times an epoch; give it another name, or remove it")
        return Example(name, Path(path) if data is None else data, captions, repeats)


def open_examples(settings):
    """The Examples of the source that the flags name, in the source's own order.

    Raises UserError naming the flag, and the columns or splits that there are.
    """
    if (settings.dataset_name is None) == (settings.train_data_dir is None):
        raise UserError("give one of --dataset_name and --train_data_dir")
    if settings.dataset_name is not None:
        flag = f"--dataset_name {settings.dataset_name}"
        read, length = _dataset(flag, settings.dataset_name, settings.image_column, settings.caption_column)
        notes = []
    else:
        flag = f"--train_data_dir {settings.train_data_dir}"
        read, length, notes = _folder(flag, Path(settings.train_data_dir), settings.caption_column)
    if not length:
        raise UserError(f"{flag}: no rows in it")
    return Examples(read, min(length, settings.max_train_samples or length), settings.train_data_dir, notes)


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
    """Images with a metadata.jsonl or .csv, as in datasets' image folders, or each with a .txt or .caption next to it.

    A picture with neither has the words of its folder's name, where that is like kohya's (10_red fox).
    They are read here and not by `datasets`, because it drops a row whose file is missing without a word.
    -> (read, length, notes) for Examples
    """
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: no such folder")
    files, hidden, closed = _listing(flag, folder)
    pictures = [path for path in files if _suffix(path) in SUFFIXES]
    table = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if table is None:
        if not pictures and not closed:
            raise UserError(f"{flag}: no images in it")
        paths, captions = pictures, [_captions_of(path, folder) for path in pictures]
        used, unlisted = {*paths, *(os.path.splitext(path)[0] + suffix for path in paths for suffix in TEXTS)}, []
    else:
        paths, captions = _table(table, caption_column)
        used = {str(table), *(os.path.normpath(path) for path in paths if path)}
        unlisted = [path for path in pictures if os.path.normpath(path) not in used]
    others = [path for path in files if _suffix(path) not in SUFFIXES and path not in used]
    paths, captions = paths + list(closed), captions + list(closed.values())
    notes = _notes(folder, files, hidden, others, unlisted, table)
    return lambda index: (paths[index], None, captions[index]), len(paths), notes


def _listing(flag, folder):
    """All files in a folder and those below, also behind links. Names that begin with a dot are not looked at.

    -> (paths in order, how many hidden files and folders, {folder that cannot be read: UserError})
    """
    seen, files, hidden, closed = set(), [], 0, {}

    def cannot(error):
        if error.errno in DISK_ERRORS:
            raise error
        if error.filename == str(folder):
            raise UserError(f"{flag}: {error.strerror}")
        closed[error.filename] = UserError(f"a folder that cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=cannot, followlinks=True):
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in seen:  # a link led back here
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(files), hidden, closed


def _suffix(path):
    return os.path.splitext(path)[1].lower()


def kohyas(path, folder):
    """What the folder that a picture lies in says, where it is named as kohya's are: 10_red fox -> (10, "red fox").

    -> (how often an epoch has the picture, words or None). Of several such folders inside each other the innermost
    counts. A number of four digits and more is taken for a year or a date, which repeats nothing.
    """
    for part in reversed(Path(os.path.relpath(path, folder)).parts[:-1]):
        if named := re.fullmatch(r"(\d{1,3})_(.+)", part, re.DOTALL | re.ASCII):
            return int(named[1]), named[2].strip()
    return 1, None


def _notes(folder, files, hidden, others, unlisted, table):
    """What of a folder is not used, in lines."""

    def example(path):
        return f"e.g. {printable(os.path.relpath(path, folder))}"

    notes = []
    if hidden:
        notes.append(f"{folder}: passed over: {many(hidden, 'hidden file')}, whose names begin with a dot")
    if others:
        kinds = collections.Counter(_suffix(path) or "without a suffix" for path in others)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(10))
        notes.append(
            f"{folder}: passed over: {counts}, {example(others[0])}; pictures are {' '.join(sorted(SUFFIXES))}"
        )
    if unlisted:
        notes.append(
            f"{folder}: passed over: {many(len(unlisted), 'picture')} not in {table.name}, {example(unlisted[0])}"
        )
    there = set(files)
    second = [path for path in files if _suffix(path) == TEXTS[1] and os.path.splitext(path)[0] + TEXTS[0] in there]
    if second and not table:
        many_files = many(len(second), f"{TEXTS[1]} file")
        notes.append(f"{folder}: passed over: {many_files} next to a {TEXTS[0]}, which counts, {example(second[0])}")
    years = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and re.match(r"\d{4,}_.", entry.name))
    if years:
        notes.append(f"{folder}: the number in {printable(years[0])} repeats nothing: it has more than 3 digits")
    return notes


def _table(table, caption_column):
    """metadata.jsonl or metadata.csv -> (paths, captions), None or a UserError for what a row lacks"""
    paths, captions, columns = [], [], {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".jsonl":
                lines = map(json.loads, filter(str.strip, file))
            else:
                lines = csv.DictReader(file, strict=True, skipinitialspace=True)
            for line in lines:
                if not isinstance(line, dict):
                    raise ValueError(f"{shortened(str(line))} is not an object with file_name and {caption_column}")
                surplus = line.pop(None, [])  # where csv puts it
                if "file_name" in line and any(surplus):
                    raise ValueError(f"{surplus} is beyond the last column; put texts with commas in quotes")
                columns |= dict.fromkeys(line)
                name = line.get("file_name")
                paths.append(str(table.parent / name) if isinstance(name, str) and name else None)
                if caption_column in line:
                    captions.append(line[caption_column])
                else:
                    captions.append(UserError(f"no {caption_column} in its row of {table.name}"))
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise UserError(f"{table}, row {len(captions)}: {error}") from None
    for flag, column in (("", "file_name"), ("--caption_column ", caption_column)):
        if paths and column not in columns:
            raise UserError(f"{flag}{column}: not in {table}, which has {', '.join(map(str, columns))}")
    return paths, captions


def _captions_of(picture, folder):
    """The captions of a picture in a folder without a table: one, or a list; a UserError where there are none.

    They are the lines of the .txt or .caption next to it. Without one they are the words of its folder's name.
    """
    text = Path(picture).with_suffix(TEXTS[0])
    try:
        text = next((path for path in map(text.with_suffix, TEXTS) if path.is_file()), None)
        if text is None:
            name, (_, words) = printable(Path(picture).with_suffix(TEXTS[0]).name), kohyas(picture, folder)
            return words or UserError(f"no metadata.jsonl in the folder and no {name} next to it; write one of them")
        lines = text.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        return UserError(f"{printable(text.name)}: {error.strerror}")
    except ValueError as error:
        return UserError(f"{printable(text.name)}: {error}; save it as UTF-8")
    captions = [line.strip() for line in lines if line.strip()]
    return captions if len(captions) > 1 else "".join(captions)
