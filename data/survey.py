"""What each example is made of: its bucket and the keys that find its rows; and what changed since the last time."""

import collections
import hashlib

import numpy as np

from data import buckets
from data.cache import INDEX, other_orders, told_apart
from data.common.ahead import ahead
from data.common.errors import UserError
from data.common.words import many
from data.images import DECODER, upright_size

EXAMPLES_AHEAD = 32
ROW = np.dtype(
    [
        ("index", "<i8"),  # of the example in its source
        ("picture_key", "S32"),
        ("mirrored_key", "S32"),  # the picture's own without --random_flip
        ("empty", "?"),  # whether it has a caption without a word
        *((name, INDEX[name]) for name in INDEX.names if name not in ("picture", "mirrored")),
    ]
)


class Skipped:
    """Why rows or pictures cannot be used: `reasons`, {row or picture: [the name that messages call it by, reason]}."""

    def __init__(self, allowed):
        self.allowed, self.reasons = allowed, {}

    def note(self, which, name, error):
        """`which` row or picture cannot be used because of `error`, a UserError."""
        self.reasons[which] = [name, str(error).removeprefix(f"{name}: ")]

    def add(self, which, name, error):
        """The same; without --skip_bad it ends the command."""
        self.note(which, name, error)
        if not self.allowed:
            raise error

    def refuse_unless_allowed(self, count):
        """Without --skip_bad, list all that was noted of `count` rows, and raise UserError."""
        if self.allowed or not self.reasons:
            return
        problems = [f"{name}: {reason}" for name, reason in self.reasons.values()]
        if len(problems) == 1:
            raise UserError(problems[0])
        print("\n".join(problems), flush=True)
        raise UserError(
            f"{len(problems):,} of {many(count, 'row')} cannot be used, listed above; repair or remove them, "
            "or leave them out with --skip_bad"
        )


def key(*made_of):
    """32 bytes that differ when anything in `made_of` does."""
    return hashlib.sha256(repr(made_of).encode()).digest()


def image_digest(data):
    """The digest of a picture's bytes as the index holds it, that is without zeros at its end, which numpy drops."""
    return hashlib.sha256(data).digest()[:16].rstrip(b"\0")


def survey(examples, encoders, some_buckets, random_flip, validation_fraction, pool, skipped):
    """Look at every example without encoding it.

    encoders: fingerprints of those that will encode text and pictures. Examples that cannot be used go to `skipped`,
    all of them, before the first one ends the command.
    -> (rows (N,) ROW, the keys (M,) S32 of all their captions, N names)
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
            return examples.name(index), error, None
        image = hashlib.sha256(data).digest()
        own = example.captions[:: examples.wording.variants]  # without their other orders
        words = hashlib.sha256("\0".join(own).encode()).digest()
        pictures = (
            key("picture", vae_print, DECODER, image, some_buckets[bucket], flip) for flip in (False, random_flip)
        )
        empty = not all(caption.strip() for caption in example.captions)
        held_out = int.from_bytes(image[:8], "big") < validation_fraction * 2**64  # by content alone
        captions = b"".join(key("caption", text_print, caption) for caption in example.captions)
        count = len(example.captions)  # where the first of them stands is counted below
        row = (index, *pictures, empty, bucket, 0, count, held_out, ids, mirrored_ids, image[:16], words[:16])
        return example.name, (*row, example.repeats), captions

    rows, names, caption_keys = np.empty(len(examples), ROW), [], bytearray()
    for index, (name, row, captions) in enumerate(ahead(pool, describe, range(len(examples)), EXAMPLES_AHEAD)):
        if isinstance(row, UserError):
            skipped.note(index, name, row)
        else:
            rows[len(names)] = row
            names.append(" ".join(name.split()))  # one line of names.txt
            caption_keys += captions
    skipped.refuse_unless_allowed(len(examples))
    rows = rows[: len(names)]
    rows["first_caption"] = first_captions(rows["captions"])
    if validation_fraction and not rows["held_out"].any() and len(np.unique(rows["image_digest"])) > 1:
        rows["held_out"] = rows["image_digest"] == np.sort(rows["image_digest"])[0]  # one picture at least
    if names and rows["held_out"].all():
        raise UserError(
            f"--validation_fraction {validation_fraction}: would hold out all of {many(len(rows), 'row')}, and leave "
            "none to train on; add pictures, or name a smaller share"
        )
    return rows, np.frombuffer(bytes(caption_keys), "S32"), names


def first_captions(counts):
    """Where each example's captions begin in a list of all, from how many each has."""
    return np.cumsum(counts) - counts


def missing(keys, rows):
    """The indices of those `keys` (n,) whose row is not in `rows`, or is damaged there; of equal keys, the first."""
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return first[[place < 0 or not rows.good(place) for place in rows.find(keys[first])]]


