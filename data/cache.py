"""The on-disk cache: what precompute writes and training reads.

    RUN/cache/manifest.json     what it was made from and with; written last: without it there is no cache
              index.npy         one record per example: which rows below are its own, and its time ids
              names.txt         one line per example: what messages call it
              moments-HxW.rows  VAE posterior, (2, 4, h, w): mean and standard deviation, unscaled
              captions.rows     text (77, 2048) and pooled (1280,), flat, once per distinct caption
              *.keys            per row: sha256 of all it was made of, and a checksum of its bytes

Rows are found by what they were made of. A row that is there is never made again; one whose caption, picture, model or
size changed has another key, so it cannot be taken for what it is not.
"""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

from data.safe import MachineError, UserError, atomic_write

VERSION = 1
KEY = np.dtype([("key", "V32"), ("crc", "<u4")])
INDEX = np.dtype([("picture", "<i4"), ("mirrored", "<i4"), ("caption", "<i4"), ("time_ids", "<i4", (6,))])


class Rows:
    """Rows of one shape in one file, fp16, memory-mapped, appended to and found by key.

    A row counts from the moment its key is on disk, after its bytes. What lies behind the last key is what a killed
    writer left; it is overwritten.
    """

    def __init__(self, folder, name, shape):
        self.folder, self.name, self.shape = Path(folder), name, tuple(int(n) for n in shape)
        self.path, self.keys_path = self.folder / f"{name}.rows", self.folder / f"{name}.keys"
        self.row_bytes = 2 * math.prod(self.shape)
        self._open()

    def _open(self):
        count = self.keys_path.stat().st_size // KEY.itemsize if self.keys_path.exists() else 0
        self.keys = np.fromfile(self.keys_path, KEY, count) if count else np.empty(0, KEY)
        self.positions = None
        if count and (not self.path.exists() or self.path.stat().st_size < count * self.row_bytes):
            raise UserError(f"{self.path}: shorter than its {count} rows; delete {self.folder} and run precompute again")
        self.map = np.memmap(self.path, np.float16, "r", shape=(count, *self.shape)) if count else None

    def position(self, key):
        """Where the row of `key` is: what the index stores. None when it is not there."""
        if self.positions is None:  # only a writer asks
            self.positions = {record["key"].tobytes(): i for i, record in enumerate(self.keys)}
        return self.positions.get(key)

    def __contains__(self, key):
        return self.position(key) is not None

    def __getitem__(self, position):
        """The row as a float16 array. Raises UserError when its bytes are not those that were written."""
        row = self.map[position]
        if zlib.crc32(row) != self.keys["crc"][position]:
            raise UserError(f"{self.path}: row {position} is damaged; delete {self.folder} and run precompute again")
        return row

    def append(self, keys, batches):
        """Write the rows that `batches` yields, arrays (B, *shape), under `keys` in order; each batch is committed.

        Raises MachineError, before the first row, when the disk cannot hold them all.
        """
        if not keys:
            return
        start, size = len(self.keys) * self.row_bytes, len(keys) * self.row_bytes
        with open(self.path, "r+b" if self.path.exists() else "w+b") as data, open(self.keys_path, "ab") as index:
            index.truncate(len(self.keys) * KEY.itemsize)  # half a key that a killed writer left
            try:  # claim the space first: writing through a map on a full disk kills the process without a word
                os.posix_fallocate(data.fileno(), start, size)
            except OSError as error:
                raise MachineError(f"{self.path}: {error.strerror}; {size / 2**20:.0f} MiB are needed") from error
            data.seek(start)
            todo = iter(keys)
            for batch in batches:
                batch = np.ascontiguousarray(batch, np.float16)
                data.write(batch)
                data.flush()
                os.fdatasync(data.fileno())
                index.write(np.array([(next(todo), zlib.crc32(row)) for row in batch], KEY).tobytes())
                index.flush()
                os.fdatasync(index.fileno())
        self._open()


def write_index(folder, index, names, manifest):
    """Commit a cache: the index, the names, and last of all the manifest."""
    folder = Path(folder)
    with atomic_write(folder / "index.npy") as file:
        np.save(file, index)
    with atomic_write(folder / "names.txt", "w") as file:
        file.writelines(" ".join(name.split()) + "\n" for name in names)
    with atomic_write(folder / "manifest.json", "w") as file:
        json.dump({"version": VERSION, **manifest}, file, indent=1)


def read_manifest(folder):
    """The manifest of a finished cache. Raises UserError saying which command makes one."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no finished cache here; run python -m data.precompute --output_dir {Path(folder).parent}"
        ) from None
    except ValueError:
        raise UserError(f"{path}: damaged; run python -m data.precompute again") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{path}: written by another version; delete {folder} and run precompute again")
    return manifest


class Cache:
    """A finished cache, open for reading. len(cache) examples; `manifest` says what they were made from."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.index = np.load(self.folder / "index.npy", mmap_mode="r")
        self.text_shape = self.manifest["text_shape"]
        self.text_size = math.prod(self.text_shape)
        self.captions = Rows(folder, "captions", (self.text_size + math.prod(self.manifest["pooled_shape"]),))
        self.moments = Rows(folder, self.manifest["moments"], self.manifest["moments_shape"])

    def __len__(self):
        return len(self.index)

    def names(self, examples):
        """What the examples are called, for messages."""
        lines = (self.folder / "names.txt").read_text().splitlines()
        return [lines[i] for i in examples]

    def batch(self, examples, mirrored, empty):
        """The arrays of B examples, fresh copies.

        mirrored (B,) bool: take the mirror image where one is cached; empty (B,) bool: the unconditional embedding in
        place of the caption's.
        -> dict of mean, std (B, 4, h, w), text (B, 77, 2048), pooled (B, 1280), all fp16, and time_ids (B, 6) int32
        """
        records = self.index[np.asarray(examples)]
        pictures = np.where(mirrored, records["mirrored"], records["picture"])
        captions = np.where(empty, self.manifest["unconditional"], records["caption"])
        moments = np.stack([self.moments[i] for i in pictures])
        flat = np.stack([self.captions[i] for i in captions])
        return dict(
            mean=moments[:, 0],
            std=moments[:, 1],
            text=flat[:, : self.text_size].reshape(-1, *self.text_shape),
            pooled=flat[:, self.text_size :],
            time_ids=records["time_ids"].copy(),
        )
