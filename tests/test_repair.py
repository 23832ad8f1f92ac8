"""Damaged rows are made again in their place. Rows that cannot be used stop the command or are left out."""

import io
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import PICTURES, PRECOMPUTE, Forked, content, edit_captions, precompute, when
from PIL import Image

from data.cache import Cache, Rows
from data.common.errors import NumbersError, UserError
from data.loaded import LoadedVAE


def row_bytes(folder, name):
    rows, keys = (folder / "cache" / f"{name}.{kind}" for kind in ("rows", "keys"))
    return rows.stat().st_size // (keys.stat().st_size // 36)


# ---- Repair


@pytest.mark.parametrize("name", ["captions", "posteriors-64x64"])
@pytest.mark.parametrize("damage", ["one bit of row 3", "bits of rows 0, 2 and 5", "cut off in row 2", "empty", "gone"])
def test_exactly_the_damaged_rows_are_encoded_again_in_their_place(
    name, damage, cached, pictures, tmp_path, done, capsys
):
    run = tmp_path / "run"
    shutil.copytree(cached, run)
    before, path = content(run), run / "cache" / f"{name}.rows"
    size, count = row_bytes(run, name), len(before[f"{name}.keys"]) // 36
    if damage == "gone":
        path.unlink()
        bad = range(count)
    elif "bit" in damage:
        bad = [3] if "one" in damage else [0, 2, 5]
        with open(path, "r+b") as file:
            for row in bad:
                at = row * size + size // 2 + row
                file.seek(at)
                file.write(bytes([before[path.name][at] ^ 8]))
    else:
        os.truncate(path, size * 5 // 2 if "row" in damage else 0)
        bad = range(2 if "row" in damage else 0, count)
    precompute(run, pictures)
    after = content(run)
    assert after.keys() == before.keys() and len(after[path.name]) == len(before[path.name])
    rows, keys = Rows(run / "cache", name, (size // 2,)), Rows(cached / "cache", name, (size // 2,))
    assert np.array_equal(rows.keys["key"], keys.keys["key"])
    for i in range(count):  # in other batches than the first time, which may round differently
        if i in bad:
            np.testing.assert_allclose(rows[i].astype(np.float32), keys[i].astype(np.float32), rtol=5e-3, atol=5e-3)
        else:
            assert rows[i].tobytes() == keys[i].tobytes()
    assert all(after[file] == before[file] for file in after if name not in file)
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    if name == "captions":  # row 0 is the unconditional, zeros that no encoder makes
        assert done["captions"] == [captions[row - 1] for row in bad if row] and not done["pictures"]
    else:
        wanted = [np.asarray(Image.open(pictures / f"{row:03d}.png").convert("RGB").resize((64, 64), 1)) for row in bad]
        assert len(done["pictures"]) == len(wanted) and all(map(np.array_equal, done["pictures"], wanted))
        assert not done["captions"]
    if name != "captions" or damage.startswith("one"):
        assert f"{len(bad)} of {PICTURES} rows encoded: " in capsys.readouterr().out


# ---- Rows that cannot be used


def jpeg(image):
    blob = io.BytesIO()
    image.save(blob, "JPEG", quality=95)
    return blob.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
BAD = {  # file name -> (its bytes, what the message says); a caption of None is the sixth kind
    "html.png": (b"<html><body>404</body></html>", "not a picture that can be read"),
    "empty.jpg": (b"", "not a picture that can be read"),
    "cut.jpg": (jpeg(NOISE)[:9000], "not a picture that can be read"),  # its header is whole: found when it is decoded
    "sliver.jpg": (jpeg(Image.new("RGB", (900, 20))), "900 × 20 pixels is longer than 16:1"),
    "silent.jpg": (jpeg(NOISE), "its caption is None, not text"),
}


def add_bad(source, names=tuple(BAD)):
    """Put them between the good rows."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    for i, name in enumerate(names):
        (source / name).write_bytes(BAD[name][0])
        rows.insert(1 + 2 * i, {"file_name": name, "text": None if name == "silent.jpg" else rows[0]["text"]})
    edit_captions(source, lambda _: rows)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--random_flip",)])
def test_skip_bad_leaves_out_and_lists_exactly_the_bad(flags, source, tmp_path, capsys):
    precompute(tmp_path / "good", source, *flags)
    add_bad(source)
    capsys.readouterr()
    precompute(tmp_path / "run", source, *flags, "--skip_bad")
    assert f"{len(BAD)} rows left out, e.g. " in capsys.readouterr().out
    good, run = Cache(tmp_path / "good" / "cache"), Cache(tmp_path / "run" / "cache")
    assert sorted(name for name, _ in run.manifest["skipped"]) == sorted(BAD) and not good.manifest["skipped"]
    for name, why in run.manifest["skipped"]:
        assert not why.startswith(name) and BAD[name][1] in why
    assert run.names(range(PICTURES)) == good.names(range(PICTURES)) and len(run) == run.manifest["rows"] == PICTURES
    before, after = content(tmp_path / "good"), content(tmp_path / "run")
    same = set(before) - {"manifest.json"}
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert run.manifest["content"] == good.manifest["content"]
    precompute(tmp_path / "run", source, *flags, "--skip_bad")
    assert content(tmp_path / "run") == after


@pytest.mark.parametrize("name", BAD)
def test_without_skip_bad_each_stops_the_command_naming_it(name, source, tmp_path):
    add_bad(source, [name])
    with pytest.raises(UserError, match=f"^{name}: .*{BAD[name][1].split(': ')[-1]}"):
        precompute(tmp_path / "run", source)
    assert not (tmp_path / "run" / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("names", [["cut.jpg"], ["html.png", "silent.jpg"]])
def test_nothing_but_bad_rows_is_refused(names, source, tmp_path):
    add_bad(source, names)
    edit_captions(source, lambda rows: [row for row in rows if row["file_name"] in names])
    with pytest.raises(UserError, match=rf"none of {len(names)} rows? can be used, e.g. {names[0]}"):
        precompute(tmp_path / "run", source, "--skip_bad")
    assert not (tmp_path / "run" / "cache" / "manifest.json").exists()


def test_the_same_bad_picture_twice_is_listed_twice(source, tmp_path):
    """It is tried once, because equal pictures are encoded once, but both rows are left out and listed."""
    add_bad(source, ["cut.jpg"])
    shutil.copy(source / "cut.jpg", source / "007.png")
    precompute(tmp_path / "run", source, "--skip_bad")
    cache = Cache(tmp_path / "run" / "cache")
    assert len(cache) == PICTURES - 1
    assert sorted(name for name, _ in cache.manifest["skipped"]) == ["007.png", "cut.jpg"]


def test_a_picture_without_a_finite_posterior_is_left_out_with_skip_bad(source, tmp_path, monkeypatch):
    real = LoadedVAE._finish

    def finish(self, pixels, *waiting):
        posteriors = real(self, pixels, *waiting).clone()
        posteriors[(pixels == 77).all(dim=(1, 2, 3))] = float("inf")
        return posteriors

    monkeypatch.setattr(LoadedVAE, "_finish", finish)
    precompute(tmp_path / "good", source)
    Image.new("RGB", (64, 64), (77, 77, 77)).save(source / "inf.png")
    edit_captions(source, lambda rows: [*rows[:3], {"file_name": "inf.png", "text": rows[0]["text"]}, *rows[3:]])
    with pytest.raises(NumbersError, match=r"^inf\.png: the VAE gives numbers that are not finite"):
        precompute(tmp_path / "stopped", source)
    precompute(tmp_path / "run", source, "--skip_bad")
    ((name, why),) = Cache(tmp_path / "run" / "cache").manifest["skipped"]
    assert name == "inf.png" and "not finite" in why
    good, found = content(tmp_path / "good"), content(tmp_path / "run")
    assert all(good[name] == found[name] for name in good if name != "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("committed", [2, 4])
def test_kill_9_with_bad_rows_ends_with_the_same_bytes(committed, source, tmp_path, small_batches, monkeypatch):
    add_bad(source)
    real = LoadedVAE._finish
    monkeypatch.setattr(LoadedVAE, "_finish", lambda *a: (time.sleep(0.05), real(*a))[1])  # so that there is a middle
    precompute(tmp_path / "whole", source, "--skip_bad")
    killed = tmp_path / "killed"
    flags = ("--output_dir", killed, "--train_data_dir", source, *PRECOMPUTE, "--skip_bad")
    process = Forked("data.precompute", flags, tmp_path / "log")
    keys = killed / "cache" / "posteriors-64x64.keys"
    when(lambda: keys.exists() and keys.stat().st_size >= 36 * committed, process)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "cache" / "manifest.json").exists()
    precompute(killed, source, "--skip_bad")
    assert content(killed) == content(tmp_path / "whole")
