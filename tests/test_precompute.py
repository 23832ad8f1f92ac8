"""python -m data.precompute encodes exactly what is not there, to the same bytes however often it was stopped."""

import hashlib
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    PIPELINE,
    PRECOMPUTE,
    TRAIN,
    Forked,
    caption_rows,
    content,
    edit_captions,
    here,
    lines,
    precompute,
    when,
)
from PIL import Image

from data.cache import Cache
from data.common.errors import NumbersError, UserError
from data.encoders import VAE, TextEncoders
from data.images import read_rgb
from data.loaded import LoadedVAE
from data.models.files import Model


def rows_files(folder):
    return {
        p.name: p.read_bytes()
        for p in sorted((folder / "cache").glob("*.rows")) + sorted((folder / "cache").glob("*.keys"))
    }


@pytest.fixture
def no_encoders(monkeypatch):
    """Loading an encoder fails the test."""
    for kind in (TextEncoders, VAE):
        monkeypatch.setattr(kind, "load", lambda *_: pytest.fail("an encoder was loaded"))


def test_a_second_run_encodes_nothing_and_changes_nothing(fresh, pictures, no_encoders, capsys):
    before = content(fresh)
    precompute(fresh, pictures)
    assert f"0 of {PICTURES} rows to encode: nothing changed; " in capsys.readouterr().out
    assert content(fresh) == before


