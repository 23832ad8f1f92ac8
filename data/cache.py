"""The on-disk cache: what precompute writes and training reads.

    RUN/cache/manifest.json       what the cache was made from and with; written last, so without it there is no cache
              index.npy           one record per example: its picture's row, its range of captions.npy, its time ids
              captions.npy        the row in captions.rows of every example's first caption, second caption, ...; where
                                  a caption has variants, its tags in several orders, they stand in its place
              names.txt           one line per example: the name that messages call it by
              posteriors-HxW.rows of one bucket's pictures, (2, 4, h, w): mean, standard deviation; unscaled
              captions.rows       text (77, 2048) and pooled (1280,), flat, once per distinct caption, and of validation
                                  prompts, which the manifest names; captions-152.rows and captions-227.rows of longer
                                  ones
              *.keys              per row: the sha256 of all it was made of, and a checksum of its bytes

A row is found by what it was made of. One that is there is never made again, and one whose caption, picture, model or
bucket changed has another key, so that it cannot be taken for what it is not. Rows that nothing uses any more stay, so
that going back to what was before encodes nothing; deleting the folder gives their space back. The manifest holds a
digest of the keys that the index refers to, so that rows which were replaced, moved or lost under an index are not
taken for its own.
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

from data.common import fields, system
from data.common.ahead import ahead
from data.common.disk import atomic_write, claim, naming, sha256_file
from data.common.errors import MachineError, UserError
from data.common.words import many
from data.models.identity import IDENTITIES

VERSION = 3
REPAIR = "run python -m data.precompute again, it repairs it"
_digest = fields.text(64)
_name = fields.either(fields.text(4096), fields.one_of(None), missing=None)
_model = {"name": fields.text(4096), "revision": _name, "variant": _name, "config": _name}
_model |= {"prediction_type": _name, "rescale_betas_zero_snr": fields.switch(missing=False)}
MANIFEST = {
    "version": fields.only(VERSION),
    "model": _model,
    "vae": _model,
    "components": IDENTITIES,
    "identity": {"text_encoders": fields.text(), "vae": fields.text()},
    "decoder": fields.text(),
    "resolution": fields.whole(64, 8192),
    "scaling_factor": fields.number(1e-3, 1e3),
    "buckets": fields.each(fields.each(fields.whole(64, 16384), 2), 1, 1000),
    "posterior_shapes": fields.each(fields.each(fields.whole(1, 2048), 4), 1, 1000),
    "text_shape": fields.each(fields.whole(1, 65536), 2),
    "pooled_shape": fields.each(fields.whole(1, 65536), 1),
    "unconditional": fields.whole(0, 2**31),
    "rows": fields.whole(0, 2**31),
    "held_out": fields.whole(0, 2**31),
    "caption_variants": fields.whole(1, 1000, missing=1),
    "caption_orders": fields.either(fields.text(), fields.one_of(None), missing=None),
    "instance_prompt": fields.either(fields.text(), fields.one_of(None), missing=None),
    "validation_prompts": fields.named(fields.whole(0, 2**31), missing={}),  # {prompt: its row in captions.rows}
    "skipped": fields.each(fields.each(fields.text(10**5), 2), 0, 2**31),
    "content": _digest,
    "files": fields.named(_digest),
    "keys": fields.named(_digest),
}
COMMIT_SECONDS = 1  # of work that a killed writer has to do again, besides the batches that the encoders have under way
KEY = np.dtype([("key", "S32"), ("crc", "<u4")])
INDEX = np.dtype(
    [
        ("bucket", "<u2"),  # index of its bucket in the manifest's buckets
        ("picture", "<i4"),  # index of its row in that bucket's posteriors
        ("mirrored", "<i4"),  # the same for the mirror image; without --random_flip the picture's own
        ("first_caption", "<i4"),  # index in captions.npy of the first of its captions
        ("captions", "<i4"),  # how many rows of captions.npy it has: of each caption its variants, one after the other
        ("held_out", "?"),  # not for training
        ("time_ids", "<i4", (6,)),
        ("mirrored_time_ids", "<i4", (6,)),
        ("image_digest", "S16"),  # of the file's bytes: a later precompute tells by it whether the picture changed
        ("caption_digest", "S16"),  # the same for its captions, without their other orders
        ("repeats", "<i4"),  # how often an epoch has it; once in an index of a cache that was written before there were
    ]
)


class Rows:
    """Rows of one shape in one file, fp16, memory-mapped, found by key.

    A row counts from the moment that its key is on disk, where its bytes already are. What lies behind the last key was
    left by a killed writer and is overwritten.
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
                self._file = mmap.mmap(file.fileno(), whole * self.row_bytes, access=mmap.ACCESS_READ)
            self.map = np.frombuffer(self._file, np.float16).reshape(whole, *self.shape)
        self._order = None

    def __len__(self):
        return len(self.keys)

    def room(self, count):
        """Bytes that `count` more rows take on the disk, besides those that a killed writer has claimed already."""
        claimed = system.taken(self.path.stat()) if self.path.exists() else 0
        return max(0, (len(self) + count) * self.row_bytes - claimed)

    def find(self, keys):
        """Indices (n,) of the rows that have the keys (n,) S32, -1 for a key that is not there."""
        if self._order is None:
            self._order = np.argsort(self.keys["key"], kind="stable")
        if not len(self):
            return np.full(len(keys), -1)
        nearest = self._order[np.searchsorted(self.keys["key"], keys, sorter=self._order).clip(max=len(self) - 1)]
        return np.where(self.keys["key"][nearest] == keys, nearest, -1)

    def digest(self, indices):
        """Hex sha256 of the keys at `indices`. Raises UserError when one of these rows is not there."""
        if lost := np.count_nonzero((indices < 0) | (indices >= len(self.map))):
            raise UserError(f"{self.path}: {many(lost, 'row')} of the index not there; {REPAIR}")
        return hashlib.sha256(self.keys["key"][indices]).hexdigest()

    def read(self, indices):
        """A copy of the rows at `indices`, stacked. Their pages go back to the system, so that memory does not grow."""
        rows = np.stack([self[index] for index in indices])
        system.give_back(self._file)
        return rows

    def good(self, index):
        """Whether the row's bytes are those that were written.

        Raises MachineError when the file became shorter: reading what is gone of a map kills a process (SIGBUS).
        """
        if self._file and self._file.size() < len(self.map) * self.row_bytes:
            raise MachineError(f"{self.path}: became shorter while it was read; {REPAIR}")
        return index < len(self.map) and zlib.crc32(self.map[index]) == self.keys["crc"][index]

    def __getitem__(self, index):
        """The row as a float16 array. Raises UserError when its bytes are not those that were written."""
        if not self.good(index):
            raise UserError(f"{self.path}: row {index} is damaged; {REPAIR}")
        return self.map[index]

    def write(self, count, batches, stored=lambda count: None):
        """Write the rows that `batches` yields as (keys, array (B, *shape)), at most `count` of them.

        They are committed every COMMIT_SECONDS; stored(count) is told how many were. The row of a key that is there
        already is written again in its place.
        Raises MachineError before the first row when the disk cannot hold them all.
        """
        if not count:
            return
        size = (len(self) + count) * self.row_bytes
        with (
            open(self.path, "r+b" if self.path.exists() else "w+b") as data,
            open(self.keys_path, "r+b" if self.keys_path.exists() else "w+b") as index,
        ):
            index.truncate(len(self) * KEY.itemsize)  # without the half key that a killed writer left
            claim(data, size)
            writer = _Writer(self, data, index, stored)
            try:
                with ThreadPoolExecutor(1) as pool:
                    for _ in ahead(pool, writer.put, batches, 1):  # one batch is written while the next is made
                        pass
            finally:  # after an error too, for the batches before it
                writer.commit()
            data.truncate(writer.end * self.row_bytes)
        self._open()


