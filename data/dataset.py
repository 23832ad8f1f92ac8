"""Any source of pictures and captions -> a sequence of examples, each of them read when it is asked for."""

import collections
import csv
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from data.captions import wording
from data.common.disk import DISK_ERRORS
from data.common.errors import UserError, is_text, printable
from data.common.flags import Precompute
from data.common.words import many, shortened
from data.images import MAX_BYTES, SUFFIXES

KOHYAS = re.compile(r"(\d{1,3})_(.+)", re.DOTALL | re.ASCII)  # a folder's name: how often, and of what
TEXTS = (".txt", ".caption")  # what a picture's captions are in, next to it; where both are there, the first counts


class NoCaption(UserError):
    """A picture has no caption; that says what is to do."""


@dataclass(frozen=True)
class Example:
    """One picture with the texts that are encoded for it, of which training draws one each time.

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
    notes: what there was besides the examples, a line each. wording: what becomes of the captions.
    """

    def __init__(self, read, length, folder, notes, wording):
        self.read, self.length, self.folder, self.notes, self.wording = read, length, folder, notes, wording

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
        if self.wording.prompt and (not captions or isinstance(captions, NoCaption)):
            captions = self.wording.prompt
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
        return Example(name, Path(path) if data is None else data, self.wording.texts(captions), repeats)


def open_examples(settings):
    """The Examples of the source that the flags name, in the source's own order.

    Raises UserError naming the flag, and the columns or splits that there are.
    """
    if (settings.dataset_name is None) == (settings.train_data_dir is None):
        raise UserError("give one of --dataset_name and --train_data_dir")
    words = wording(settings)
    if settings.dataset_name is not None:
        flag = f"--dataset_name {settings.dataset_name}"
        columns = settings.image_column, settings.caption_column
        read, length, notes = _dataset(flag, settings.dataset_name, *columns, words.prompt)
    else:
        flag, folder = f"--train_data_dir {settings.train_data_dir}", Path(settings.train_data_dir)
        read, length, notes = _folder(flag, folder, settings.caption_column, words.prompt)
    if not length:
        raise UserError(f"{flag}: no rows in it")
    length = min(length, settings.max_train_samples or length)
    return Examples(read, length, settings.train_data_dir, notes, words)


def _dataset(flag, name, image_column, caption_column, prompt):
    """A dataset of the hub or of save_to_disk, its split "train" or the only one. -> (read, length, notes) for Examples

    Where it has no column of captions, and the flag names none either, the prompt is every picture's caption.
    """
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    saved = any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except IndexError:  # raised by datasets for a saved dataset that has no rows
        return None, 0, []
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
    bare = prompt and caption_column == Precompute.caption_column and caption_column not in loaded.column_names
    wanted = {"--image_column": image_column} | ({} if bare else {"--caption_column": caption_column})
    for which, column in wanted.items():
        if column not in loaded.column_names:
            raise UserError(f"{which} {column}: not in the dataset, which has {', '.join(loaded.column_names)}")
    if image_column == caption_column:
        raise UserError(f"--image_column and --caption_column are both {image_column}; name one of each")
    if not len(loaded):  # because what follows fails inside datasets when there are no rows
        return None, 0, []
    as_in_the_file = datasets.Image(decode=False)  # so that broken pictures and orientation are decided about here
    try:
        rows = loaded.select_columns(list(wanted.values())).cast_column(image_column, as_in_the_file)
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"--image_column {image_column}: holds no images ({str(error).splitlines()[0]})") from None

    def read(index):
        row = rows[index]
        image = row[image_column] or dict(path=None, bytes=None)
        return image["path"], image["bytes"], None if bare else row[caption_column]

    return read, len(rows), [f"{flag}: no column {caption_column}: {_theirs(prompt)}"] if bare else []


def _theirs(prompt):
    return f"every caption is {shortened(prompt)}"


