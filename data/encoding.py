"""The two long steps of precompute: captions through the text encoders, then pictures through the VAE.

Workers read, decode and stack the next batches while one is encoded and the one before it is written.
"""

import itertools
import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.buckets import resize_and_crop
from data.cache import Rows
from data.common import errors
from data.common.ahead import ahead
from data.common.words import many, shortened
from data.dataset import Examples
from data.encoders import VAE, TextEncoders
from data.images import read_rgb
from data.progress import progress
from data.survey import EXAMPLES_AHEAD, image_digest

CAPTIONS_AT_ONCE = 64
PICTURES_AT_ONCE = 16  # at most; of large ones as many as BYTES_AT_ONCE allow
BYTES_AT_ONCE = 2**23  # for one channel of their pixels in the VAE's dtype: 4 pictures of 1024 × 1024 in half precision
BATCHES_AHEAD = 2  # batches of pictures that the workers stack before the VAE asks for them


@dataclass(frozen=True)
class Draft:
    """A cache in the making: what it is to hold, and the files that hold it or will."""

    folder: Path
    texts: TextEncoders
    vae: VAE
    buckets: list[tuple[int, int]]
    examples: Examples
    rows: np.ndarray  # what each example is made of, as survey tells it
    caption_keys: np.ndarray  # of all their captions, one after the other
    prompts: dict[str, bytes]  # the validation prompts and their keys, which find rows of captions
    names: list[str]
    unconditional: bytes  # the key of the unconditional embedding, which is one row of captions
    zeros: bool  # whether that is zeros, as SDXL's is, or the embedding of the empty caption
    captions: Rows
    posteriors: list[Rows]  # of each bucket
    facts: dict  # what the manifest says of the model, the encoders and their rows

    def example(self, row):
        return self.examples[int(self.rows["index"][row])]

    def row_of(self, captions):
        """The rows that have the `captions`, indices into caption_keys."""
        return np.searchsorted(self.rows["first_caption"], captions, side="right") - 1

    def to_encode(self, indices):
        """Yield (row, index, text) of the captions at `indices` of caption_keys. Each row is read once."""
        for row, some in itertools.groupby(zip(self.row_of(indices), indices), operator.itemgetter(0)):
            captions = self.example(row).captions
            for _, index in some:
                yield row, index, captions[index - self.rows["first_caption"][row]]

    def name(self, row):
        """The name that messages call the row's example by."""
        return self.examples.name(int(self.rows["index"][row]))


@dataclass(frozen=True)
class Todo:
    """What of a draft is not on disk yet."""

    unconditional: bool
    captions: np.ndarray  # indices into caption_keys
    prompts: dict[str, bytes]  # of the draft's
    pictures: list[tuple[np.ndarray, np.ndarray]]  # of each bucket: indices of rows, and whether it is the mirror image

    def texts(self):
        """How many embeddings."""
        return len(self.captions) + len(self.prompts) + self.unconditional

    def images(self):
        """How many posteriors."""
        return sum(len(rows) for rows, _ in self.pictures)


def encode_captions(draft, todo, crew, device, stop):
    """Encode the captions and validation prompts that are missing, and the unconditional embedding."""
    if not todo.texts():
        return
    texts, long = crew.load(draft.texts, device), []
    if todo.unconditional:
        draft.captions.write(1, unconditional(draft, texts))
    if len(todo.captions):
        with progress("captions", "caption", len(todo.captions)) as bar:
            embeddings = captions_in_batches(draft, crew, texts, todo.captions, stop, long)
            draft.captions.write(len(todo.captions), embeddings, bar.update)
    stop_if_asked(stop)
    if todo.prompts:
        draft.captions.write(len(todo.prompts), texts.encode([(list(todo.prompts.values()), list(todo.prompts))]))
    for prompt in filter(texts.truncated, todo.prompts):
        print(
            f"--validation_prompt {shortened(prompt)}: longer than CLIP reads; what follows {texts.tokens} tokens is "
            "not seen",
            flush=True,
        )
    if long:
        print(
            f"longer than CLIP reads: {many(len(long), 'caption')}; what follows {texts.tokens} tokens is not seen, "
            f"e.g. of {draft.name(long[0][0])}: {shortened(long[0][1])}",
            flush=True,
        )
    texts.unload()  # so that they and the VAE are never in memory together


