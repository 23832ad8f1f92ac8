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

import collections
import errno
import hashlib
import io
import json
import math
import mmap
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.common.ahead import ahead
from data.common.safe import MachineError, UserError, atomic_write, naming, sha256_file

VERSION = 2
COMMIT_SECONDS = 1  # what a killed writer has to do again, beside what the encoders have under way
KEY = np.dtype([("key", "S32"), ("crc", "<u4")])
INDEX = np.dtype(
    [
        ("size", "<u2"),  # number of its (height, width) in the manifest's sizes
        ("picture", "<i4"),  # position in that size's moments
        ("mirrored", "<i4"),  # the mirror image's; the picture's own without --random_flip
        ("caption", "<i4"),  # position in captions
        ("held_out", "?"),  # not for training
        ("time_ids", "<i4", (6,)),
        ("mirrored_time_ids", "<i4", (6,)),
        ("image_digest", "S16"),  # of the file's bytes and of the caption: what a later precompute tells changes by
        ("caption_digest", "S16"),
    ]
)


class Rows:
    """Rows of one shape in one file, fp16, memory-mapped, found by key.

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
        size = self.path.stat().st_size if self.path.exists() else 0
        whole = min(count, size // self.row_bytes)
        self._file, self.map = None, np.empty((0, *self.shape), np.float16)
        if whole:
            with open(self.path, "rb") as file:
                self._file = mmap.mmap(file.fileno(), whole * self.row_bytes, prot=mmap.PROT_READ)
            self.map = np.frombuffer(self._file, np.float16).reshape(whole, *self.shape)
        self._order = None

    def __len__(self):
        return len(self.keys)

    def room(self, count):
        """Bytes of the disk that `count` more rows take, beside what a killed writer has claimed already."""
        claimed = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        return max(0, (len(self) + count) * self.row_bytes - claimed)

    def find(self, keys):
        """Positions (n,) of keys (n,) S32, -1 where there is none."""
        if self._order is None:
            self._order = np.argsort(self.keys["key"], kind="stable")
        if not len(self):
            return np.full(len(keys), -1)
        nearest = self._order[np.searchsorted(self.keys["key"], keys, sorter=self._order).clip(max=len(self) - 1)]
        return np.where(self.keys["key"][nearest] == keys, nearest, -1)

    def read(self, positions):
        """The rows at `positions`, stacked: a copy. Their pages go back to the system, so that memory does not grow with use."""
        rows = np.stack([self[position] for position in positions])
        self._file.madvise(mmap.MADV_DONTNEED)
        return rows

    def good(self, position):
        """Whether the row's bytes are those that were written."""
        return position < len(self.map) and zlib.crc32(self.map[position]) == self.keys["crc"][position]

    def __getitem__(self, position):
        """The row as a float16 array. Raises UserError when its bytes are not those that were written."""
        if not self.good(position):
            raise UserError(f"{self.path}: row {position} is damaged; run precompute again, it repairs it")
        return self.map[position]

    def write(self, count, batches):
        """Write the at most `count` rows that `batches` yields as (keys, array (B, *shape)); committed every COMMIT_SECONDS.

        A key that is there already has its row written again in its place. Raises MachineError, before the first row, when
        the disk cannot hold them all.
        """
        if not count:
            return
        size = (len(self) + count) * self.row_bytes
        with (
            open(self.path, "r+b" if self.path.exists() else "w+b") as data,
            open(self.keys_path, "r+b" if self.keys_path.exists() else "w+b") as index,
        ):
            index.truncate(len(self) * KEY.itemsize)  # half a key that a killed writer left
            try:  # claim the space first: writing through a map on a full disk kills the process without a word
                os.posix_fallocate(data.fileno(), 0, size)
            except OSError as error:
                raise MachineError(f"{self.path}: {error.strerror}; {size / 2**20:.0f} MiB are needed") from error
            writer = _Writer(self, data, index)
            try:
                with ThreadPoolExecutor(1) as pool:
                    collections.deque(
                        ahead(pool, writer.put, batches, 1), maxlen=0
                    )  # one is written while the next is made
            finally:  # also what came before an error
                writer.commit()
            data.truncate(writer.end * self.row_bytes)
        self._open()


class _Writer:
    """Rows on their way into their two open files. After a first error nothing more is written: the disk cannot be trusted."""

    def __init__(self, rows, data, index):
        self.rows, self.data, self.index, self.fine = rows, data, index, True
        self.end, self.written, self.committed = (
            len(rows),
            {},
            time.monotonic(),
        )  # written: {place: its key, not on disk yet}

    def put(self, batch):
        if not self.fine:
            return
        self.fine, end, written = False, self.end, {}
        keys, values = batch
        places = self.rows.find(np.array(keys, "S32")).tolist()
        for place, key, row in zip(places, keys, np.ascontiguousarray(values, np.float16)):
            if place < 0:
                place, end = end, end + 1
            self.data.seek(place * self.rows.row_bytes)
            self.data.write(row)
            written[place] = np.array((key, zlib.crc32(row)), KEY).tobytes()
        self.end, self.fine = end, True
        self.written |= written
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self):
        """Bytes first, then the keys that make them count; new ones all at once, so that no kill parts a batch: how a picture
        is rounded depends on those that it is encoded with, and the rest must be encoded as if nothing was."""
        written, index = self.written, self.index.fileno()
        if not written or not self.fine:
            return
        self.fine = False
        self.data.flush()
        os.fdatasync(self.data.fileno())
        with naming(self.rows.keys_path):
            for place in [
                place for place in written if place < len(self.rows)
            ]:  # of damaged rows, written again in their place
                os.pwrite(index, written.pop(place), place * KEY.itemsize)
            new, at = b"".join(written.values()), min(written, default=0) * KEY.itemsize
            if os.pwrite(index, new, at) < len(new):  # a disk that fills up takes what still fits
                os.ftruncate(index, at)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(index)
        written.clear()
        self.committed, self.fine = time.monotonic(), True


