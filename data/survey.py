"""What each example is made of: the keys that its rows are found by, its size, and what changed since the last time."""

import collections
import hashlib

import numpy as np

from data import buckets
from data.cache import INDEX
from data.common.ahead import ahead
from data.common.safe import UserError
from data.images import upright_size

EXAMPLES_AHEAD = 32
ROW = np.dtype(
    [
        ("number", "<i8"),  # of the example in its source
        ("picture_key", "S32"),
        ("mirrored_key", "S32"),  # the picture's own without --random_flip
        ("caption_key", "S32"),
        *((name, INDEX[name]) for name in INDEX.names if name not in ("picture", "mirrored", "caption")),
    ]
)


def key(*made_of):
    """32 bytes that differ when anything in `made_of` does."""
    return hashlib.sha256(repr(made_of).encode()).digest()


def image_digest(data):
    """Of a picture's bytes, as the index holds it: numpy drops zeros at the end of a string."""
    return hashlib.sha256(data).digest()[:16].rstrip(b"\0")


def survey(examples, settings, sizes, text_print, vae_print, pool, bad):
    """Look at every example without encoding it. -> (rows (N,) ROW, N names)

    text_print, vae_print: fingerprints of what will encode. bad(name, error): called for an example that cannot be used;
    it raises, or leaves the example out.
    """

    def describe(number):
        try:
            example = examples[number]
            data = example.data()
            image = hashlib.sha256(data).digest()
            upright = upright_size(data, example.name)
            size = buckets.nearest(upright, sizes)
            ids, mirrored_ids = buckets.time_ids(upright, sizes[size], example.name)
        except UserError as error:
            return examples.name(number), error
        plain, mirrored = (key("picture", vae_print, image, sizes[size], m) for m in (False, settings.random_flip))
        held_out = (
            int.from_bytes(image[:8], "big") < settings.validation_fraction * 2**64
        )  # by content: other rows do not matter
        caption = key("caption", text_print, example.caption)
        words = hashlib.sha256(example.caption.encode()).digest()
        return example.name, (
            number,
            plain,
            mirrored,
            caption,
            size,
            held_out,
            ids,
            mirrored_ids,
            image[:16],
            words[:16],
        )

    rows, names = np.empty(len(examples), ROW), []
    for name, row in ahead(pool, describe, range(len(examples)), EXAMPLES_AHEAD):
        if isinstance(row, UserError):
            bad(name, row)
        else:
            rows[len(names)] = row
            names.append(" ".join(name.split()))  # one line of names.txt
    return rows[: len(names)], names


def missing(keys, rows):
    """Numbers of those of `keys` (n,) whose row is not in `rows`, or damaged there; the first of equal keys, in order."""
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return first[[place < 0 or not rows.good(place) for place in rows.find(keys[first])]]


def told_apart(names):
    """The names, with a number behind those that were there before: one picture may have several captions."""
    seen = collections.Counter()
    for name in names:
        seen[name] += 1
        yield f"{name}\n{seen[name]}" if seen[name] > 1 else name  # no name has two lines


def changes(rows, names, pictures, captions, before, also):
    """What is to be encoded and why: ("3 of 1,221 rows", "2 captions changed, 1 image new; 1 row removed").

    pictures: numbers of rows and whether mirrored, two arrays; captions: numbers of rows; before: (index, names) of the
    cache as it is, or None; also: reasons beside those of the rows.
    """
    index, old_names = before or (np.empty(0, INDEX), [])
    names, old = list(told_apart(names)), {name: i for i, name in enumerate(told_apart(old_names))}

    def reason(noun, number, mirrored=False):
        was = old.get(names[number])
        if was is None:
            return "new"
        if index[f"{noun}_digest"][was] != rows[f"{noun}_digest"][number]:
            return "changed"
        if noun == "image" and (index["time_ids"][was] != rows["time_ids"][number]).any():
            return "at another resolution"
        if mirrored and index["mirrored"][was] == index["picture"][was]:
            return "mirrored"
        return "for another encoder, or damaged"

    why = collections.Counter(("caption", reason("caption", number)) for number in captions)
    why += collections.Counter(("image", reason("image", *picture)) for picture in zip(*pictures))
    removed = len(old.keys() - set(names))
    reasons = [f"{count:,} {noun}{'s' * (count > 1)} {because}" for (noun, because), count in why.items()] + also
    gone = f"; {removed:,} row{'s' * (removed > 1)} removed" if removed else ""
    touched = np.union1d(captions, pictures[0])
    return f"{len(touched):,} of {len(rows):,} rows", (", ".join(reasons) or "nothing changed") + gone
