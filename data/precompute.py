"""python -m data.precompute: pictures and captions -> RUN/cache. Run again, it encodes only what is not there."""

import contextlib
import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import buckets, check
from data.cache import INDEX, Rows, moments_name, read_index, write_index
from data.common import safe
from data.common.ahead import ahead
from data.common.flags import parse
from data.dataset import open_examples
from data.images import read_rgb
from data.models.files import Model
from data.survey import EXAMPLES_AHEAD, changes, image_digest, key, missing, survey

CONTENT = (
    "picture_key",
    "mirrored_key",
    "caption_key",
    "time_ids",
    "held_out",
)  # what a resumed run must find unchanged
CAPTIONS_AT_ONCE = 64
BYTES_AT_ONCE = (
    2**23
)  # of one channel of pixels in the VAE's dtype: four pictures of 1024 × 1024 in half precision, or up to ...
PICTURES_AT_ONCE = 16  # ... this many small ones
BATCHES_AHEAD = 2  # of pictures, put together by the workers before the VAE asks for them


def main(argv):
    settings = parse("data.precompute", argv)
    if settings.resolution % buckets.STEP:
        raise safe.UserError(f"--resolution {settings.resolution}: must be a multiple of {buckets.STEP}")
    folder = settings.output_dir
    run = contextlib.nullcontext(Path(folder)) if settings.explain else safe.run_folder(folder, writes=["cache"])
    with run as folder, ThreadPoolExecutor(min(32, os.cpu_count())) as pool:
        try:
            precompute(settings, folder / "cache", pool)
        finally:
            pool.shutdown(cancel_futures=True)


def precompute(settings, folder, pool):
    """Bring the cache in `folder` to what the settings ask for."""
    making = Making(settings, folder, pool)
    which, why = making.changes()
    print(f"{which} to encode: {why}; {making.bytes() / 2**20:,.0f} MiB in {folder}", flush=True)
    safe.need_space(folder, making.bytes(), "the cache")
    if settings.explain:
        return
    began = time.perf_counter()
    making.encode_captions()
    between = time.perf_counter()
    making.encode_pictures()
    ended = time.perf_counter()
    making.commit()
    print(
        f"{which} encoded: {why}; text in {between - began:.1f} s, pictures in {ended - between:.1f} s, loading included"
    )
    if making.skipped:
        print(f"{len(making.skipped):,} rows left out, e.g. {': '.join(making.skipped[0])}")