def write_index(folder, index, names, manifest):
    """Commit a cache: the index, the names, and last of all the manifest. Without changes, nothing is written."""
    folder, npy = Path(folder), io.BytesIO()
    np.save(npy, index)
    files = {"index.npy": npy.getbuffer(), "names.txt": "".join(name + "\n" for name in names).encode()}
    digests = {name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()}
    manifest = {"version": VERSION, **manifest, "files": digests}
    text = json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)
    path = folder / "manifest.json"
    if read_index(folder) and path.read_text() == text:
        return
    path.unlink(missing_ok=True)  # it describes the index that is replaced now
    for name, blob in files.items():
        with atomic_write(folder / name) as file:
            file.write(blob)
    with atomic_write(path, "w") as file:
        file.write(text)


def read_index(folder):
    """(index, names of the examples) of a finished cache, None where there is none that can be read."""
    try:
        manifest = read_manifest(folder)
        return np.load(_whole(folder, manifest, "index.npy")), _names(folder, manifest)
    except UserError:
        return None


def read_manifest(folder):
    """The manifest of a finished cache. Raises UserError saying which command makes one."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        whole = manifest.pop("checksum") == _checksum(manifest)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no finished cache here; run python -m data.precompute --output_dir {Path(folder).parent}"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):  # no JSON, or of another shape
        whole = False
    if not whole:
        raise UserError(
            f"{path}: damaged, or of an earlier version; run python -m data.precompute again, it repairs it"
        )
    if manifest["version"] != VERSION:
        raise UserError(f"{path}: written by another version; delete {folder} and run precompute again")
    return manifest


def _checksum(manifest):
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _whole(folder, manifest, name):
    """Path of one of the cache's files. Raises UserError when it is not the one that the manifest was written with."""
    path = Path(folder) / name
    try:
        whole = sha256_file(path) == manifest["files"][name]
    except OSError:
        whole = False
    if not whole:
        raise UserError(f"{path}: not there or damaged; run python -m data.precompute again, it repairs it")
    return path


def _names(folder, manifest):
    return _whole(folder, manifest, "names.txt").read_text(encoding="utf-8").split("\n")[:-1]


class Cache:
    """A finished cache, open for reading. `manifest` says what it was made from.

    members[i] are the numbers of the examples to train on at size i; len(cache) of them in all.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.index = np.load(_whole(folder, self.manifest, "index.npy"), mmap_mode="r")
        self.sizes, self.text_shape = self.manifest["sizes"], self.manifest["text_shape"]
        self.text_size = math.prod(self.text_shape)
        self.captions = Rows(folder, "captions", (self.text_size + math.prod(self.manifest["pooled_shape"]),))
        self.moments = [
            Rows(folder, moments_name(size), shape) for size, shape in zip(self.sizes, self.manifest["moments_shapes"])
        ]
        size_of, held_out = np.asarray(self.index["size"]), np.asarray(self.index["held_out"])
        self.members = [np.flatnonzero((size_of == i) & ~held_out) for i in range(len(self.sizes))]
        if not len(self):
            raise UserError(
                f"{self.folder}: all of {len(self.index)} rows are held out; use a smaller --validation_fraction"
            )

    def __len__(self):
        return sum(map(len, self.members))

    def names(self, examples):
        """What the examples are called, for messages."""
        try:
            names = _names(self.folder, self.manifest)
        except UserError:  # what is to be told is worse than that
            return [f"row {i}" for i in examples]
        return [names[i] for i in examples]

    def batch(self, examples, mirrored, empty):
        """The arrays of B examples of one size, fresh copies.

        mirrored (B,) bool: take the mirror image where one is cached; empty (B,) bool: the unconditional embedding in
        place of the caption's.
        -> dict of mean, std (B, 4, h, w), text (B, 77, 2048), pooled (B, 1280), all fp16, and time_ids (B, 6) int32
        """
        records = self.index[np.asarray(examples)]
        pictures = np.where(mirrored, records["mirrored"], records["picture"])
        captions = np.where(empty, self.manifest["unconditional"], records["caption"])
        moments = self.moments[records["size"][0]].read(pictures)
        flat = self.captions.read(captions)
        return dict(
            mean=moments[:, 0],
            std=moments[:, 1],
            text=flat[:, : self.text_size].reshape(-1, *self.text_shape),
            pooled=flat[:, self.text_size :],
            time_ids=np.where(np.asarray(mirrored)[:, None], records["mirrored_time_ids"], records["time_ids"]),
        )


def moments_name(size):
    """Of the file that holds the moments of one (height, width)."""
    return f"moments-{size[0]}x{size[1]}"
