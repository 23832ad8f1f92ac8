"""python -m data.precompute: pictures and captions -> RUN/cache. Run again, it encodes only what is not there."""

import collections
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

from data import buckets, safe
from data.cache import INDEX, Rows, moments_name, read_index, write_index
from data.dataset import open_examples
from data.flags import parse
from data.models import Model
from data.survey import ahead, changes, key, missing, survey

CONTENT = ("picture_key", "mirrored_key", "caption_key", "time_ids", "held_out")  # what a resumed run must find unchanged
CAPTIONS_AT_ONCE = 16
BYTES_AT_ONCE = 2**23  # of one channel of pixels in the VAE's dtype: four pictures of 1024 × 1024 in half precision, or up to ...
PICTURES_AT_ONCE = 16  # ... this many small ones


def main(argv):
    settings = parse("data.precompute", argv)
    if settings.resolution % buckets.STEP:
        raise safe.UserError(f"--resolution {settings.resolution}: must be a multiple of {buckets.STEP}")
    run = contextlib.nullcontext(Path(settings.output_dir)) if settings.explain else safe.run_folder(settings.output_dir)
    with run as folder, ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        try:
            precompute(settings, folder / "cache", pool)
        finally:
            pool.shutdown(cancel_futures=True)


def precompute(settings, folder, pool):
    """Bring the cache in `folder` to what the settings ask for."""
    examples = open_examples(settings)
    import torch  # seconds to import: after all that can be refused without it

    from data.encoders import VAE, TextEncoders

    variant = settings.variant or (None if settings.mixed_precision == "no" else "fp16")
    model = Model(settings.pretrained_model_name_or_path, settings.revision, variant)
    vae_name = settings.pretrained_vae_model_name_or_path
    vae_model = Model(vae_name, None, variant) if vae_name else model
    texts, vae = TextEncoders(model, settings.mixed_precision), VAE(vae_model, settings.mixed_precision)
    zeros = model.index().get("force_zeros_for_empty_prompt", True)
    unconditional = key("unconditional", texts.fingerprint, zeros)
    sizes = buckets.sizes(settings.resolution, settings.buckets)
    skipped = Skipped(settings.skip_bad)

    # What every example is made of, and which of that is not there yet
    rows, names = survey(examples, settings, sizes, texts.fingerprint, vae.fingerprint, pool, skipped)
    captions = Rows(folder, "captions", (np.prod(texts.text_shape) + texts.pooled_shape[0],))
    moments = [Rows(folder, moments_name(size), vae.shape(size)) for size in sizes]
    new_captions = missing(rows["caption_key"], captions)
    new_pictures = [pictures_to_encode(rows, i, of_size) for i, of_size in enumerate(moments)]
    count = sum(len(numbers) for numbers, _ in new_pictures)
    blank = missing(np.array([unconditional], "S32"), captions)
    numbers, before = [np.concatenate(both) for both in zip(*new_pictures)], read_index(folder)
    also = ["the unconditional embedding"] if before and len(blank) else []
    which, why = changes(rows, names, numbers, new_captions, before, also)
    picture_bytes = sum(len(numbers) * of_size.row_bytes for (numbers, _), of_size in zip(new_pictures, moments))
    needed = (len(new_captions) + len(blank)) * captions.row_bytes + picture_bytes
    print(f"{which} to encode: {why}; {needed / 2**20:,.0f} MiB in {folder}", flush=True)
    if settings.explain:
        return

    folder.mkdir(exist_ok=True)
    safe.need_space(folder, needed, "the cache")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began, failed = time.perf_counter(), {}
    if len(new_captions) or len(blank):
        texts.load(device)
        if len(blank):
            captions.write(1, [([unconditional], np.zeros((1, *captions.shape)) if zeros else encode_captions(texts, [""]))])
        captions.write(len(new_captions), captions_in_batches(texts, rows, new_captions, examples))
        texts.unload()  # before the VAE comes: never both in memory
    between = time.perf_counter()
    if count:
        vae.load(device)
        with tqdm(total=count, unit="image", desc="pictures") as bar:
            for size, of_size, new in zip(sizes, moments, new_pictures):
                of_size.write(len(new[0]), pictures_in_batches(vae, rows, new, examples, size, pool, skipped, failed, bar))
    ended = time.perf_counter()

    index = places(rows, captions, moments)
    good = (index["picture"] >= 0) & (index["mirrored"] >= 0)
    for i in np.flatnonzero(~good):  # every row of a picture that failed, once
        skipped(names[i], safe.UserError(f"{names[i]}: {failed[rows['image_digest'][i]]}"))
    kept = np.flatnonzero(good)
    if not len(kept):
        raise safe.UserError(f"none of {len(examples)} rows can be used, e.g. {': '.join(skipped[0])}")
    manifest = dict(
        model=asdict(model.pinned()),
        vae=asdict(vae_model.pinned()),
        resolution=settings.resolution,
        scaling_factor=vae.config["scaling_factor"],
        sizes=sizes,
        moments_shapes=[of_size.shape for of_size in moments],
        text_shape=texts.text_shape,
        pooled_shape=texts.pooled_shape,
        unconditional=int(captions.find(np.array([unconditional], "S32"))[0]),
        rows=len(kept),
        held_out=int(index["held_out"][kept].sum()),
        skipped=skipped,
        content=hashlib.sha256(b"".join(rows[field][kept].tobytes() for field in CONTENT)).hexdigest(),
    )
    write_index(folder, index[kept], [names[i] for i in kept], manifest)
    print(f"{which} encoded: {why}; text in {between - began:.1f} s, pictures in {ended - between:.1f} s, loading included")
    if skipped:
        print(f"{len(skipped):,} rows left out, e.g. {': '.join(skipped[0])}")


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