class _Writer:
    """Puts rows into their two open files. After an error it writes no more, because the disk cannot be trusted."""

    def __init__(self, rows, data, index, stored):
        self.rows, self.data, self.index, self.stored, self.fine = rows, data, index, stored, True
        self.end, self.committed = len(rows), time.monotonic()
        self.waiting = {}  # {index of a row: its key, not on disk yet}

    def put(self, batch):
        if not self.fine:
            return
        self.fine, end, waiting = False, self.end, {}
        keys, values = batch
        places = self.rows.find(np.array(keys, "S32")).tolist()
        for place, key, row in zip(places, keys, np.ascontiguousarray(values, np.float16)):
            if place < 0:
                place, end = end, end + 1
            self.data.seek(place * self.rows.row_bytes)
            self.data.write(row)
            waiting[place] = np.array((key, zlib.crc32(row)), KEY).tobytes()
        self.end, self.fine = end, True
        self.waiting |= waiting
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self):
        """Put the bytes on disk first, then the keys that make them count.

        All new keys are written at once, so that no kill parts a batch. How a picture is rounded depends on the batch
        that it is encoded in, so what a kill leaves over must be encoded in the batches of a run that nobody killed.
        """
        waiting, keys_file = self.waiting, self.index.fileno()
        if not waiting or not self.fine:
            return
        self.fine, count = False, len(waiting)
        self.data.flush()
        system.sync_data(self.data.fileno())
        with naming(self.rows.keys_path):
            repaired = [place for place in waiting if place < len(self.rows)]
            for place in repaired:
                system.write_at(keys_file, waiting.pop(place), place * KEY.itemsize)
            new, at = b"".join(waiting.values()), min(waiting, default=0) * KEY.itemsize
            if system.write_at(keys_file, new, at) < len(new):  # a disk that fills up takes what still fits
                os.ftruncate(keys_file, at)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            system.sync_data(keys_file)
        waiting.clear()
        self.committed, self.fine = time.monotonic(), True
        self.stored(count)


