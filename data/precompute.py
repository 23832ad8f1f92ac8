"""python -m data.precompute: pictures and captions -> RUN/cache. Run again, it encodes only what is not there."""

import collections
import contextlib
import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from data import buckets, check, parallel
from data.cache import (
    INDEX,
    VERSION,
    Rows,
    captions_name,
    earlier_version,
    posteriors_name,
    read_components,
    read_index,
    read_manifest,
    told_apart,
    write_index,
)
from data.common import disk, door, errors, ranks, safe
from data.common.flags import parse
from data.common.words import many
from data.dataset import open_examples
from data.encoders import VAE, TextEncoders
from data.encoding import Draft, Todo, encode_captions, encode_pictures
from data.images import DECODER, without_pillows_limit
from data.models.files import Model, vae_model
from data.models.identity import identities
from data.survey import Skipped, changes, first_captions, key, missing, survey

WRITES = ("manifest.json", "index.npy", "captions.npy", "names.txt", "captions.rows", "captions.keys")
PROMPTS = 16  # that training draws: each takes as long as some dozens of its steps
# What a resumed training must find unchanged, of each row.
CONTENT = ("picture_key", "mirrored_key", "captions", "time_ids", "held_out")


def main(argv):
    settings = parse("data.precompute", argv)
    if settings.resolution % buckets.STEP:
        raise errors.UserError(f"--resolution {settings.resolution}: must be a multiple of {buckets.STEP}")
    if len(settings.validation_prompt) > PROMPTS:
        raise errors.UserError(f"--validation_prompt: {len(settings.validation_prompt)} prompts; {PROMPTS} at most")
    if ranks.index():
        sys.exit(parallel.serve(partial(compute_on, settings)))
    flag = "--cache_dir" if settings.cache_dir else "--output_dir"
    folder = Path(settings.cache_dir or Path(settings.output_dir) / "cache")
    held = contextlib.nullcontext() if settings.explain else door.hold(folder, flag, WRITES, ".writer")
    workers = ThreadPoolExecutor(min(32, os.cpu_count()))
    with parallel.first() as crew, held, without_pillows_limit(), workers as pool:
        try:
            precompute(settings, folder, crew, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def precompute(settings, folder, crew, pool):
    """Bring the cache in `folder` to what the settings ask for: see what is missing, say so, encode it, commit."""
    device = compute_on(settings) if may_download(settings, folder) else None
    skipped, failed = Skipped(settings.skip_bad), Skipped(settings.skip_bad)  # rows; pictures, by their digest
    examples = open_examples(settings)
    for note in examples.notes:
        print(note, flush=True)
    texts, vae = open_encoders(settings)
    draft = look(settings, folder, examples, texts, vae, pool, skipped)
    todo = what_is_missing(draft)

    print(texts.model.schedule())
    print(overview(draft, skipped))
    (which, why), room = in_words(draft, todo), room_for(draft, todo)
    print(f"{which} to encode: {why}; {room / 2**20:,.0f} MiB in {folder}", flush=True)
    disk.need_space(folder, room, "the cache")
    if settings.explain:
        return

    if todo.texts() or todo.images():  # else nothing will be computed
        device = device or compute_on(settings)
    with door.changing(folder, harmless=lambda: only_adds(draft, todo)):
        stop = safe.Signals()  # from here on there is something to save when a signal comes
        began = time.perf_counter()
        encode_captions(draft, todo, crew, device, stop)
        between = time.perf_counter()
        encode_pictures(draft, todo, crew, device, stop, pool, failed)
        ended = time.perf_counter()
        left_out = commit(draft, skipped, failed)
    print(
        f"{which} encoded: {why}; "
        f"text in {between - began:.1f} s, pictures in {ended - between:.1f} s, loading included"
    )
    if left_out:
        print(f"{many(len(left_out), 'row')} left out, e.g. {': '.join(left_out[0])}")


def may_download(settings, folder):
    """Whether gigabytes may come first, so that a GPU which cannot be used is worth torch's seconds before them."""
    places = settings.pretrained_model_name_or_path, settings.dataset_name or settings.train_data_dir or ""
    local = all(Path(place).exists() for place in places)
    return not (local or settings.explain or (folder / "manifest.json").exists()) and check.has_nvidia()


def compute_on(settings):
    """-> the device. Torch is imported here, after all that can be refused without it (but see may_download)."""
    device = check.device()
    check.precision(settings.mixed_precision, device)
    return device


def open_encoders(settings):
    """The encoders that the flags name, described by their files and not loaded. -> (TextEncoders, VAE)"""
    variant = settings.variant or (None if settings.mixed_precision == "no" else "fp16")
    told = settings.model_config, settings.prediction_type, settings.rescale_betas_zero_snr
    model = Model(settings.pretrained_model_name_or_path, settings.revision, variant, *told)
    vae_name = settings.pretrained_vae_model_name_or_path
    configs = settings.model_config or model.configs()
    vae = vae_model(vae_name, variant, configs) if vae_name else model
    model.check()
    texts = TextEncoders(model, settings.mixed_precision, settings.max_token_length)
    return texts, VAE(vae, settings.mixed_precision)


def look(settings, folder, examples, texts, vae, pool, skipped):
    """Survey the examples and open the cache's files. -> Draft"""
    if stale := earlier_version(folder):
        print(
            f"{folder}: its format is {stale}, here it is {VERSION}: captions of the same encoders are kept, pictures "
            "are encoded again; its moments-* are of no use any more, delete them",
            flush=True,
        )
    some_buckets = buckets.make_buckets(settings.resolution, settings.buckets)
    zeros = texts.model.index()["force_zeros_for_empty_prompt"]
    components = identities(texts.model, vae.model, read_components(folder))
    identity = dict(text_encoders=texts.fingerprint(components), vae=vae.fingerprint(components))
    rows, caption_keys, names = survey(
        examples, identity.values(), some_buckets, settings.random_flip, settings.validation_fraction, pool, skipped
    )
    posteriors = [Rows(folder, posteriors_name(bucket), vae.posterior_shape(bucket)) for bucket in some_buckets]
    return Draft(
        folder=folder,
        texts=texts,
        vae=vae,
        buckets=some_buckets,
        examples=examples,
        rows=rows,
        caption_keys=caption_keys,
        prompts={prompt: key("caption", identity["text_encoders"], prompt) for prompt in settings.validation_prompt},
        names=names,
        unconditional=key("unconditional", identity["text_encoders"], zeros),
        zeros=zeros,
        captions=Rows(folder, captions_name(texts.text_shape), (np.prod(texts.text_shape) + texts.pooled_shape[0],)),
        posteriors=posteriors,
        facts=dict(
            model=asdict(texts.model.pinned()),
            vae=asdict(vae.model.pinned()),
            components=components,
            identity=identity,
            decoder=DECODER,
            resolution=settings.resolution,
            scaling_factor=vae.config["scaling_factor"],
            buckets=some_buckets,
            posterior_shapes=[file.shape for file in posteriors],
            text_shape=texts.text_shape,
            pooled_shape=texts.pooled_shape,
            caption_variants=examples.wording.variants,
            caption_orders=examples.wording.mixed_by(),
            instance_prompt=examples.wording.prompt,
            validation_prompts=dict.fromkeys(settings.validation_prompt),  # commit() says where they are
        ),
    )


def what_is_missing(draft):
    """What of the draft is not on disk yet. -> Todo"""
    count, keys = len(draft.caption_keys), np.append(draft.caption_keys, _keys(draft.prompts))
    texts = missing(keys, draft.captions)  # a prompt that is a caption of a picture, too, is encoded as that
    prompts = list(draft.prompts.items())
    return Todo(
        unconditional=len(missing(np.array([draft.unconditional], "S32"), draft.captions)) > 0,
        captions=texts[texts < count],
        prompts=dict(prompts[i] for i in texts[texts >= count] - count),
        pictures=[missing_pictures(draft.rows, i, posteriors) for i, posteriors in enumerate(draft.posteriors)],
    )


def _keys(prompts):
    return np.array(list(prompts.values()), "S32")


def missing_pictures(rows, bucket, posteriors):
    """The pictures of a bucket that `posteriors` lacks: indices of their rows, and whether mirrored; two arrays."""
    members = np.flatnonzero(rows["bucket"] == bucket)
    which = missing(np.concatenate([rows["picture_key"][members], rows["mirrored_key"][members]]), posteriors)
    return members[which % max(1, len(members))], which >= len(members)


def only_adds(draft, todo):
    """Whether all that the cache holds stays as it is: no damaged row is written again, and no old record changes."""
    index, captions = places(draft)
    again = [captions[todo.captions], draft.captions.find(np.array([draft.unconditional] * todo.unconditional, "S32"))]
    again += [draft.captions.find(_keys(todo.prompts))]
    again += [np.where(flip, index["mirrored"][rows], index["picture"][rows]) for rows, flip in todo.pictures]
    before = read_index(draft.folder)
    if not before:
        return True  # nobody reads it yet
    facts = read_manifest(draft.folder)
    fields = [name for name in INDEX.names if name != "first_caption"]
    new = dict(zip(told_apart(draft.names), index[fields]))
    return (
        (np.concatenate(again) < 0).all()
        and all(facts[name] == draft.facts[name] for name in ("identity", "decoder"))
        and all(new.get(name) == old for name, old in zip(told_apart(before[1]), before[0][fields]))
    )


def overview(draft, skipped):
    """What the examples are, in a line."""
    rows, bucket, size = draft.rows, draft.rows["time_ids"][:, 4:], draft.rows["time_ids"][:, :2]
    counts = collections.Counter(rows["bucket"].tolist()).most_common()
    facts = ", ".join(f"{count:,} at {draft.buckets[i][1]} × {draft.buckets[i][0]}" for i, count in counts)
    facts = [facts, f"{rows['held_out'].sum() or 'none'} held out"]

    def say(which, noun, about=""):
        if len(which):
            facts.append(f"{many(len(which), noun)}{about}, e.g. {draft.names[which[0]]}")

    say(np.flatnonzero((size < bucket).any(axis=1)), "picture", " enlarged")
    say(np.flatnonzero(rows["empty"]), "row", " with an empty caption")
    variants = draft.facts["caption_variants"]
    say(np.flatnonzero(rows["captions"] > variants), "row", " with several captions")
    if variants > 1:
        facts.append(f"each caption in {variants} orders, {len(np.unique(draft.caption_keys)):,} texts in all")
    epoch = rows["repeats"][~rows["held_out"]].sum()
    say(np.flatnonzero(rows["repeats"] > 1), "picture", f" repeated (an epoch has {many(epoch, 'image')})")
    _, first = np.unique(rows["image_digest"], return_index=True)
    say(np.setdiff1d(np.arange(len(rows)), first), "row", " with a picture that an earlier one has")
    if skipped.reasons:
        facts.append(f"{many(len(skipped.reasons), 'row')} left out")
    return f"{many(len(rows), 'row')}: {'; '.join(facts)}"


def in_words(draft, todo):
    """What a message says of it. -> (which rows are to be encoded, why)"""
    before = read_index(draft.folder)
    pictures = [np.concatenate(both) for both in zip(*todo.pictures)]
    having = draft.row_of(todo.captions)
    place = todo.captions - draft.rows["first_caption"][having]
    captions = having, place % draft.facts["caption_variants"]
    before = before and (*before, read_manifest(draft.folder))
    besides = ["the unconditional embedding"] if before and todo.unconditional else []
    besides += [many(len(todo.prompts), "validation prompt")] if todo.prompts else []
    return changes(draft.rows, draft.names, pictures, captions, draft.facts, before, besides)


def room_for(draft, todo):
    """The bytes that the missing rows take on disk."""
    captions = draft.captions.room(todo.texts())
    pictures = zip(draft.posteriors, todo.pictures)
    return captions + sum(posteriors.room(len(rows)) for posteriors, (rows, _) in pictures)


def commit(draft, skipped, failed):
    """Write the index and the manifest: from here on there is a cache. -> [name, reason] of each row left out"""
    rows, (index, captions) = draft.rows, places(draft)
    good = (index["picture"] >= 0) & (index["mirrored"] >= 0)
    left_out = list(skipped.reasons.values())
    for i in np.flatnonzero(~good):  # each row of a picture that failed, which was tried once, under one of its names
        _, reason = failed.reasons[rows["image_digest"][i]]
        left_out.append([draft.names[i], reason])
    caption_keys, names = draft.caption_keys, draft.names
    if not good.all():
        having = np.repeat(good, rows["captions"])  # captions whose row is good
        captions, caption_keys = captions[having], caption_keys[having]
        index, rows, names = index[good], rows[good], [name for name, fine in zip(names, good) if fine]
        index["first_caption"] = first_captions(index["captions"])
    if not len(index):
        raise errors.UserError(f"none of {many(len(draft.examples), 'row')} can be used, e.g. {': '.join(left_out[0])}")
    content = hashlib.sha256(caption_keys.tobytes())
    repeated = (rows["repeats"] > 1).any()  # where none is, the digest is what it was before pictures could repeat
    for field in (*CONTENT, "repeats") if repeated else CONTENT:
        content.update(rows[field].tobytes())
    manifest = dict(
        draft.facts,
        unconditional=int(draft.captions.find(np.array([draft.unconditional], "S32"))[0]),
        validation_prompts=dict(zip(draft.prompts, draft.captions.find(_keys(draft.prompts)).tolist())),
        rows=len(index),
        held_out=int(index["held_out"].sum()),
        skipped=left_out,
        content=content.hexdigest(),
    )
    write_index(draft.folder, index, captions, names, manifest)
    return left_out


def places(draft):
    """Where all rows are, -1 for what is not there. -> (the index, with what survey found; the captions' rows)"""
    rows = draft.rows
    index = np.zeros(len(rows), INDEX)
    for field in set(INDEX.names) & set(rows.dtype.names):
        index[field] = rows[field]
    for i, posteriors in enumerate(draft.posteriors):
        members = rows["bucket"] == i
        index["picture"][members] = posteriors.find(rows["picture_key"][members])
        index["mirrored"][members] = posteriors.find(rows["mirrored_key"][members])
    return index, draft.captions.find(draft.caption_keys).astype("<i4")


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