def encode_captions(texts, captions):
    """B strings -> (B, 77 · 2048 + 1280) fp16: text, then pooled, flat."""
    import torch

    text, pooled = texts(captions)
    return torch.cat([text.flatten(1), pooled], dim=1).half().cpu().numpy()


def captions_in_batches(texts, rows, numbers, examples):
    """Yields (keys, encoded captions) of the rows with these numbers."""
    cut = []
    with tqdm(total=len(numbers), unit="caption", desc="captions") as bar:
        for batch in batches(numbers, CAPTIONS_AT_ONCE):
            captions = [examples[int(rows["number"][i])].caption for i in batch]
            cut += [caption for caption in captions if texts.truncated(caption)]
            yield rows["caption_key"][batch], encode_captions(texts, captions)
            bar.update(len(batch))
    if cut:
        print(f"{len(cut):,} captions are longer than CLIP reads; what follows 75 tokens is not seen, e.g. of {cut[0]!r}")


def pictures_in_batches(vae, rows, pictures, examples, size, pool, skipped, failed, bar):
    """pictures: numbers of rows and whether mirrored. Yields (keys, moments (B, 2, 4, h, w) fp16)."""
    import torch

    def decode(picture):
        number, mirrored = picture
        example = examples[int(rows["number"][number])]
        try:
            pixels = buckets.resize_and_crop(example.image(), size, example.name)
        except safe.UserError as error:
            return number, None, error
        return number, rows["mirrored_key" if mirrored else "picture_key"][number], pixels[:, ::-1] if mirrored else pixels

    def refuse(number, error):
        if not skipped.allowed:
            raise error
        failed[rows["image_digest"][number]] = str(error).removeprefix(f"{examples.name(int(rows['number'][number]))}: ")

    def readable():
        for number, picture_key, result in ahead(pool, decode, zip(*pictures)):
            bar.update()
            if picture_key is None:
                refuse(number, result)
            else:
                yield number, picture_key, result

    at_once, told = min(PICTURES_AT_ONCE, max(1, BYTES_AT_ONCE // (size[0] * size[1] * vae.dtype.itemsize))), collections.deque()

    def stacked():
        for batch in batches(readable(), at_once):
            numbers, keys, pixels = zip(*batch)
            told.append((numbers, np.array(keys)))
            yield torch.from_numpy(np.stack(pixels))

    for moments in vae.encode(stacked()):
        (numbers, keys), moments = told.popleft(), moments.numpy()
        finite = np.isfinite(moments).all(axis=(1, 2, 3, 4))
        for i in np.flatnonzero(~finite):
            name = examples.name(int(rows["number"][numbers[i]]))
            problem = f"{name}: the VAE gives numbers that are not finite, in fp32 too; replace or remove it"
            refuse(numbers[i], safe.NumbersError(problem))
        yield keys[finite], moments[finite]


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