def write_index(folder, index, captions, names, manifest):
    """Commit a cache: index, captions (M,) <i4, names, and the manifest last. When nothing changed, nothing is written.

    The manifest gets digests of these files and of the keys of all rows that they refer to.
    """
    folder = Path(folder)
    files = {"index.npy": _npy(index), "captions.npy": _npy(captions)}
    files["names.txt"] = "".join(name + "\n" for name in names).encode()
    digests = {name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()}
    keys = _keys(index, _texts(captions, manifest), *_rows(folder, manifest))
    manifest = {"version": VERSION, **manifest, "files": digests, "keys": keys}
    text = json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)
    path = folder / "manifest.json"
    if read_index(folder) and path.read_text() == text:
        return
    path.unlink(missing_ok=True)  # because it describes the index that is replaced now
    for name, blob in files.items():
        with atomic_write(folder / name) as file:
            file.write(blob)
    with atomic_write(path, "w") as file:
        file.write(text)


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getbuffer()


def _rows(folder, manifest):
    """The cache's files of rows: (captions, [posteriors of each bucket])"""
    text_shape, pooled_shape = manifest["text_shape"], manifest["pooled_shape"]
    captions = Rows(folder, captions_name(text_shape), (math.prod(text_shape) + math.prod(pooled_shape),))
    names = map(posteriors_name, manifest["buckets"])
    return captions, [Rows(folder, name, shape) for name, shape in zip(names, manifest["posterior_shapes"])]


def _texts(captions, manifest):
    """The rows of captions.rows that a cache refers to: of its captions, the unconditional one, validation prompts."""
    return np.append(captions, [manifest["unconditional"], *manifest["validation_prompts"].values()])


def _keys(index, captions, caption_rows, posteriors):
    """{file of rows: digest of the keys of those rows that a cache refers to}. Raises UserError for rows not there."""
    keys, bucket = {caption_rows.name: caption_rows.digest(captions)}, np.asarray(index["bucket"])
    pictures = np.stack([index["picture"], index["mirrored"]])
    for i, rows in enumerate(posteriors):
        keys[rows.name] = rows.digest(pictures[:, bucket == i].ravel())
    return keys


def read_index(folder):
    """(index, names of the examples) of a finished cache; None when there is none that can be read."""
    try:
        manifest = read_manifest(folder)
        return with_repeats(np.load(_whole(folder, manifest, "index.npy"))), _names(folder, manifest)
    except UserError:
        return None


def with_repeats(index):
    """An index as INDEX says. One that was written before pictures could repeat gets the field: each comes once."""
    if "repeats" in index.dtype.names:
        return index
    whole = np.ones(len(index), INDEX)
    for name in index.dtype.names:
        whole[name] = index[name]
    return whole


def read_components(folder):
    """The identities of the model's components that a cache was made with; None when there is none that can be read."""
    try:
        return read_manifest(folder)["components"]
    except UserError:
        return None


