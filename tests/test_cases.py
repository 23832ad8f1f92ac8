"""Cases that came up in use."""

import io
import os
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import PICTURES, PRECOMPUTE, TRAIN, Forked, edit_captions, here, icc_profile, precompute, when
from PIL import Image, ImageCms

from data.cache import Cache
from data.common.errors import UserError
from data.encoders import VAE, TextEncoders
from data.loaded import LoadedTextEncoders


def texts(run):
    """The text that training reads for each example of a run."""
    cache = Cache(run / "cache")
    count = len(cache.index)
    return cache.batch(range(count), np.zeros(count, bool), np.zeros(count, bool))["text"]


# ---- Pictures with a colour profile


PROFILES = {  # the colours of their red, green and blue, and their gamma
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), 2.2),
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.19922),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_picture_with_a_colour_profile_is_trained_on_as_one_sees_it(name, tmp_path):
    blob, srgb = icc_profile(name, *PROFILES[name]), ImageCms.createProfile("sRGB")
    wide = ImageCms.ImageCmsProfile(io.BytesIO(blob))
    colours = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    scene = Image.fromarray(colours).resize((96, 96), Image.Resampling.NEAREST)
    stored = ImageCms.profileToProfile(scene, srgb, wide, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)
    seen = ImageCms.profileToProfile(stored, wide, srgb, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)
    source = tmp_path / "source"
    source.mkdir()
    stored.save(source / "0 with profile.png", icc_profile=blob)
    stored.save(source / "1 without.png", icc_profile=None)  # Pillow would write the one that the image was made with
    seen.save(source / "2 seen.png", icc_profile=None)
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text("a pattern")
    precompute(tmp_path / "run", source)
    means = Cache(tmp_path / "run" / "cache").batch(range(3), np.zeros(3, bool), np.zeros(3, bool))["mean"]
    with_profile, without, as_seen = means.astype(np.float32)
    assert np.abs(without - as_seen).mean() > 0.01  # the profile makes a difference, or this test would show nothing
    assert np.abs(with_profile - as_seen).mean() < np.abs(without - as_seen).mean() / 5


# ---- Several captions of one picture


def test_a_list_of_captions_gives_single_captions(pictures, tmp_path, done):
    """diffusers' script draws one of them."""
    import datasets

    features = datasets.Features(image=datasets.Image(), text=datasets.List(datasets.Value("string")))
    columns = dict(image=[str(pictures / f"00{i}.png") for i in range(2)], text=[["a fox", "an animal"], ["a bird"]])
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    here("data.precompute", "--output_dir", tmp_path / "run", "--dataset_name", tmp_path / "saved", *PRECOMPUTE)
    assert {"a bird"} < set(done["captions"]) <= {"a fox", "an animal", "a bird"}


def test_the_lines_of_a_text_file_are_single_captions(pictures, tmp_path, done):
    """OneTrainer and sd-scripts draw one of them."""
    captions = ["a red ball", "1girl, ball, red", "the photo shows a ball"]
    (tmp_path / "source").mkdir()
    shutil.copy(pictures / "000.png", tmp_path / "source")
    (tmp_path / "source" / "000.txt").write_text("\n".join(captions) + "\n")
    precompute(tmp_path / "run", tmp_path / "source")
    assert done["captions"] and set(done["captions"]) <= set(captions)


# ---- The rows of a cache and its index


def test_an_index_never_leads_to_the_rows_of_other_captions(cached, source, tmp_path, monkeypatch):
    """The captions were lost and edited, and precompute is stopped when they are written and the index is not.

    The old index then leads to other captions, each of them with a good checksum: train must refuse them.
    """
    run, unload = tmp_path / "run", LoadedTextEncoders.unload
    shutil.copytree(cached, run)
    for name in ("captions.rows", "captions.keys"):
        (run / "cache" / name).unlink()
    edit_captions(source, lambda rows: [dict(row, text=f"a blue whale {i}") for i, row in enumerate(rows)])
    Image.new("RGB", (64, 64), "red").save(source / "000.png")  # so that there is a picture to encode, too
    monkeypatch.setattr(LoadedTextEncoders, "unload", lambda self: (os.kill(os.getpid(), signal.SIGTERM), unload(self)))
    words = ("--output_dir", run, "--train_data_dir", source, *PRECOMPUTE)
    assert Forked("data.precompute", words, tmp_path / "log").wait() == 143
    try:
        here("train", "--output_dir", run, *TRAIN, "--max_train_steps", 1)
    except UserError:
        return  # rightly refused
    assert np.array_equal(texts(run), texts(cached))


def test_two_runs_that_share_a_cache_do_not_write_it_at_once(source, tmp_path, monkeypatch):
    """Many runs link to one cache. Both append to its files, and the index of one leads to the rows of the other."""

    def reach(name):
        (tmp_path / name).touch()

    def wait_for(name):
        deadline = time.monotonic() + 60
        while not (tmp_path / name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def begin(run, captions):
        """precompute of a run whose cache is the shared one, on the same pictures with captions of its own"""
        mine = tmp_path / f"source {run}"
        shutil.copytree(source, mine)
        edit_captions(mine, lambda rows: [dict(row, text=f"{captions} {i}") for i, row in enumerate(rows)])
        (tmp_path / run).mkdir()
        (tmp_path / run / "cache").symlink_to(tmp_path / "shared")
        words = ("--output_dir", tmp_path / run, "--train_data_dir", mine, *PRECOMPUTE)
        return Forked("data.precompute", words, tmp_path / f"log {run}")

    (tmp_path / "shared").mkdir()
    with monkeypatch.context() as late:  # it has looked at the cache while that was empty
        load = TextEncoders.load
        late.setattr(TextEncoders, "load", lambda *a: (reach("looked"), wait_for("captions"), load(*a))[-1])
        second = begin("second", "a blue whale")
    when((tmp_path / "looked").exists, second)
    with monkeypatch.context() as slow:  # its captions are on disk, and its pictures take long
        load_vae = VAE.load
        slow.setattr(VAE, "load", lambda *a: (reach("captions"), wait_for("go"), load_vae(*a))[-1])
        first = begin("first", "a red fox")
    when(lambda: (tmp_path / "captions").exists() or (first.log.exists() and "error: " in first.output), first)
    reach("captions")
    codes = [second.wait()]
    reach("go")
    codes.append(first.wait())
    if 2 in codes:
        return  # one of the two was rightly refused
    assert codes == [0, 0], first.output + second.output
    precompute(tmp_path / "alone", tmp_path / "source first")
    assert len(texts(tmp_path / "first")) == PICTURES
    assert np.array_equal(texts(tmp_path / "first"), texts(tmp_path / "alone"))
