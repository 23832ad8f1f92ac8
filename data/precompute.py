"""python -m data.precompute: pictures and captions -> RUN/cache. Run again, it encodes only what is not there."""

import collections
import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from data import buckets, safe
from data.cache import INDEX, Rows, write_index
from data.dataset import open_examples
from data.flags import parse
from data.images import upright_size
from data.models import Model

AHEAD = 32  # examples read and decoded ahead of the encoder
CAPTIONS_AT_ONCE = 16
PIXELS_AT_ONCE = 2**20  # one picture of 1024 × 1024, or up to ...
PICTURES_AT_ONCE = 16  # ... this many small ones


@dataclass(frozen=True)
class Row:
    """One example by what it is made of: a key changes with everything that the cached row depends on."""

    number: int
    name: str
    caption: str
    caption_key: bytes
    picture_keys: tuple[bytes, ...]  # the picture's and, with --random_flip, its mirror image's
    time_ids: tuple[int, ...]


def main(argv):
    settings = parse("data.precompute", argv)
    if settings.resolution % 64:
        raise safe.UserError(f"--resolution {settings.resolution}: must be a multiple of 64")
    with safe.run_folder(settings.output_dir) as run, ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        try:
            precompute(settings, run / "cache", pool)
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
    size = (settings.resolution, settings.resolution)

    def describe(number):
        example = examples[number]
        data = example.data()
        digest = hashlib.sha256(data).hexdigest()
        return Row(
            number,
            example.name,
            example.caption,
            key("caption", texts.fingerprint, example.caption),
            tuple(key("picture", vae.fingerprint, digest, size, mirrored) for mirrored in range(1 + settings.random_flip)),
            buckets.time_ids(upright_size(data, example.name), size, example.name),
        )

    rows = list(ahead(pool, describe, range(len(examples))))
    folder.mkdir(exist_ok=True)
    captions = Rows(folder, "captions", (np.prod(texts.text_shape) + texts.pooled_shape[0],))
    moments = Rows(folder, f"moments-{size[0]}x{size[1]}", vae.shape(size))
    new_captions = {row.caption_key: row.caption for row in rows if row.caption_key not in captions}
    new_pictures = {k: (row.number, mirrored) for row in rows for mirrored, k in enumerate(row.picture_keys) if k not in moments}
    needed = len(new_captions) * captions.row_bytes + len(new_pictures) * moments.row_bytes
    todo = f"{len(new_pictures)} pictures and {len(new_captions)} captions to encode"
    print(f"{len(rows)} rows: {todo}, {needed / 2**20:.0f} MiB in {folder}", flush=True)
    safe.need_space(folder, needed, "the cache")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if new_captions or unconditional not in captions:
        texts.load(device)
        if unconditional not in captions:
            captions.append([unconditional], [np.zeros((1, *captions.shape))] if zeros else encode_captions(texts, [""]))
        captions.append(list(new_captions), encode_captions(texts, list(new_captions.values())))
        texts.unload()  # before the VAE comes: never both in memory
    if new_pictures:
        vae.load(device)
        moments.append(list(new_pictures), encode_pictures(vae, list(new_pictures.values()), examples, size, pool))

    places = [
        [*map(moments.position, (row.picture_keys[0], row.picture_keys[-1])), captions.position(row.caption_key)] for row in rows
    ]
    index = np.array([(*place, row.time_ids) for place, row in zip(places, rows)], INDEX)
    manifest = dict(
        model=asdict(model.pinned()),
        vae=asdict(vae_model.pinned()),
        resolution=settings.resolution,
        scaling_factor=vae.config["scaling_factor"],
        moments=moments.name,
        moments_shape=moments.shape,
        text_shape=texts.text_shape,
        pooled_shape=texts.pooled_shape,
        unconditional=captions.position(unconditional),
        rows=len(rows),
        content=key([(row.caption_key, row.picture_keys, row.time_ids) for row in rows]).hex(),
    )
    write_index(folder, index, [row.name for row in rows], manifest)


def key(*made_of):
    """32 bytes that differ when anything in `made_of` does."""
    return hashlib.sha256(repr(made_of).encode()).digest()


def encode_captions(texts, captions):
    """Yields (B, 77 · 2048 + 1280) fp16: text, then pooled, flat."""
    import torch

    cut = [c for c in captions if texts.truncated(c)]
    if cut:
        print(f"{len(cut)} captions are longer than CLIP reads; what follows 75 tokens is not seen, e.g. of {cut[0]!r}")
    with tqdm(total=len(captions), unit="caption", desc="captions") as bar:
        for batch in batches(captions, CAPTIONS_AT_ONCE):
            text, pooled = texts(batch)
            yield torch.cat([text.flatten(1), pooled], dim=1).half().cpu().numpy()
            bar.update(len(batch))


def encode_pictures(vae, pictures, examples, size, pool):
    """pictures: [(example's number, mirrored)]. Yields moments (B, 2, 4, h, w) fp16."""
    import torch

    def pixels(picture):
        number, mirrored = picture
        example = examples[number]
        array = buckets.resize_and_crop(example.image(), size, example.name)
        return example.name, array[:, ::-1] if mirrored else array

    at_once = min(PICTURES_AT_ONCE, max(1, PIXELS_AT_ONCE // (size[0] * size[1])))
    began = time.perf_counter()
    with tqdm(total=len(pictures), unit="image", desc="pictures") as bar:
        for batch in batches(ahead(pool, pixels, pictures), at_once):
            names, arrays = zip(*batch)
            moments = vae(torch.from_numpy(np.stack(arrays)))
            for name, row in zip(names, moments):
                if not row.isfinite().all():
                    raise safe.NumbersError(f"{name}: the VAE gives numbers that are not finite, in fp32 too; replace or remove it")
            yield moments.numpy()
            bar.update(len(batch))
    print(f"{len(pictures)} pictures encoded, {len(pictures) / (time.perf_counter() - began):.2f} images/s")


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


def ahead(pool, work, items):
    """work(item) for each item in order, computed by the pool at most AHEAD items before it is asked for."""
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