def read_manifest(folder):
    """The manifest of a finished cache. Raises UserError saying which command makes one."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = fields.loads(path.read_bytes())
        same = manifest.pop("checksum") == _checksum(manifest)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no finished cache here; run python -m data.precompute --output_dir {Path(folder).parent}"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no JSON, or something else
        same = False
    if not same:
        raise UserError(f"{path}: damaged, or of an earlier version; {REPAIR}")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path}: written by another version; run python -m data.precompute again, it keeps what it can use"
        )
    advice = "delete it, and run python -m data.precompute again"
    manifest = fields.check_fields(MANIFEST, manifest, path, advice)
    if len(manifest["buckets"]) != len(manifest["posterior_shapes"]):
        raise UserError(f"{path}: as many posterior_shapes as buckets are needed; {advice}")
    return manifest


def earlier_version(folder):
    """The version of the format that the folder's cache has, where it is an earlier one; else None."""
    try:
        version = json.loads((Path(folder) / "manifest.json").read_bytes())["version"]
        return version if version < VERSION else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _checksum(manifest):
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _whole(folder, manifest, name):
    """The path of one of the cache's files. Raises UserError when it is not the file that the manifest tells of."""
    path = Path(folder) / name
    try:
        whole = sha256_file(path) == manifest["files"].get(name)
    except OSError:
        whole = False
    if not whole:
        raise UserError(f"{path}: not there or damaged; {REPAIR}")
    return path


def _names(folder, manifest):
    return _whole(folder, manifest, "names.txt").read_text(encoding="utf-8").split("\n")[:-1]


def cache_folder(run, given=None):
    """The folder of the cache that a run reads: --cache_dir where it is given, else the one that RUN/run.json names."""
    began = read_began(run)
    return Path(given or (began and began["cache_dir"]) or Path(run) / "cache")


def read_began(run):
    """What a training wrote into RUN/run.json when it began (train/same_run.py); None where there was none."""
    path = Path(run) / "run.json"
    try:
        began = json.loads(path.read_bytes())
        if isinstance(began["cache_dir"], str | None) and isinstance(began["identity"], dict):
            return began
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: damaged; delete it, and name the run's --cache_dir if it has one")


def changed_rows(then, now):
    """What differs between two states of a cache, each (index, names), as people say it: ["1 caption changed", …]"""
    (old_index, old_names), (index, names) = then, now
    old, new = ({name: i for i, name in enumerate(told_apart(some))} for some in (old_names, names))
    common = [name for name in new if name in old]
    a, b = old_index[[old[name] for name in common]], index[[new[name] for name in common]]
    counts = {
        "caption changed": (a["caption_digest"] != b["caption_digest"]).sum(),
        "image changed": (a["image_digest"] != b["image_digest"]).sum(),
        "row added": len(new.keys() - old.keys()),
        "row removed": len(old.keys() - new.keys()),
        "row held out otherwise": (a["held_out"] != b["held_out"]).sum(),
        "row repeated otherwise": (a["repeats"] != b["repeats"]).sum(),
        "row at another resolution or crop": (a["time_ids"] != b["time_ids"]).any(axis=1).sum(),
    }
    moved = common != [name for name in old if name in new]
    return [f"{count:,} {_plural(what, count)}" for what, count in counts.items() if count] + ["another order"] * moved


def changed_facts(then, now):
    """What two manifests say otherwise of how the rows were encoded, as people say it."""
    (old_length, _), (length, _) = then["text_shape"], now["text_shape"]
    words = other_orders(then, now)
    if length != old_length:
        words.append(f"captions at another length ({old_length - 2} there, {length - 2} here)")
    elif then["identity"]["text_encoders"] != now["identity"]["text_encoders"]:
        words.append("captions by other text encoders or in another precision")
    if then["identity"]["vae"] != now["identity"]["vae"]:
        words.append("images by another VAE or in another precision")
    if then["decoder"] != now["decoder"]:
        words.append("images by another decoder")
    return words


def other_orders(then, now):
    """What two manifests say otherwise of the captions' orders: ["captions in 4 orders instead of 3"]"""
    (old, new) = (facts["caption_variants"] for facts in (then, now))
    if old != new:
        return [f"captions in {many(new, 'order')} instead of {old}"]
    return ["captions in other orders"] if then["caption_orders"] != now["caption_orders"] else []


def _plural(what, count):
    noun, _, rest = what.partition(" ")
    return what if count == 1 else f"{noun}s {rest}"