def changes(rows, names, pictures, captions, facts, before, besides):
    """What is to be encoded and why: ("3 of 1,221 rows", "2 captions changed, 1 image new; 1 row removed").

    pictures: what is to be encoded, as indices of rows and whether mirrored, two arrays. captions: the row of each
    caption that is, and which of its orders, two arrays. facts: what the manifest will say of the encoders and
    captions. before: (index, names, manifest) of the cache as it is, or None. besides: what is to be encoded that
    belongs to no row, in words.
    """
    old_index, old_names, old_facts = before or (np.empty(0, INDEX), [], {})
    names = list(told_apart(names))
    old = {name: i for i, name in enumerate(told_apart(old_names))}
    was = np.array([old.get(name, -1) for name in names], int)
    another_length = before and old_facts["text_shape"][0] != facts["text_shape"][0]

    def reason(noun, i, mirrored=False, order=0):
        if was[i] < 0 or order and order >= old_facts["caption_variants"]:
            return "new"
        there, here = old_index[was[i]], rows[i]
        if there[f"{noun}_digest"] != here[f"{noun}_digest"]:
            return "changed"
        if order and old_facts["caption_orders"] != facts["caption_orders"]:
            return "changed"
        if noun == "image" and (there["time_ids"] != here["time_ids"]).any():
            return "at another resolution"
        if noun == "caption" and another_length:
            return "at another length"
        if mirrored and there["mirrored"] == there["picture"]:
            return "mirrored"
        if noun == "image" and old_facts["decoder"] != facts["decoder"]:
            return "for another decoder"
        encoder = "vae" if noun == "image" else "text_encoders"
        same = old_facts["identity"][encoder] == facts["identity"][encoder]
        return "damaged or lost" if same else "for another encoder"

    why = collections.Counter(
        ("variant" if order else "caption", reason("caption", i, order=order)) for i, order in zip(*captions)
    )
    why += collections.Counter(("image", reason("image", i, mirrored)) for i, mirrored in zip(*pictures))
    groups = [[f"{many(count, noun)} {because}" for (noun, because), count in why.items()] + besides]

    touched = np.union1d(captions[0], pictures[0]).astype(int)
    others = np.setdiff1d(np.arange(len(rows)), touched)
    known = others[was[others] >= 0]
    there, here = old_index[was[known]], rows[known]
    differ = (there["image_digest"] != here["image_digest"]) | (there["caption_digest"] != here["caption_digest"])
    differ |= (there["time_ids"] != here["time_ids"]).any(axis=1)
    differ |= (there["mirrored"] == there["picture"]) != (here["mirrored_key"] == here["picture_key"])
    sides, repeats = (
        (old_index[field][was[was >= 0]] != rows[field][was >= 0]).sum() for field in ("held_out", "repeats")
    )
    without, lengths = len(others) - len(known), 0
    if another_length:
        kept = np.setdiff1d(np.flatnonzero(was >= 0), captions[0])
        kept = kept[old_index["caption_digest"][was[kept]] == rows["caption_digest"][kept]]
        kept = kept[~np.isin(rows["caption_digest"][kept], rows["caption_digest"][captions[0]])]
        _, first = np.unique(rows["caption_digest"][kept], return_index=True)  # equal ones are encoded once
        lengths = (rows["captions"][kept[first]] // facts["caption_variants"]).sum()
    for count, noun, because in (
        (without, "row", "added, encoded already" if before else "without an index, encoded already"),
        (differ.sum(), "row", "changed, encoded already"),
        (lengths, "caption", "at another length, encoded already"),
        (sides, "row", "held out otherwise"),
        (repeats, "row", "repeated otherwise"),
        (len(old.keys() - set(names)), "row", "removed"),
    ):
        if count:
            groups.append([f"{many(count, noun)} {because}"])
    if before and not np.any(captions[1]):
        groups.append(other_orders(old_facts, facts))
    if before:
        groups.append(other_models(old_facts, facts))
    if (np.diff(was[was >= 0]) < 0).any():
        groups.append(["another order"])
    if before and not any(groups):
        groups.append(other_facts(old_facts, facts))
    why = "; ".join(", ".join(group) for group in groups if group)
    return f"{len(touched):,} of {many(len(rows), 'row')}", why or "nothing changed"


def other_models(then, now):
    """What two manifests say otherwise of the model: ["the model's or the VAE's name"], and how it is noised."""
    named = [name for name in then["model"] if name not in ("prediction_type", "rescale_betas_zero_snr")]
    names = any(then[model][name] != now[model][name] for model in ("model", "vae") for name in named)
    noised = _components(then).get("scheduler") != _components(now).get("scheduler")
    return ["the model's or the VAE's name"] * names + ["the noise schedule or the prediction type"] * noised


def other_facts(then, now):
    """What else two manifests of the same rows say otherwise, in words."""
    found = {
        "the encoders or their precision, encoded already": then["identity"] != now["identity"],
        "the decoder of pictures, encoded already": then["decoder"] != now["decoder"],
        "the model's files": _components(then) != _components(now),
        "the buckets": [*map(tuple, then["buckets"])] != [*map(tuple, now["buckets"])],
        "the trigger word": then["instance_prompt"] != now["instance_prompt"],
        "the validation prompts": list(then["validation_prompts"]) != list(now["validation_prompts"]),
    }
    return [words for words, differ in found.items() if differ]


def _components(facts):
    """What a manifest says of its model's components, without where their files were seen."""
    return {name: (of["config"], of["content"]) for name, of in facts["components"].items()}