def test_posteriors_equal_the_vaes_of_the_prepared_picture(run):
    """From the file on disk, through diffusers' own image processor, to the row that training reads."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    cache = Cache(run.folder / "cache")
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae", dtype=torch.float32)
    batch = cache.batch(range(PICTURES), np.zeros(PICTURES, bool), np.zeros(PICTURES, bool))
    for i in range(PICTURES):
        image = Image.open(run.pictures / f"{i:03d}.png").convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        with torch.no_grad():
            posterior = vae.encode(VaeImageProcessor().preprocess(image)).latent_dist
        np.testing.assert_allclose(batch["mean"][i], posterior.mean[0], rtol=5e-3, atol=5e-3)
        np.testing.assert_allclose(batch["std"][i], posterior.std[0], rtol=5e-3, atol=1e-5)
        assert batch["time_ids"][i].tolist() == [*Image.open(run.pictures / f"{i:03d}.png").size[::-1], 0, 0, 64, 64]


def test_text_is_the_captions(run):
    texts = TextEncoders(Model(str(PIPELINE)), "no").load(torch.device("cpu"))
    captions = [json.loads(line)["text"] for line in (run.pictures / "metadata.jsonl").read_text().splitlines()]
    batch = Cache(run.folder / "cache").batch(range(PICTURES), np.zeros(PICTURES, bool), np.zeros(PICTURES, bool))
    text, pooled = texts(captions)
    np.testing.assert_allclose(batch["text"], text, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(batch["pooled"], pooled, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("length", [150, 225])
def test_longer_captions_go_through_the_whole_line(length, cached, source, tmp_path, capsys):
    """precompute, train and infer agree on the length by the cache alone; what was encoded of 75 tokens stays."""
    run, far = tmp_path / "run", "a red fox in the forest " * 20 + "at night"
    shutil.copytree(cached, run)
    before = rows_files(run)
    edit_captions(source, lambda rows: [rows[0] | {"text": far}, *rows[1:]])
    precompute(run, source, "--max_token_length", length)
    said = capsys.readouterr().out
    assert f" to encode: 1 caption changed, {PICTURES - 1} captions at another length, the uncond" in said
    assert "longer than CLIP" not in said
    after = rows_files(run)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    cache = Cache(run / "cache")
    texts = TextEncoders(Model(str(PIPELINE)), "no", length).load(torch.device("cpu"))
    text = cache.batch([0], np.zeros(1, bool), np.zeros(1, bool))["text"]
    assert text.shape[1] == 2 + length and cache.manifest["text_shape"] == [2 + length, text.shape[2]]
    np.testing.assert_allclose(text, texts([far])[0], rtol=2e-3, atol=2e-3)
    here("train", "--output_dir", run, *TRAIN, "--max_train_steps", 1)
    here("infer", "--output_dir", run, "--prompt", far[: 4 * length], "--num_inference_steps", 1)
    assert "longer than CLIP" not in capsys.readouterr().out
    here("infer", "--output_dir", run, "--prompt", far * 3, "--num_inference_steps", 1)
    assert f"what follows {length} tokens is not seen" in capsys.readouterr().out
    precompute(run, source)  # and back: the one caption that was never encoded so
    assert "1 of 8 rows encoded: 1 caption at another length; " in capsys.readouterr().out


def test_one_picture_with_several_captions_is_several_rows(source, tmp_path, capsys):
    """If rows were told by name alone, its second caption would count as its first one changed, and none as removed."""
    precompute(tmp_path / "run", source)
    for more, why in (
        (["another"], "1 caption new"),
        (["another", "a third"], "1 caption new"),
        (["other"], "1 caption changed; 1 row removed"),
    ):
        edit_captions(source, lambda rows: rows[:PICTURES] + [dict(rows[3], text=text) for text in more])
        capsys.readouterr()
        precompute(tmp_path / "run", source)
        assert f"1 of {PICTURES + len(more)} rows to encode: {why}; 0 MiB" in capsys.readouterr().out


def test_one_edited_caption_encodes_one_caption(fresh, source, run, capsys):
    edit_captions(
        source, lambda rows: [dict(row, text="something new") if i == 3 else row for i, row in enumerate(rows)]
    )
    before = rows_files(fresh)
    precompute(fresh, source)
    assert f"1 of {PICTURES} rows to encode: 1 caption changed; " in capsys.readouterr().out
    after = rows_files(fresh)
    assert after["posteriors-64x64.rows"] == before["posteriors-64x64.rows"]
    one = len(before["captions.rows"]) // (PICTURES + 1)  # and the unconditional
    assert after["captions.rows"][:-one] == before["captions.rows"]
    old, new = Cache(run.folder / "cache"), Cache(fresh / "cache")
    assert np.flatnonzero(caption_rows(new) != caption_rows(old)).tolist() == [3]
    assert new.manifest["content"] != old.manifest["content"]


def test_one_replaced_picture_encodes_one_picture(fresh, source, capsys):
    """It has its old name, so only its content tells."""
    shutil.copy(source / "001.png", source / "002.png")
    Image.new("RGB", (100, 80), "red").save(source / "004.png")
    precompute(fresh, source)
    why = "1 image changed; 1 row changed, encoded already; "  # 002, which is 001 again
    assert f"1 of {PICTURES} rows to encode: {why}" in capsys.readouterr().out
    cache = Cache(fresh / "cache")
    assert cache.index[2]["picture"] == cache.index[1]["picture"]
    assert cache.index[4]["time_ids"].tolist() == [80, 100, 0, 8, 64, 64]


def test_removed_added_and_reordered_rows(fresh, source, capsys, no_encoders):
    """Nothing is encoded again, and the index follows the new order."""
    cache = Cache(fresh / "cache")
    old, captions = cache.index.copy(), caption_rows(cache)
    edit_captions(source, lambda rows: rows[:2:-1])
    for i in range(3):
        (source / f"{i:03d}.png").unlink()
    precompute(fresh, source)
    assert f"0 of {PICTURES - 3} rows to encode: 3 rows removed; another order; " in capsys.readouterr().out
    new, wanted = Cache(fresh / "cache"), old[:2:-1].copy()
    assert caption_rows(new).tolist() == captions[:2:-1].tolist()
    wanted["first_caption"] = range(PICTURES - 3)
    assert new.index.tobytes() == wanted.tobytes()


def test_equal_captions_are_encoded_once(source, tmp_path, capsys):
    edit_captions(source, lambda rows: [dict(row, text="the same") for row in rows])
    precompute(tmp_path / "run", source)
    assert f"{PICTURES} of {PICTURES} rows to encode: 1 caption new, {PICTURES} images new; " in capsys.readouterr().out


@pytest.mark.slow
def test_another_resolution_or_vae_encodes_pictures_again_and_is_never_mixed(fresh, pictures, source, capsys):
    before = rows_files(fresh)
    precompute(fresh, pictures, "--resolution", 128)
    assert f"to encode: {PICTURES} images at another resolution; " in capsys.readouterr().out
    cache = Cache(fresh / "cache")
    assert cache.manifest["resolution"] == 128 and [m.shape for m in cache.posteriors] == [(2, 4, 16, 16)]
    assert rows_files(fresh)["posteriors-64x64.rows"] == before["posteriors-64x64.rows"]  # and back again costs nothing
    other = source / "vae"
    shutil.copytree(PIPELINE / "vae", other)
    (other / "config.json").write_text((other / "config.json").read_text().replace("0.13025", "0.13026"))
    precompute(fresh, pictures, "--resolution", 128, "--pretrained_vae_model_name_or_path", other)
    why = f"{PICTURES} images for another encoder; the model's or the VAE's name"
    assert f"to encode: {why}; " in capsys.readouterr().out
    assert Cache(fresh / "cache").manifest["vae"]["name"] == str(other)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [0, 1, 35])
def test_what_a_kill_leaves_is_finished_to_the_same_bytes(torn, pictures, tmp_path, small_batches):
    """There is no manifest, the keys end in the middle of one, and rows behind the last key count for nothing."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    precompute(whole, pictures)
    shutil.copytree(whole, killed)
    for name in ("manifest.json", "index.npy", "names.txt"):
        (killed / "cache" / name).unlink()
    for name, committed in (("captions", 1 + 2 * 2), ("posteriors-64x64", 2)):
        rows, keys = (killed / "cache" / f"{name}.{kind}" for kind in ("rows", "keys"))
        row_bytes = rows.stat().st_size // (keys.stat().st_size // 36)
        os.truncate(keys, 36 * committed + torn)
        with open(rows, "r+b") as file:
            file.seek(row_bytes * committed)
            file.write(b"\xff" * (row_bytes + 100))
            file.truncate()
    precompute(killed, pictures)
    assert content(killed) == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize("committed", [2, 4])