def told_apart(names):
    """The names, with a count behind a repeated one, because one picture may have several captions."""
    seen = collections.Counter()
    for name in names:
        seen[name] += 1
        yield f"{name}\n{seen[name]}" if seen[name] > 1 else name  # which is no name, because names have one line


class Cache:
    """A finished cache, open for reading. `manifest` says what it was made from.

    members[i] are the indices of the examples to train on in bucket i, each as often as an epoch has it; an epoch has
    `epoch` images in all, of len(cache) examples.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        # In memory, some 100 bytes an example, because Windows does not let a precompute replace a file that is mapped.
        self.index = with_repeats(np.load(_whole(folder, self.manifest, "index.npy")))
        self.caption_rows = np.load(_whole(folder, self.manifest, "captions.npy"))
        self.buckets, self.text_shape = self.manifest["buckets"], self.manifest["text_shape"]
        self.text_size = math.prod(self.text_shape)
        self.captions, self.posteriors = _rows(folder, self.manifest)
        self._check_keys()
        bucket_of, held_out = np.asarray(self.index["bucket"]), np.asarray(self.index["held_out"])
        members = [np.flatnonzero((bucket_of == i) & ~held_out) for i in range(len(self.buckets))]
        self.members = [np.repeat(some, self.index["repeats"][some]) for some in members]
        self.epoch, self._length = sum(map(len, self.members)), sum(map(len, members))
        if not len(self):
            raise UserError(
                f"{self.folder}: {many(len(self.index), 'row')}, all held out; use a smaller --validation_fraction"
            )

    def _check_keys(self):
        """Raise UserError when a row that the index refers to is not there, or is another one now."""
        keys = _keys(self.index, _texts(self.caption_rows, self.manifest), self.captions, self.posteriors)
        for name in keys:
            if keys[name] != self.manifest["keys"].get(name):
                raise UserError(f"{self.folder / name}.rows: not the rows that the index was made for; {REPAIR}")

    def __len__(self):
        return self._length

    def names(self, examples):
        """The names that messages call the examples by."""
        try:
            names = _names(self.folder, self.manifest)
        except UserError:  # not raised, because the message that asks for names is about something worse
            return [f"row {i}" for i in examples]
        return [names[i] for i in examples]

    def batch(self, examples, mirrored, empty, which=0.0, variant=0.0):
        """The arrays of B examples of one bucket, as fresh copies.

        mirrored (B,) bool: take the mirror image where one is cached. empty (B,) bool: take the unconditional embedding
        instead of the caption's. which (B,), 0 <= which < 1: where among the example's captions to take one.
        variant (B,), 0 <= variant < 1: where among that caption's variants.
        -> dict of mean, std (B, 4, h, w), text (B, L, 2048), pooled (B, 1280), all fp16, and time_ids (B, 6) int32
        """
        records = self.index[np.asarray(examples)]
        pictures = np.where(mirrored, records["mirrored"], records["picture"])
        variants = self.manifest["caption_variants"]
        caption = (np.float64(which) * (records["captions"] // variants)).astype(int)
        order = (np.float64(variant) * variants).astype(int)
        places = records["first_caption"] + caption * variants + order
        captions = np.where(empty, self.manifest["unconditional"], self.caption_rows[places])
        posteriors = self.posteriors[records["bucket"][0]].read(pictures)
        text, pooled = self.texts(captions)
        return dict(
            mean=posteriors[:, 0],
            std=posteriors[:, 1],
            text=text,
            pooled=pooled,
            time_ids=np.where(np.asarray(mirrored)[:, None], records["mirrored_time_ids"], records["time_ids"]),
        )

    def texts(self, rows):
        """text (B, L, 2048) and pooled (B, 1280), fp16, of B rows of captions.rows, as fresh copies."""
        flat = self.captions.read(rows)
        return flat[:, : self.text_size].reshape(-1, *self.text_shape), flat[:, self.text_size :]


def captions_name(text_shape):
    """The name, without its ending, of the file that holds the embeddings of texts of this shape."""
    return "captions" if text_shape[0] <= 77 else f"captions-{text_shape[0]}"


def posteriors_name(bucket):
    """The name, without its ending, of the file that holds the posteriors of one bucket."""
    return f"posteriors-{bucket[0]}x{bucket[1]}"
