"""What each example is made of: its bucket and the keys that find its rows; and what changed since the last time."""

import collections
import hashlib

import numpy as np

from data import buckets
from data.cache import INDEX, told_apart
from data.common.ahead import ahead
from data.common.safe import UserError
from data.images import upright_size

EXAMPLES_AHEAD = 32
ROW = np.dtype(
    [
        ("index", "<i8"),  # of the example in its source
        ("picture_key", "S32"),
        ("mirrored_key", "S32"),  # the picture's own without --random_flip
        ("caption_key", "S32"),
        *((name, INDEX[name]) for name in INDEX.names if name not in ("picture", "mirrored", "caption")),
    ]
)


class Skipped:
    """Why rows or pictures cannot be used. Without --skip_bad the first reason ends the command."""

    def __init__(self, allowed):
        self.allowed, self.reasons = allowed, {}

    def add(self, which, name, error):
        """`which` row or picture, called `name` in messages, cannot be used because of `error`, a UserError."""
        if not self.allowed:
            raise error
        self.reasons[which] = [name, str(error).removeprefix(f"{name}: ")]


def key(*made_of):
    """32 bytes that differ when anything in `made_of` does."""
    return hashlib.sha256(repr(made_of).encode()).digest()


def image_digest(data):
    """The digest of a picture's bytes as the index holds it, that is without zeros at its end, which numpy drops."""
    return hashlib.sha256(data).digest()[:16].rstrip(b"\0")


def survey(examples, encoders, some_buckets, random_flip, validation_fraction, pool, skipped):
    """Look at every example without encoding it.

    encoders: fingerprints of those that will encode text and pictures. Examples that cannot be used go to `skipped`.
    -> (rows (N,) ROW, N names)
    """
    text_print, vae_print = encoders

    def describe(index):
        try:
            example = examples[index]
            data = example.data()
            size = upright_size(data, example.name)
            bucket = buckets.nearest(size, some_buckets)
            ids, mirrored_ids = buckets.time_ids(size, some_buckets[bucket], example.name)
        except UserError as error:
            return examples.name(index), error
        image, words = hashlib.sha256(data).digest(), hashlib.sha256(example.caption.encode()).digest()
        plain, mirrored = (
            key("picture", vae_print, image, some_buckets[bucket], flip) for flip in (False, random_flip)
        )
        caption = key("caption", text_print, example.caption)
        held_out = int.from_bytes(image[:8], "big") < validation_fraction * 2**64  # by content alone
        row = (index, plain, mirrored, caption, bucket, held_out, ids, mirrored_ids, image[:16], words[:16])
        return example.name, row

    rows, names = np.empty(len(examples), ROW), []
    for index, (name, row) in enumerate(ahead(pool, describe, range(len(examples)), EXAMPLES_AHEAD)):
        if isinstance(row, UserError):
            skipped.add(index, name, row)
        else:
            rows[len(names)] = row
            names.append(" ".join(name.split()))  # one line of names.txt
    return rows[: len(names)], names


def missing(keys, rows):
    """The indices of those `keys` (n,) whose row is not in `rows`, or is damaged there; of equal keys, the first."""
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return first[[place < 0 or not rows.good(place) for place in rows.find(keys[first])]]


def changes(rows, names, pictures, captions, before, also):
    """What is to be encoded and why: ("3 of 1,221 rows", "2 captions changed, 1 image new; 1 row removed").

    pictures: indices of rows and whether mirrored, two arrays. captions: indices of rows. before: (index, names) of the
    cache as it is, or None. also: reasons besides those of the rows.
    """
    old_index, old_names = before or (np.empty(0, INDEX), [])
    names, old = list(told_apart(names)), {name: i for i, name in enumerate(told_apart(old_names))}

    def reason(noun, i, mirrored=False):
        was = old.get(names[i])
        if was is None:
            return "new"
        if old_index[f"{noun}_digest"][was] != rows[f"{noun}_digest"][i]:
            return "changed"
        if noun == "image" and (old_index["time_ids"][was] != rows["time_ids"][i]).any():
            return "at another resolution"
        if mirrored and old_index["mirrored"][was] == old_index["picture"][was]:
            return "mirrored"
        return "for another encoder, or damaged"

    why = collections.Counter(("caption", reason("caption", i)) for i in captions)
    why += collections.Counter(("image", reason("image", i, mirrored)) for i, mirrored in zip(*pictures))
    removed = len(old.keys() - set(names))
    reasons = [f"{count:,} {noun}{'s' * (count > 1)} {because}" for (noun, because), count in why.items()] + also
    gone = f"; {removed:,} row{'s' * (removed > 1)} removed" if removed else ""
    touched = np.union1d(captions, pictures[0])
    return f"{len(touched):,} of {len(rows):,} rows", (", ".join(reasons) or "nothing changed") + gone