def test_kill_9_in_the_middle(committed, pictures, tmp_path, small_batches):
    """A real process is killed; the same command then goes on and ends with the same bytes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    precompute(whole, pictures)
    process = Forked(
        "data.precompute", ("--output_dir", killed, "--train_data_dir", pictures, *PRECOMPUTE), tmp_path / "log"
    )
    keys = killed / "cache" / "posteriors-64x64.keys"
    when(lambda: keys.exists() and keys.stat().st_size >= 36 * committed, process)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "cache" / "manifest.json").exists()
    precompute(killed, pictures)
    assert content(killed) == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_encoded_and_the_same_command_goes_on(
    signum, code, pictures, run, tmp_path, small_batches, monkeypatch
):
    """Free GPUs are taken back with a SIGTERM; every picture encoded until then was paid for."""
    stopped, real = tmp_path / "stopped", LoadedVAE._start
    monkeypatch.setattr(LoadedVAE, "_start", lambda *a: (time.sleep(0.2), real(*a))[1])
    monkeypatch.setattr("data.encoding.PICTURES_AT_ONCE", 1)
    process = Forked(
        "data.precompute", ("--output_dir", stopped, "--train_data_dir", pictures, *PRECOMPUTE), tmp_path / "log"
    )
    keys = stopped / "cache" / "posteriors-64x64.keys"
    when(lambda: keys.exists() and keys.stat().st_size >= 36, process)
    process.send(signum)
    assert process.wait(20) == code
    assert process.output.splitlines()[-1] == "error: stopped, what is encoded is kept; run the same command to go on"
    assert 1 <= keys.stat().st_size // 36 < PICTURES and not (stopped / "cache" / "manifest.json").exists()
    monkeypatch.undo()
    precompute(stopped, pictures)
    assert Cache(stopped / "cache").manifest["content"] == Cache(run.folder / "cache").manifest["content"]


def test_two_folders_have_the_same_bytes(run, pictures, tmp_path):
    precompute(tmp_path / "other", pictures)
    assert content(tmp_path / "other") == content(run.folder)


def test_random_flip_caches_the_mirror_image(pictures, tmp_path):
    precompute(tmp_path / "run", pictures, "--random_flip", "--max_train_samples", 3)
    cache = Cache(tmp_path / "run" / "cache")
    vae = VAE(Model(str(PIPELINE)), "no").load(torch.device("cpu"))
    plain, mirrored = (cache.batch(range(3), np.full(3, m), np.zeros(3, bool)) for m in (False, True))
    for i in range(3):
        image = read_rgb((pictures / f"{i:03d}.png").read_bytes(), "x").resize((64, 64), Image.Resampling.LANCZOS)
        pixels = np.stack([np.asarray(image), np.asarray(image)[:, ::-1]])
        wanted = next(vae.encode([(None, torch.from_numpy(pixels.copy()))]))[1].numpy()
        np.testing.assert_allclose(plain["mean"][i], wanted[0, 0], rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(mirrored["mean"][i], wanted[1, 0], rtol=1e-2, atol=1e-2)
    assert not np.allclose(plain["mean"], mirrored["mean"], atol=0.05)


def test_without_random_flip_the_mirrored_picture_is_the_picture(run):
    cache = Cache(run.folder / "cache")
    assert (cache.index["picture"] == cache.index["mirrored"]).all()


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_is_the_models_own(zeros, source, tmp_path):
    """SDXL's pipeline uses zeros or the empty prompt, as its index says, and caption dropout must train the same."""
    model = tmp_path / "model"
    shutil.copytree(PIPELINE, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | dict(force_zeros_for_empty_prompt=zeros)))
    precompute(tmp_path / "run", source, "--pretrained_model_name_or_path", model, "--max_train_samples", 2)
    cache = Cache(tmp_path / "run" / "cache")
    batch = cache.batch([0], np.zeros(1, bool), np.ones(1, bool))
    text, pooled = TextEncoders(Model(str(PIPELINE)), "no").load(torch.device("cpu"))([""])
    factor = 0 if zeros else 1
    np.testing.assert_allclose(batch["text"], text.numpy() * factor, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(batch["pooled"], pooled.numpy() * factor, rtol=2e-3, atol=2e-3)


def test_a_bad_picture_is_named_before_anything_is_encoded(source, tmp_path, no_encoders):
    (source / "003.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"^003\.png: not a picture"):
        precompute(tmp_path / "run", source)


def nan_for(monkeypatch, at):
    """The VAE fails on the picture at this place of every batch."""
    real = LoadedVAE._finish

    def finish(self, *args):
        posteriors = real(self, *args).clone()
        posteriors[at : at + 1] *= torch.nan
        return posteriors

    monkeypatch.setattr(LoadedVAE, "_finish", finish)


def test_a_picture_that_the_vae_cannot_encode_is_named_and_never_cached(source, tmp_path, monkeypatch):
    nan_for(monkeypatch, 2)
    with pytest.raises(NumbersError, match=r"^002\.png: the VAE gives numbers that are not finite"):
        precompute(tmp_path / "run", source)
    assert not (tmp_path / "run" / "cache" / "manifest.json").exists()
    assert not lines(tmp_path / "run" / "cache" / "posteriors-64x64.keys")


def test_a_long_caption_is_counted_with_an_example(source, tmp_path, capsys):
    edit_captions(
        source,
        lambda rows: [dict(row, text="foxes and birds " * 60 + str(i)) if i < 2 else row for i, row in enumerate(rows)],
    )
    precompute(tmp_path / "run", source)
    said = capsys.readouterr().out
    assert "longer than CLIP reads: 2 captions; what follows 75 tokens is not seen, e.g. of 000.png: 'foxes" in said
    assert max(map(len, said.splitlines())) < 400  # of a caption of any length


def test_a_resolution_that_does_not_fit_the_vae_is_refused_at_the_door(tmp_path, pictures):
    with pytest.raises(UserError, match="--resolution 100: must be a multiple of 64"):
        precompute(tmp_path / "run", pictures, "--resolution", 100)
    assert not (tmp_path / "run").exists()


def test_the_manifest_says_what_the_next_stages_need(run):
    manifest = Cache(run.folder / "cache").manifest
    assert manifest["model"]["name"] == manifest["vae"]["name"] == str(PIPELINE)
    assert manifest["resolution"] == 64 and manifest["rows"] == PICTURES
    assert manifest["scaling_factor"] == json.loads((PIPELINE / "vae" / "config.json").read_text())["scaling_factor"]
    assert len(manifest["content"]) == len(hashlib.sha256().hexdigest())


def test_pillows_limit_is_off_while_the_command_runs_and_only_then(tmp_path, capsys):
    """196 million pixels are more than Pillow takes. With --explain only the header is read."""
    (tmp_path / "source").mkdir()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "source" / "large.bmp")
    (tmp_path / "source" / "large.txt").write_text("a large picture")
    limit = Image.MAX_IMAGE_PIXELS
    precompute(tmp_path / "run", tmp_path / "source", "--explain")
    assert "\n1 of 1 row to encode: 1 caption new, 1 image new; " in capsys.readouterr().out
    assert limit == Image.MAX_IMAGE_PIXELS