def _folder(flag, folder, caption_column, prompt):
    """Images with a metadata.jsonl or .csv, as in datasets' image folders, or each with a .txt or .caption next to it.

    A picture with neither has the prompt for a caption; without a prompt the words of its folder's name, where that is
    like kohya's (10_red fox).
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
        paths, captions = pictures, [_captions_of(path) for path in pictures]
        used, unlisted = {*paths, *(os.path.splitext(path)[0] + suffix for path in paths for suffix in TEXTS)}, []
    else:
        paths, captions = _table(table, caption_column, prompt)
        used = {str(table), *(os.path.normpath(path) for path in paths if path)}
        unlisted = [path for path in pictures if os.path.normpath(path) not in used]
    others = [path for path in files if _suffix(path) not in SUFFIXES and path not in used]
    paths, captions = paths + list(closed), captions + list(closed.values())
    notes = _notes(folder, files, hidden, others, unlisted, table) + _own_name(folder, table)
    if without := [i for i, caption in enumerate(captions) if isinstance(caption, NoCaption)]:
        notes += _name_them(folder, paths, captions, without, prompt)
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


def _name_them(folder, paths, captions, without, prompt):
    """Give the pictures at the indices `without` the caption that their folder's name is, unless there is a prompt.

    -> notes on it
    """
    if prompt:
        return [f"{folder}: {many(len(without), 'picture')} without a caption: theirs is {shortened(prompt)}"]
    names = {i: words for i in without if paths[i] and (words := kohyas(paths[i], folder)[1])}
    for i, words in names.items():
        captions[i] = words
    if not names:
        return []
    i, words = next(iter(names.items()))
    example = f"e.g. {printable(os.path.relpath(paths[i], folder))}: {shortened(words)}"
    return [f"{folder}: {many(len(names), 'picture')} without a caption: theirs is their folder's name, {example}"]


def kohyas(path, folder):
    """What the folder that a picture lies in says, where it is named as kohya's are: 10_red fox -> (10, "red fox").

    -> (how often an epoch has the picture, words or None). Of several such folders inside each other the innermost
    counts. A number of four digits and more is taken for a year or a date, which repeats nothing.
    """
    for part in reversed(Path(os.path.relpath(path, folder)).parts[:-1]):
        if named := KOHYAS.fullmatch(part):
            return int(named[1]), named[2].strip()
    return 1, None


def _own_name(folder, table):
    """A note where the folder itself is named as kohya's are, because what its name says counts only below another."""
    if not KOHYAS.fullmatch(Path(os.path.abspath(folder)).name):
        return []
    above = printable(os.path.normpath(folder / ".."))
    advice = "" if table else f"; name the folder above it for that: --train_data_dir {above}"
    return [f"{printable(str(folder))}: the number and the words of its own name are not used{advice}"]


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


def _table(table, caption_column, prompt):
    """metadata.jsonl or metadata.csv -> (paths, captions), None or a UserError for what a row lacks

    With a prompt there need be no column of captions, unless the flag names one.
    """
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
                    captions.append(NoCaption(f"no {caption_column} in its row of {table.name}"))
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise UserError(f"{table}, row {len(captions)}: {error}") from None
    bare = prompt and caption_column == Precompute.caption_column
    for flag, column, needed in (("", "file_name", True), ("--caption_column ", caption_column, not bare)):
        if paths and needed and column not in columns:
            raise UserError(f"{flag}{column}: not in {table}, which has {', '.join(map(str, columns))}")
    return paths, captions


def _captions_of(picture):
    """The caption in the .txt or .caption next to a picture, a list where it has several lines.

    NoCaption where there is neither, another UserError where it cannot be read.
    """
    text = Path(picture).with_suffix(TEXTS[0])
    try:
        text = next((path for path in map(text.with_suffix, TEXTS) if path.is_file()), None)
        if text is None:
            name = printable(Path(picture).with_suffix(TEXTS[0]).name)
            return NoCaption(
                f"no metadata.jsonl in the folder and no {name} next to it; write one of them, or use --instance_prompt"
            )
        lines = text.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        return UserError(f"{printable(text.name)}: {error.strerror}")
    except ValueError as error:
        return UserError(f"{printable(text.name)}: {error}; save it as UTF-8")
    captions = [line.strip() for line in lines if line.strip()]
    return captions if len(captions) > 1 else "".join(captions)
