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

from data import buckets, check
from data.cache import INDEX, Rows, posteriors_name, read_index, told_apart, write_index
from data.common import door, safe
from data.common.flags import parse
from data.dataset import open_examples
from data.encoding import Draft, Todo, encode_captions, encode_pictures
from data.images import without_pillows_limit
from data.models.files import Model
from data.survey import Skipped, changes, key, missing, survey

WRITES = ("manifest.json", "index.npy", "names.txt", "captions.rows", "captions.keys")
# What a resumed training must find unchanged, of each row.
CONTENT = ("picture_key", "mirrored_key", "caption_key", "time_ids", "held_out")


def main(argv):
    settings = parse("data.precompute", argv)
    if settings.resolution % buckets.STEP:
        raise safe.UserError(f"--resolution {settings.resolution}: must be a multiple of {buckets.STEP}")
    flag = "--cache_dir" if settings.cache_dir else "--output_dir"
    folder = Path(settings.cache_dir or Path(settings.output_dir) / "cache")
    held = contextlib.nullcontext() if settings.explain else door.hold(folder, flag, WRITES, ".writer")
    with held, without_pillows_limit(), ThreadPoolExecutor(min(32, os.cpu_count())) as pool:
        try:
            precompute(settings, folder, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def precompute(settings, folder, pool):
    """Bring the cache in `folder` to what the settings ask for: see what is missing, say so, encode it, commit."""
    skipped, failed = Skipped(settings.skip_bad), Skipped(settings.skip_bad)  # rows; pictures, by their digest
    examples = open_examples(settings)
    device = check.device()
    check.precision(settings.mixed_precision, device)
    texts, vae = open_encoders(settings)
    draft = look(settings, folder, examples, texts, vae, pool, skipped)
    todo = what_is_missing(draft)

    which, why = in_words(draft, todo)
    room = room_for(draft, todo)
    print(f"{which} to encode: {why}; {room / 2**20:,.0f} MiB in {folder}", flush=True)
    safe.need_space(folder, room, "the cache")
    if settings.explain:
        return

    with door.changing(folder, harmless=lambda: only_adds(draft, todo)):
        stop = safe.Signals()  # from here on there is something to save when a signal comes
        began = time.perf_counter()
        encode_captions(draft, todo, device, stop)
        between = time.perf_counter()
        encode_pictures(draft, todo, device, stop, pool, failed)
        ended = time.perf_counter()
        left_out = commit(draft, settings.resolution, skipped, failed)
    print(
        f"{which} encoded: {why}; "
        f"text in {between - began:.1f} s, pictures in {ended - between:.1f} s, loading included"
    )
    if left_out:
        print(f"{len(left_out):,} rows left out, e.g. {': '.join(left_out[0])}")


def open_encoders(settings):
    """The encoders that the flags name, described by their files and not loaded. -> (TextEncoders, VAE)"""
    from data.encoders import VAE, TextEncoders  # takes seconds, so it comes after what can be refused without it

    variant = settings.variant or (None if settings.mixed_precision == "no" else "fp16")
    model = Model(settings.pretrained_model_name_or_path, settings.revision, variant)
    vae_name = settings.pretrained_vae_model_name_or_path
    vae_model = Model(vae_name, None, variant) if vae_name else model
    return TextEncoders(model, settings.mixed_precision), VAE(vae_model, settings.mixed_precision)


def look(settings, folder, examples, texts, vae, pool, skipped):
    """Survey the examples and open the cache's files. -> Draft"""
    some_buckets = buckets.make_buckets(settings.resolution, settings.buckets)
    zeros = texts.model.index().get("force_zeros_for_empty_prompt", True)
    prints = texts.fingerprint, vae.fingerprint
    rows, names = survey(
        examples, prints, some_buckets, settings.random_flip, settings.validation_fraction, pool, skipped
    )
    return Draft(
        folder=folder,
        texts=texts,
        vae=vae,
        buckets=some_buckets,
        examples=examples,
        rows=rows,
        names=names,
        unconditional=key("unconditional", texts.fingerprint, zeros),
        zeros=zeros,
        captions=Rows(folder, "captions", (np.prod(texts.text_shape) + texts.pooled_shape[0],)),
        posteriors=[Rows(folder, posteriors_name(bucket), vae.posterior_shape(bucket)) for bucket in some_buckets],
    )


def what_is_missing(draft):
    """What of the draft is not on disk yet. -> Todo"""
    return Todo(
        unconditional=len(missing(np.array([draft.unconditional], "S32"), draft.captions)) > 0,
        captions=missing(draft.rows["caption_key"], draft.captions),
        pictures=[missing_pictures(draft.rows, i, posteriors) for i, posteriors in enumerate(draft.posteriors)],
    )


def missing_pictures(rows, bucket, posteriors):
    """The pictures of a bucket that `posteriors` lacks: indices of their rows, and whether mirrored; two arrays."""
    members = np.flatnonzero(rows["size"] == bucket)
    which = missing(np.concatenate([rows["picture_key"][members], rows["mirrored_key"][members]]), posteriors)
    return members[which % max(1, len(members))], which >= len(members)


def only_adds(draft, todo):
    """Whether all that the cache holds stays as it is: no damaged row is written again, and no old record changes."""
    index, (old_index, old_names) = places(draft), read_index(draft.folder) or (np.empty(0, INDEX), [])
    again = [
        index["caption"][todo.captions],
        draft.captions.find(np.array([draft.unconditional] * todo.unconditional, "S32")),
    ]
    again += [np.where(flip, index["mirrored"][rows], index["picture"][rows]) for rows, flip in todo.pictures]
    new = dict(zip(told_apart(draft.names), index))
    return (np.concatenate(again) < 0).all() and all(
        new.get(name) == old for name, old in zip(told_apart(old_names), old_index)
    )


def in_words(draft, todo):
    """What a message says of it. -> (which rows are to be encoded, why)"""
    before = read_index(draft.folder)
    also = ["the unconditional embedding"] if before and todo.unconditional else []
    pictures = [np.concatenate(both) for both in zip(*todo.pictures)]
    return changes(draft.rows, draft.names, pictures, todo.captions, before, also)


def room_for(draft, todo):
    """The bytes that the missing rows take on disk."""
    captions = draft.captions.room(len(todo.captions) + todo.unconditional)
    pictures = zip(draft.posteriors, todo.pictures)
    return captions + sum(posteriors.room(len(rows)) for posteriors, (rows, _) in pictures)


def commit(draft, resolution, skipped, failed):
    """Write the index and the manifest: from here on there is a cache. -> [name, reason] of each row left out"""
    rows, index = draft.rows, places(draft)
    good = (index["picture"] >= 0) & (index["mirrored"] >= 0)
    left_out = list(skipped.reasons.values())
    for i in np.flatnonzero(~good):  # each row of a picture that failed, which was tried once, under one of its names
        _, reason = failed.reasons[rows["image_digest"][i]]
        left_out.append([draft.names[i], reason])
    kept = slice(None) if good.all() else np.flatnonzero(good)  # a slice copies nothing
    index, names = index[kept], [name for name, fine in zip(draft.names, good) if fine]
    if not len(index):
        raise safe.UserError(f"none of {len(draft.examples)} rows can be used, e.g. {': '.join(left_out[0])}")
    content = hashlib.sha256()
    for field in CONTENT:
        content.update(rows[field][kept].tobytes())
    manifest = dict(
        model=asdict(draft.texts.model.pinned()),
        vae=asdict(draft.vae.model.pinned()),
        resolution=resolution,
        scaling_factor=draft.vae.config["scaling_factor"],
        sizes=draft.buckets,
        moments_shapes=[posteriors.shape for posteriors in draft.posteriors],
        text_shape=draft.texts.text_shape,
        pooled_shape=draft.texts.pooled_shape,
        unconditional=int(draft.captions.find(np.array([draft.unconditional], "S32"))[0]),
        rows=len(index),
        held_out=int(index["held_out"].sum()),
        skipped=left_out,
        content=content.hexdigest(),
    )
    write_index(draft.folder, index, names, manifest)
    return left_out


def places(draft):
    """The index: the places of the rows' pictures and captions, -1 for what is not there, and what survey found."""
    rows = draft.rows
    index = np.zeros(len(rows), INDEX)
    for field in set(INDEX.names) & set(rows.dtype.names):
        index[field] = rows[field]
    index["caption"] = draft.captions.find(rows["caption_key"])
    for i, posteriors in enumerate(draft.posteriors):
        members = rows["size"] == i
        index["picture"][members] = posteriors.find(rows["picture_key"][members])
        index["mirrored"][members] = posteriors.find(rows["mirrored_key"][members])
    return index


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