def encode_pictures(draft, todo, crew, device, stop, pool, failed):
    """Encode the pictures that are missing, bucket by bucket. Those that cannot be used go to `failed`, by digest."""
    if not todo.images():
        return
    vae = crew.load(draft.vae, device)
    with progress("pictures", "image", todo.images()) as bar:
        for bucket, posteriors, (rows, mirrored) in zip(draft.buckets, draft.posteriors, todo.pictures):
            pictures = decoded(draft, bucket, zip(rows, mirrored), pool, failed, bar)
            encoded = posteriors_in_batches(draft, crew, vae, bucket, pictures, stop, pool, failed, bar)
            posteriors.write(len(rows), encoded, bar.update)
            stop_if_asked(stop)


def stop_if_asked(stop):
    if stop.received:
        raise errors.Stopped(stop.received, "stopped, what is encoded is kept; run the same command to go on")


def unconditional(draft, texts):
    """The one batch (keys, embeddings) that is the unconditional embedding: zeros, or the empty caption's."""
    keys = [draft.unconditional]
    if draft.zeros:
        return [(keys, np.zeros((1, *draft.captions.shape)))]
    return texts.encode([(keys, [""])])


def captions_in_batches(draft, crew, texts, indices, stop, long):
    """Yield (keys, embeddings) of the captions at `indices`, until a signal stops it.

    Those that are longer than CLIP reads are put into the list `long`, each as (row, text).
    """

    def started():
        for batch in batches(draft.to_encode(indices), CAPTIONS_AT_ONCE):
            if stop.received:
                return
            rows, places, captions = zip(*batch)
            long.extend((row, text) for row, text in zip(rows, captions) if texts.truncated(text))
            yield draft.caption_keys[list(places)], list(captions)

    for keys, embeddings in crew.encode(texts, started(), stop):
        yield keys, embeddings.numpy()


def decoded(draft, bucket, pictures, pool, failed, bar):
    """Yield (row, key, pixels) of each (row, mirrored) that can be read, decoded ahead by the workers."""

    def decode(picture):
        row, mirrored = picture
        example = draft.example(row)
        try:
            data = example.data()
            if image_digest(data) != draft.rows["image_digest"][row]:
                raise errors.UserError(f"{example.name}: changed since precompute began; run it again")
            pixels = resize_and_crop(read_rgb(data, example.name), bucket, example.name)
        except errors.UserError as error:
            return row, None, error
        if mirrored:
            return row, draft.rows["mirrored_key"][row], pixels[:, ::-1]
        return row, draft.rows["picture_key"][row], pixels

    for row, key, result in ahead(pool, decode, pictures, EXAMPLES_AHEAD):
        if key is None:
            bar.total -= 1
            failed.add(draft.rows["image_digest"][row], draft.name(row), result)
        else:
            yield row, key, result


def posteriors_in_batches(draft, crew, vae, bucket, pictures, stop, pool, failed, bar):
    """Yield (keys, posteriors (B, 2, 4, h, w) fp16) of the (row, key, pixels) `pictures`, until a signal stops it."""
    at_once = min(PICTURES_AT_ONCE, max(1, BYTES_AT_ONCE // (bucket[0] * bucket[1] * vae.dtype.itemsize)))

    def stack(batch):
        rows, keys, pixels = zip(*batch)
        return (rows, np.array(keys)), vae.stage(np.stack(pixels))

    def stacked():
        for batch in ahead(pool, stack, batches(pictures, at_once), BATCHES_AHEAD):
            if stop.received:
                return
            yield batch

    for (rows, keys), posteriors in crew.encode(vae, stacked(), stop):
        posteriors = posteriors.numpy()
        finite = np.isfinite(posteriors).all(axis=(1, 2, 3, 4))
        for i in np.flatnonzero(~finite):
            row, name = rows[i], draft.name(rows[i])
            problem = f"{name}: the VAE gives numbers that are not finite, in fp32 too; replace or remove it"
            bar.total -= 1
            failed.add(draft.rows["image_digest"][row], name, errors.NumbersError(problem))
        yield keys[finite], posteriors[finite]


def batches(items, size):
    """Lists of `size` items, the last one shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