class Making:
    """A cache in the making: what every example is made of, what of that is not there yet, and how it gets there."""

    def __init__(self, settings, folder, pool):
        self.settings, self.folder, self.pool, self.stop = settings, folder, pool, None
        self.examples = open_examples(settings)

        # seconds to import: after all that can be refused without it
        from data.encoders import VAE, TextEncoders

        self.device = check.device()
        check.precision(settings.mixed_precision, self.device)
        variant = settings.variant or (None if settings.mixed_precision == "no" else "fp16")
        self.model = Model(settings.pretrained_model_name_or_path, settings.revision, variant)
        vae_name = settings.pretrained_vae_model_name_or_path
        self.vae_model = Model(vae_name, None, variant) if vae_name else self.model
        self.texts, self.vae = (
            TextEncoders(self.model, settings.mixed_precision),
            VAE(self.vae_model, settings.mixed_precision),
        )
        self.zeros = self.model.index().get("force_zeros_for_empty_prompt", True)
        self.unconditional = key("unconditional", self.texts.fingerprint, self.zeros)
        self.sizes = buckets.sizes(settings.resolution, settings.buckets)
        self.skipped, self.failed = Skipped(settings.skip_bad), {}  # failed: {digest of a picture: why}

        prints = self.texts.fingerprint, self.vae.fingerprint
        self.rows, self.names = survey(self.examples, settings, self.sizes, *prints, pool, self.skipped)
        self.captions = Rows(folder, "captions", (np.prod(self.texts.text_shape) + self.texts.pooled_shape[0],))
        self.moments = [Rows(folder, moments_name(size), self.vae.shape(size)) for size in self.sizes]
        self.new_captions = missing(self.rows["caption_key"], self.captions)
        self.new_pictures = [pictures_to_encode(self.rows, i, of_size) for i, of_size in enumerate(self.moments)]
        self.blank = missing(np.array([self.unconditional], "S32"), self.captions)

    def changes(self):
        """(which, why) in words."""
        before = read_index(self.folder)
        also = ["the unconditional embedding"] if before and len(self.blank) else []
        pictures = [np.concatenate(both) for both in zip(*self.new_pictures)]
        return changes(self.rows, self.names, pictures, self.new_captions, before, also)

    def bytes(self):
        """What the new rows take on disk."""
        pictures = sum(of_size.room(len(numbers)) for (numbers, _), of_size in zip(self.new_pictures, self.moments))
        return self.captions.room(len(self.new_captions) + len(self.blank)) + pictures

    def encode_captions(self):
        self.stop = safe.Signals()  # until here there is nothing to save
        self.folder.mkdir(exist_ok=True)
        if not len(self.new_captions) and not len(self.blank):
            return
        self.texts.load(self.device)
        if len(self.blank):
            keys, zeros = [self.unconditional], np.zeros((1, *self.captions.shape))
            self.captions.write(1, [(keys, zeros)] if self.zeros else self.texts.encode([(keys, [""])]))
        self.captions.write(len(self.new_captions), self._captions_in_batches())
        self._stop_if_asked()
        self.texts.unload()  # before the VAE comes: never both in memory

    def encode_pictures(self):
        count = sum(len(numbers) for numbers, _ in self.new_pictures)
        if not count:
            return
        self.vae.load(self.device)
        with tqdm(total=count, unit="image", desc="pictures") as bar:
            for size, of_size, new in zip(self.sizes, self.moments, self.new_pictures):
                of_size.write(len(new[0]), self._pictures_in_batches(size, new, bar))
                self._stop_if_asked()

    def commit(self):
        """Write the index and the manifest: from here on there is a cache."""
        rows = self.rows
        index = places(rows, self.captions, self.moments)
        good = (index["picture"] >= 0) & (index["mirrored"] >= 0)
        for i in np.flatnonzero(~good):  # every row of a picture that failed, once
            self.skipped(self.names[i], safe.UserError(f"{self.names[i]}: {self.failed[rows['image_digest'][i]]}"))
        kept = slice(None) if good.all() else np.flatnonzero(good)  # a slice copies nothing
        index, names = index[kept], [name for name, fine in zip(self.names, good) if fine]
        if not len(index):
            raise safe.UserError(f"none of {len(self.examples)} rows can be used, e.g. {': '.join(self.skipped[0])}")
        content = hashlib.sha256()
        for field in CONTENT:
            content.update(rows[field][kept].tobytes())
        manifest = dict(
            model=asdict(self.model.pinned()),
            vae=asdict(self.vae_model.pinned()),
            resolution=self.settings.resolution,
            scaling_factor=self.vae.config["scaling_factor"],
            sizes=self.sizes,
            moments_shapes=[of_size.shape for of_size in self.moments],
            text_shape=self.texts.text_shape,
            pooled_shape=self.texts.pooled_shape,
            unconditional=int(self.captions.find(np.array([self.unconditional], "S32"))[0]),
            rows=len(index),
            held_out=int(index["held_out"].sum()),
            skipped=self.skipped,
            content=content.hexdigest(),
        )
        write_index(self.folder, index, names, manifest)

    def _captions_in_batches(self):
        """Yields (keys, encoded captions) of the new ones."""
        cut, example = 0, None

        def captions():
            nonlocal cut, example
            for batch in batches(self.new_captions, CAPTIONS_AT_ONCE):
                if self.stop.received:
                    return
                texts = [self.examples[int(self.rows["number"][i])].caption for i in batch]
                long = [text for text in texts if self.texts.truncated(text)]
                cut, example = cut + len(long), example or next(iter(long), None)
                yield self.rows["caption_key"][batch], texts

        with tqdm(total=len(self.new_captions), unit="caption", desc="captions") as bar:
            for keys, encoded in self.texts.encode(captions()):
                bar.update(len(keys))
                yield keys, encoded.numpy()
        if cut:
            print(
                f"{cut:,} captions are longer than CLIP reads; what follows 75 tokens is not seen, e.g. of {example!r}"
            )

    def _pictures_in_batches(self, size, pictures, bar):
        """pictures: numbers of rows and whether mirrored. Yields (keys, moments (B, 2, 4, h, w) fp16)."""
        at_once = min(PICTURES_AT_ONCE, max(1, BYTES_AT_ONCE // (size[0] * size[1] * self.vae.dtype.itemsize)))

        def decode(picture):  # in a worker, as `stack`
            number, mirrored = picture
            example = self.examples[int(self.rows["number"][number])]
            try:
                data = example.data()
                if image_digest(data) != self.rows["image_digest"][number]:
                    raise safe.UserError(f"{example.name}: changed since precompute began; run it again")
                pixels = buckets.resize_and_crop(read_rgb(data, example.name), size, example.name)
            except safe.UserError as error:
                return number, None, error
            return (
                number,
                self.rows["mirrored_key" if mirrored else "picture_key"][number],
                pixels[:, ::-1] if mirrored else pixels,
            )

        def readable():
            for number, picture_key, result in ahead(self.pool, decode, zip(*pictures), EXAMPLES_AHEAD):
                bar.update()
                if picture_key is None:
                    self._refuse(number, result)
                else:
                    yield number, picture_key, result

        def stack(batch):
            numbers, keys, pixels = zip(*batch)
            return (numbers, np.array(keys)), self.vae.stage(np.stack(pixels))

        def stacked():
            for batch in ahead(self.pool, stack, batches(readable(), at_once), BATCHES_AHEAD):
                if self.stop.received:
                    return
                yield batch

        for (numbers, keys), moments in self.vae.encode(stacked()):
            moments = moments.numpy()
            finite = np.isfinite(moments).all(axis=(1, 2, 3, 4))
            for i in np.flatnonzero(~finite):
                name = self.examples.name(int(self.rows["number"][numbers[i]]))
                problem = f"{name}: the VAE gives numbers that are not finite, in fp32 too; replace or remove it"
                self._refuse(numbers[i], safe.NumbersError(problem))
            yield keys[finite], moments[finite]

    def _refuse(self, number, error):
        """A picture that cannot be used: left out with --skip_bad, else the end of the command."""
        if not self.skipped.allowed:
            raise error
        name = self.examples.name(int(self.rows["number"][number]))
        self.failed[self.rows["image_digest"][number]] = str(error).removeprefix(f"{name}: ")

    def _stop_if_asked(self):
        if self.stop.received:
            raise safe.Stopped(self.stop.received, "stopped, what is encoded is kept; run the same command to go on")


class Skipped(list):
    """Called with a row that cannot be used: with --skip_bad it is noted here, [name, reason]; without, it stops the command."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed

    def __call__(self, name, error):
        if not self.allowed:
            raise error
        self.append([name, str(error).removeprefix(f"{name}: ")])


def pictures_to_encode(rows, size, moments):
    """The pictures at `size` that `moments` does not hold: numbers of their rows, and whether mirrored; two arrays."""
    members = np.flatnonzero(rows["size"] == size)
    which = missing(np.concatenate([rows["picture_key"][members], rows["mirrored_key"][members]]), moments)
    return members[which % max(1, len(members))], which >= len(members)


def places(rows, captions, moments):
    """The index: where the pictures and captions of `rows` are, -1 for what is not there, and what else training needs."""
    index = np.zeros(len(rows), INDEX)
    for field in set(INDEX.names) & set(rows.dtype.names):
        index[field] = rows[field]
    index["caption"] = captions.find(rows["caption_key"])
    for i, of_size in enumerate(moments):
        members = rows["size"] == i
        index["picture"][members] = of_size.find(rows["picture_key"][members])
        index["mirrored"][members] = of_size.find(rows["mirrored_key"][members])
    return index


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


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
