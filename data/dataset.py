"""Any source of pictures and captions -> a sequence of examples, decoded only when asked for."""

from dataclasses import dataclass
from pathlib import Path

from data.images import read_rgb
from data.safe import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Example:
    """One picture with its caption. `source` is the file's bytes or its path; `name` is what errors call it."""

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


def open_examples(settings):
    """The examples that the flags name, in their source's order.

    Raises UserError naming the flag, and the columns or splits there are.
    """
    if (settings.dataset_name is None) == (settings.train_data_dir is None):
        raise UserError("give one of --dataset_name and --train_data_dir")
    if settings.train_data_dir is not None:
        folder = Path(settings.train_data_dir)
        if not folder.is_dir():
            raise UserError(f"--train_data_dir {folder}: no such folder")
        if not list(folder.glob("metadata.*")):
            return _text_files(folder)[: settings.max_train_samples]
    rows = _load(settings)
    for column in (settings.image_column, settings.caption_column):
        if column not in rows.column_names:
            flag = "--image_column" if column == settings.image_column else "--caption_column"
            raise UserError(f"{flag} {column}: not in the dataset, which has {', '.join(rows.column_names)}")
    if settings.max_train_samples is not None:
        rows = rows.select(range(min(settings.max_train_samples, len(rows))))
    return _Rows(rows, settings.image_column, settings.caption_column)


class _Rows:
    """A datasets.Dataset as a sequence of Examples."""

    def __init__(self, rows, image_column, caption_column):
        from datasets import Image

        # decode=False: the bytes come as they are in the file, so that we decide about broken pictures and orientation
        self.rows = rows.cast_column(image_column, Image(decode=False))
        self.image_column, self.caption_column = image_column, caption_column

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        image, caption = row[self.image_column], row[self.caption_column]
        name = f"row {i}"
        if image is None:
            raise UserError(f"{name}: no image in column {self.image_column}")
        if image["path"]:
            name += f" ({Path(image['path']).name})"
        if not isinstance(caption, str):
            raise UserError(f"{name}: its caption is {caption!r}, not text")
        return Example(name, image["bytes"] or Path(image["path"]), caption)


def _load(settings):
    """The datasets.Dataset: split "train", or the only one."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if settings.train_data_dir is not None:
            loaded = datasets.load_dataset("imagefolder", data_dir=settings.train_data_dir, drop_labels=True)
        elif (Path(settings.dataset_name) / "state.json").is_file() or (Path(settings.dataset_name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(settings.dataset_name)
        else:
            loaded = datasets.load_dataset(settings.dataset_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, datasets.exceptions.DatasetGenerationError) as error:
        where = f"--train_data_dir {settings.train_data_dir}" if settings.train_data_dir else f"--dataset_name {settings.dataset_name}"
        cause = str(error.__cause__ or error).strip().splitlines()
        raise UserError(f"{where}: {cause[0] if cause else type(error).__name__}") from None
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise UserError(f"the dataset has no split train, but {', '.join(loaded)}")
        loaded = loaded.get("train", next(iter(loaded.values())))
    if not len(loaded):
        raise UserError("the dataset has no rows")
    return loaded


def _text_files(folder):
    """Images with a caption in a .txt file of the same name."""
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not images:
        raise UserError(f"--train_data_dir {folder}: no images in it")
    examples = []
    for path in images:
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise UserError(f"{path}: no metadata.jsonl in the folder and no {text.name} beside it; write one of them")
        examples.append(Example(path.name, path, text.read_text(encoding="utf-8").strip()))
    return examples
