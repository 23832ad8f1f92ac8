"""--buckets and --random_flip from the file to the batch: each picture in its bucket, each micro-batch of one."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import PIPELINE, PRECOMPUTE, TRAIN, Forked, content, here, precompute, settings, untitled, when
from PIL import Image
from safetensors.torch import load

from data.buckets import make_buckets
from data.cache import Cache
from data.encoders import VAE
from data.images import read_rgb
from data.loaded import LoadedVAE
from train.batches import Batches

MIXED = 30
SEED = 1  # whose first three batches are of several buckets
RESOLUTION = 128
SHAPES = [(64, 128), (128, 64), (128, 128)]


def mixed_pictures(folder):
    """Every kind of file in portrait, landscape and square. -> {name: upright (height, width)}"""
    folder.mkdir(parents=True)
    random, upright = np.random.default_rng(0), {}
    kinds = ("RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16", "turned", "RGB")
    for i in range(MIXED):
        kind, short = kinds[i % len(kinds)], int(random.integers(30, 200))
        ratio = random.uniform(1, 1.15) if i // len(kinds) % 3 == 0 else random.uniform(1.2, 3.9)
        size = (short, round(short * ratio)) if i // len(kinds) % 2 else (round(short * ratio), short)
        coarse = random.integers(0, 256, (4, 4, 4), np.uint8)  # smooth, and no two alike
        image = Image.fromarray(coarse, "RGBA").resize(size[::-1], Image.Resampling.BICUBIC)
        name = f"{i:02d} {kind.replace(';', '')}"
        if kind == "I;16":
            name += ".png"
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / name)
        elif kind == "turned":
            name += ".jpg"
            exif = Image.Exif()
            exif[0x0112] = 6
            image.convert("RGB").save(folder / name, exif=exif)
        else:
            name += ".tif" if kind == "CMYK" else ".png"
            (image.convert("RGB") if kind in ("CMYK", "P") else image).convert(kind).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption {i % 7}")
        upright[name] = size[::-1] if kind == "turned" else size
    return upright


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """-> (folder of pictures, their upright sizes, run's folder with the cache)"""
    folder = tmp_path_factory.mktemp("mixed")
    upright = mixed_pictures(folder / "pictures")
    precompute(folder / "run", folder / "pictures", "--resolution", RESOLUTION, "--buckets", "--random_flip")
    return folder / "pictures", upright, folder / "run"


def resized_and_cropped(image, shape):
    """Written out once more: cover the bucket, cut the middle. -> pixels, (top, left), the size before the cut"""
    width, height = image.size
    scale = max(shape[0] / height, shape[1] / width)
    new = [max(s, round(old * scale)) for s, old in zip(shape, (height, width))]
    top, left = (new[0] - shape[0]) // 2, (new[1] - shape[1]) // 2
    pixels = np.asarray(image.resize(new[::-1], Image.Resampling.LANCZOS))
    return pixels[top : top + shape[0], left : left + shape[1]], (top, left), new


def test_each_picture_is_at_the_size_that_keeps_most_of_it(mixed):
    pictures, upright, run = mixed
    cache = Cache(run / "cache")
    assert [tuple(size) for size in cache.buckets] == SHAPES == make_buckets(RESOLUTION, True)
    used = set()
    for name, record in zip(cache.names(range(MIXED)), cache.index):
        height, width = upright[name]
        kept = [h * w / (height * width * max(h / height, w / width) ** 2) for h, w in SHAPES]
        assert kept[record["bucket"]] >= max(kept) - 1e-9, name
        assert record["time_ids"][:2].tolist() == [height, width]
        assert tuple(record["time_ids"][4:]) == SHAPES[record["bucket"]]
        used.add(int(record["bucket"]))
    assert used == {0, 1, 2} and len(cache) == MIXED == sum(map(len, cache.members))


@pytest.mark.slow
def test_moments_and_crops_are_those_of_the_upright_picture_at_its_size(mixed):
    """The picture's and its mirror image's, through diffusers' own VAE."""
    from diffusers import AutoencoderKL

    pictures, _, run = mixed
    cache = Cache(run / "cache")
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae", dtype=torch.float32)
    for i, name in enumerate(cache.names(range(MIXED))):
        shape = SHAPES[cache.index[i]["bucket"]]
        pixels, (top, left), new = resized_and_cropped(read_rgb((pictures / name).read_bytes(), name), shape)
        both = torch.from_numpy(np.stack([pixels, pixels[:, ::-1]])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(both).latent_dist
        batch = cache.batch([i, i], np.array([False, True]), np.zeros(2, bool))
        np.testing.assert_allclose(batch["mean"], posterior.mean, rtol=1e-2, atol=1e-2, err_msg=name)
        np.testing.assert_allclose(batch["std"], posterior.std, rtol=1e-2, atol=1e-4, err_msg=name)
        assert batch["time_ids"][:, 2:4].tolist() == [[top, left], [top, new[1] - shape[1] - left]]


def test_each_micro_batch_is_of_one_size_and_each_row_comes_once_an_epoch(mixed):
    cache = Cache(mixed[2] / "cache")
    values = settings("train", train_batch_size=3, gradient_accumulation_steps=2, seed=7)
    seen, batches = {0: [], 1: [], 2: []}, Batches(cache, values, 1000)
    for step in range(60):
        of_step = [batches.rows(step, slot) for slot in range(2)]
        (size,) = {int(cache.index[example]["bucket"]) for examples in of_step for example in examples}
        seen[size] += sum(of_step, [])
    for size, drawn in seen.items():
        members = sorted(np.flatnonzero(cache.index["bucket"] == size))
        epochs = [drawn[i : i + len(members)] for i in range(0, len(drawn) - len(members) + 1, len(members))]
        assert len(epochs) >= 3 and all(sorted(epoch) == members for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_every_shape_that_is_drawn_is_known_before_the_first_step(mixed):
    """Memory is planned for the first of them and a graph captured for each: one left out would end the run."""
    batches = Batches(Cache(mixed[2] / "cache"), settings("train", train_batch_size=3), 1000)
    samples = batches.one_of_each_bucket()
    drawn = [batches.draw(step, 0) for step in range(60)]
    known, used = (
        [[(name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.items())] for batch in some]
        for some in (samples, drawn)
    )
    assert all(one in known for one in used) and all(one in used for one in known) and len(samples) == len(SHAPES)
    assert samples[0]["x0"].shape == samples[0]["eps"].shape == (3, 4, 16, 16)


@pytest.mark.slow
def test_training_on_it_goes_on_to_the_same_bytes(mixed, tmp_path):
    """Three steps of at least two buckets, in one run and in three."""
    words = (*TRAIN, "--gradient_accumulation_steps", 1, "--checkpointing_steps", 1, "--seed", SEED)
    values = settings("train", train_batch_size=2, gradient_accumulation_steps=1, seed=SEED)
    cache = Cache(mixed[2] / "cache")
    assert len({int(cache.index[Batches(cache, values, 1000).rows(step, 0)[0]]["bucket"]) for step in range(3)}) > 1
    folders = [tmp_path / "once", tmp_path / "thrice"]
    for folder in folders:
        shutil.copytree(mixed[2] / "cache", folder / "cache")
    here("train", "--output_dir", folders[0], *words, "--max_train_steps", 3)
    for steps in (1, 2, 3):
        here("train", "--output_dir", folders[1], *words, "--max_train_steps", steps)
    once, thrice = (untitled(folder / "lora.safetensors") for folder in folders)
    assert once == thrice
    assert all(t.isfinite().all() for t in load((folders[0] / "lora.safetensors").read_bytes()).values())


@pytest.mark.slow
def test_kill_9_among_the_sizes_ends_with_the_same_bytes(mixed, tmp_path, small_batches, monkeypatch):
    real, few = LoadedVAE._finish, tmp_path / "few"
    few.mkdir()
    for path in sorted(mixed[0].iterdir())[:48]:  # pictures and their captions
        shutil.copy(path, few)
    flags = ("--resolution", RESOLUTION, "--buckets")
    precompute(tmp_path / "whole", few, *flags)
    monkeypatch.setattr(LoadedVAE, "_finish", lambda *a: (time.sleep(0.05), real(*a))[1])  # so that there is a middle
    killed = tmp_path / "killed"
    argv = ("--output_dir", killed, "--train_data_dir", few, *PRECOMPUTE, *flags)
    process = Forked("data.precompute", argv, tmp_path / "log")
    keys = killed / "cache" / "posteriors-128x64.keys"  # the second bucket's
    when(lambda: keys.exists() and keys.stat().st_size >= 36 * 2, process)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "cache" / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("data.encoding.PICTURES_AT_ONCE", 2)
    monkeypatch.setattr("data.encoding.CAPTIONS_AT_ONCE", 2)
    precompute(killed, few, *flags)
    assert content(killed) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_mirror_image_comes_with_its_own_crop(tmp_path):
    """Three pixels are to spare: one left of the crop and two right of it, in the mirror image the other way round."""
    folder = tmp_path / "d"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (64, 67, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "a.txt").write_text("a")
    precompute(tmp_path / "run", folder, "--random_flip")
    batch = Cache(tmp_path / "run" / "cache").batch([0, 0, 0], np.array([True, False, True]), np.zeros(3, bool))
    assert batch["time_ids"][:, 3].tolist() == [2, 1, 2] and (batch["time_ids"][:, 2] == 0).all()
    from data.models.files import Model

    vae, flipped = VAE(Model(str(PIPELINE)), "no").load(torch.device("cpu")), pixels[:, ::-1]
    for i, (source, left) in enumerate(((flipped, 2), (pixels, 1), (flipped, 2))):
        wanted = next(vae.encode([(None, torch.from_numpy(source[None, :, left : left + 64].copy()))]))[1][0].numpy()
        np.testing.assert_allclose(batch["mean"][i], wanted[0], rtol=1e-2, atol=1e-2)
    assert np.abs(batch["mean"][0].astype(np.float32) - batch["mean"][1]).max() > 0.1
