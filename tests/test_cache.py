"""The cache on disk: rows found by what they are made of, committed one by one, checked when read."""

import errno
import hashlib
import json
import os
import shutil
import time
import zlib

import numpy as np
import pytest
from conftest import caption_rows, change_cache, edit_captions, precompute

from data.cache import INDEX, KEY, Cache, Rows, _checksum, read_manifest
from data.common import system
from data.common.errors import MachineError, UserError

SHAPE = (3, 5)


def row_key(i):
    return bytes([i]) * 32


def values(*numbers):
    return np.stack([np.full(SHAPE, n) + np.arange(15).reshape(SHAPE) / 16 for n in numbers]).astype(np.float16)


def batch_of(numbers):
    return [row_key(n) for n in numbers], values(*numbers)


def position(rows, n):
    return int(rows.find(np.array([row_key(n)], "S32"))[0])


def rows(folder):
    return Rows(folder, "things", SHAPE)


def fill(folder, *numbers, batch=2):
    made = rows(folder)
    made.write(len(numbers), (batch_of(numbers[i : i + batch]) for i in range(0, len(numbers), batch)))
    return made


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_rows_come_back_by_key_and_from_a_new_reader(tmp_path):
    made = fill(tmp_path, 4, 9, 1)
    made.write(1, [batch_of([7])])
    for reader in (made, rows(tmp_path)):
        assert [position(reader, n) for n in (4, 9, 1, 7, 5)] == [0, 1, 2, 3, -1]
        for i, n in enumerate((4, 9, 1, 7)):
            assert np.array_equal(reader[i], values(n)[0]) and reader[i].dtype == np.float16
        assert np.array_equal(reader.read([3, 0, 3]), values(7, 4, 7))


def test_nothing_to_append_writes_nothing(tmp_path):
    rows(tmp_path).write(0, [])
    assert not files(tmp_path)


def test_a_key_with_zero_bytes_at_its_end_is_found(tmp_path):
    """numpy's bytes type drops them; one sha256 in 256 ends in one."""
    key = b"\1" * 30 + b"\0\0"
    rows(tmp_path).write(1, [([key], values(1))])
    assert rows(tmp_path).find(np.array([key, b"\1" * 30], "S32")).tolist() == [0, 0]  # no digest is shorter


@pytest.mark.parametrize("cut_rows", [0, 7, 30, 31, 90])
@pytest.mark.parametrize("cut_keys", [0, 1, 35, 36, 37, 72])
def test_a_killed_writer_is_continued_to_the_same_bytes(cut_rows, cut_keys, tmp_path):
    """What was left behind the last key, even in the middle of a row or a key, is made again, and nothing else is."""
    (tmp_path / "whole").mkdir()
    fill(tmp_path / "whole", 1, 2, 3, 4, 5)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    keys = killed / "things.keys"
    os.truncate(keys, keys.stat().st_size - cut_keys)
    committed = keys.stat().st_size // KEY.itemsize
    data = killed / "things.rows"
    os.truncate(data, max(committed * 30, data.stat().st_size - cut_rows))  # bytes are written before their key
    again = rows(killed)
    assert len(again.keys) == committed
    todo = [n for n in (1, 2, 3, 4, 5) if position(again, n) < 0]
    assert len(todo) == 5 - committed
    again.write(len(todo), (batch_of([n]) for n in todo))
    assert files(killed) == files(tmp_path / "whole")


def test_rows_are_committed_as_time_goes_by(tmp_path, monkeypatch):
    """A second after the last commit the rows since then are committed; the disk is not asked for every batch."""
    now, asked, seen, real = [0.0], [], [], os.fdatasync
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fdatasync", lambda fd: (asked.append(fd), real(fd)))

    def slowly():
        for n in range(1, 9):
            now[0] = 1.5 if n > 4 else 0.4
            if n in (4, 8):  # written while the next one is made: wait for those before it
                deadline = time.time() + (5 if n == 8 else 0.2)
                while not (count := len(rows(tmp_path))) and time.time() < deadline:
                    time.sleep(0.01)
                seen.append(count)
            yield batch_of([n])

    rows(tmp_path).write(8, slowly())
    assert seen[0] == 0 and 3 <= seen[1] < 8
    assert len(asked) == 2 * 2 and len(rows(tmp_path)) == 8  # twice: rows, keys


def test_what_came_before_an_error_is_committed(tmp_path):
    """An encoder that dies at row 900 of 1,000 must not cost 900."""

    def dies():
        yield batch_of([1, 2])
        yield batch_of([3, 4])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rows(tmp_path).write(6, dies())
    again = rows(tmp_path)
    assert [position(again, n) for n in range(1, 7)] == [0, 1, 2, 3, -1, -1]
    assert np.array_equal(again[3], values(4)[0])


def failing_at(call, monkeypatch, owner, name):
    """The disk fails the call-th time that owner.name is asked. -> a list that grows by one each time"""
    asked, real = [], getattr(owner, name)

    def asks(argument):
        asked.append(argument)
        if len(asked) == call:
            raise OSError(errno.EIO, "Input/output error")
        return real(argument)

    monkeypatch.setattr(owner, name, asks)
    monkeypatch.setattr("data.cache.COMMIT_SECONDS", 0)
    return asked


def test_after_a_row_that_cannot_be_written_nothing_is(tmp_path, monkeypatch):
    """Not half of its batch, because how a row is rounded depends on the whole, and not the batch that is under way."""
    with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output"):
        failing_at(4, broken, zlib, "crc32")
        rows(tmp_path).write(8, (batch_of([n, n + 1]) for n in (1, 3, 5, 7)))
    again = rows(tmp_path)
    assert [n for n in range(1, 9) if position(again, n) >= 0] == [1, 2]
    assert all(np.array_equal(again[position(again, n)], values(n)[0]) for n in (1, 2))


@pytest.mark.parametrize("which", [0, 1])
def test_a_sync_that_failed_is_not_asked_again(which, tmp_path, monkeypatch):
    """After an error Linux may say yes the second time although the pages are lost: keys would promise lost bytes."""
    asked = failing_at(3 + which, monkeypatch, os, "fdatasync")  # the second commit's, of its rows or of its keys
    with pytest.raises(OSError, match="Input/output"):
        rows(tmp_path).write(8, (batch_of([n, n + 1]) for n in (1, 3, 5, 7)))
    assert len(asked) == 3 + which
    assert len(rows(tmp_path)) == (2 if which == 0 else 4)


def test_bytes_are_on_disk_before_their_keys(tmp_path, monkeypatch):
    """The other way round, a power cut would leave keys of rows that are not there."""
    monkeypatch.setattr("data.cache.COMMIT_SECONDS", 0)
    done, real = [], os.fdatasync
    monkeypatch.setattr(
        os, "fdatasync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real(fd))
    )
    fill(tmp_path, 1, 2, 3)
    assert done == ["things.rows", "things.keys"] * 2


def test_the_keys_of_a_commit_are_written_in_one_call(tmp_path, monkeypatch):
    """Or a kill could part a batch, and the rest of it, encoded alone, would be rounded otherwise."""
    sizes, real = [], system.write_at
    monkeypatch.setattr(system, "write_at", lambda fd, data, at: (sizes.append(len(data)), real(fd, data, at))[1])
    rows(tmp_path).write(5, iter([batch_of([1, 2]), batch_of([3, 4, 5])]))
    assert sizes == [5 * KEY.itemsize]
    assert [position(rows(tmp_path), n) for n in range(1, 6)] == [0, 1, 2, 3, 4]


def test_keys_that_fit_in_part_are_taken_back_and_said(tmp_path, monkeypatch):
    """A write on a full disk takes what fits and says how much; unheard, half a batch would count and half be lost."""
    real = system.write_at
    rows(tmp_path).write(2, iter([batch_of([1, 2])]))
    monkeypatch.setattr(system, "write_at", lambda fd, data, at: real(fd, data[: len(data) // 2], at))
    with pytest.raises(OSError, match="No space left on device.*things.keys"):
        rows(tmp_path).write(3, iter([batch_of([3, 4, 5])]))
    monkeypatch.undo()
    again = rows(tmp_path)
    assert [position(again, n) for n in range(1, 6)] == [0, 1, -1, -1, -1]


def test_a_full_disk_is_found_before_the_first_row(tmp_path, monkeypatch):
    """Found later, it would be found after hours of encoding."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match=r"things.rows: No space left on device; \d+ MiB are needed"):
        rows(tmp_path).write(1, (pytest.fail("encoded") for _ in range(1)))


def test_a_flipped_byte_is_found_when_read(tmp_path):
    """In every byte of a row, and only in that row: its neighbours stay good."""
    fill(tmp_path, 1, 2, 3)
    path = tmp_path / "things.rows"
    whole = path.read_bytes()
    for at in range(30, 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        damaged = rows(tmp_path)
        with pytest.raises(UserError, match=r"things.rows: row 1 is damaged; run python -m data.precompute again"):
            damaged[1]
        assert damaged[0] is not None and damaged[2] is not None


def test_a_row_is_repaired_in_its_place(tmp_path):
    """A damaged row and one that is cut off are written again under their keys, and the file is what it was."""
    fill(tmp_path, 1, 2, 3)
    whole = files(tmp_path)
    for damage in (lambda f: (f.seek(31), f.write(b"x")), lambda f: f.truncate(70), lambda f: f.truncate(0)):
        with open(tmp_path / "things.rows", "r+b") as file:
            damage(file)
        damaged = rows(tmp_path)
        bad = [n for i, n in enumerate((1, 2, 3)) if not damaged.good(i)]
        assert bad and all(position(damaged, n) >= 0 for n in bad)
        damaged.write(len(bad), [batch_of(bad)])
        assert files(tmp_path) == whole


def test_rows_that_are_gone_are_named(tmp_path):
    """When bytes are cut off, or the file or its keys are gone, whoever reads a lost row is told, and only then."""
    fill(tmp_path, 1, 2, 3)
    os.truncate(tmp_path / "things.rows", 89)
    cut = rows(tmp_path)
    assert np.array_equal(cut[1], values(2)[0])
    for path in (tmp_path / "things.rows", tmp_path / "things.keys"):
        with pytest.raises(UserError, match="things.rows: row 2 is damaged"):
            rows(tmp_path)[2]
        path.unlink()
    with pytest.raises(UserError, match="things.rows: row 0 is damaged"):
        rows(tmp_path)[0]


# ---- a finished cache


def test_a_batch_is_what_the_rows_say(run):
    """Each example has its own caption, picture and time ids, in the order that was asked for."""
    cache = Cache(run.folder / "cache")
    examples = [5, 0, 5]
    batch, places = cache.batch(examples, np.zeros(3, bool), np.zeros(3, bool)), caption_rows(cache)
    assert set(batch) == {"mean", "std", "text", "pooled", "time_ids"}
    for i, example in enumerate(examples):
        record = cache.index[example]
        posterior, caption = cache.posteriors[record["bucket"]][record["picture"]], cache.captions[places[example]]
        assert np.array_equal(batch["mean"][i], posterior[0]) and np.array_equal(batch["std"][i], posterior[1])
        assert np.array_equal(np.concatenate([batch["text"][i].ravel(), batch["pooled"][i]]), caption)
        assert batch["time_ids"][i].tolist() == record["time_ids"].tolist()
    assert (batch["std"] > 0).all()
    assert not any(np.array_equal(batch[name][0], batch[name][1]) for name in ("mean", "text"))
    batch["mean"][:] = 0  # it is a copy, and writing to it leaves the cache as it is
    assert cache.batch([5], np.zeros(1, bool), np.zeros(1, bool))["mean"].any()


def test_an_empty_caption_is_the_unconditional_row_of_that_example_alone(run):
    """SDXL's unconditional row is zeros; the other examples keep their captions."""
    cache = Cache(run.folder / "cache")
    plain = cache.batch([1, 2], np.zeros(2, bool), np.zeros(2, bool))
    dropped = cache.batch([1, 2], np.zeros(2, bool), np.array([False, True]))
    assert plain["text"][1].any() and plain["pooled"][1].any()
    assert not dropped["text"][1].any() and not dropped["pooled"][1].any()
    assert np.array_equal(dropped["text"][0], plain["text"][0]) and np.array_equal(dropped["mean"], plain["mean"])


def test_names_are_the_examples(run):
    assert Cache(run.folder / "cache").names([3, 0]) == ["003.png", "000.png"]


def test_a_caption_is_drawn_from_the_examples_range(fresh):
    """which is where in the range, from 0 to just below 1; an example with one caption always has that one."""

    def three(index):
        index["first_caption"], index["captions"] = 0, 1
        index["first_caption"][2], index["captions"][2] = 3, 3
        return index

    change_cache(fresh, three)
    cache, no = Cache(fresh / "cache"), np.zeros(1, bool)
    for which, place in ((0.0, 3), (0.33, 3), (0.34, 4), (0.67, 5), (1 - 2**-24, 5)):
        which = np.array([which], np.float32)
        text = cache.batch([2], no, no, which)["text"][0].ravel()
        assert np.array_equal(text, cache.captions[cache.caption_rows[place]][: len(text)])
        assert np.array_equal(cache.batch([1], no, no, which)["text"], cache.batch([0], no, no)["text"])


def test_a_cache_that_was_written_before_pictures_could_repeat_is_the_same(cached, pictures, tmp_path, capsys):
    """Its index has no such field. It is read, trained on as before, and a precompute keeps what runs hold on to."""
    run = tmp_path / "run"
    shutil.copytree(cached, run)
    new = Cache(run / "cache")
    change_cache(run, lambda index: index[[name for name in INDEX.names if name != "repeats"]])
    assert "repeats" not in np.load(run / "cache" / "index.npy").dtype.names
    old = Cache(run / "cache")
    assert old.index.tobytes() == new.index.tobytes() and len(old) == old.epoch == len(new)
    assert [some.tolist() for some in old.members] == [some.tolist() for some in new.members]
    precompute(run, pictures)
    assert "to encode: nothing changed; " in capsys.readouterr().out
    assert Cache(run / "cache").manifest["content"] == old.manifest["content"] == new.manifest["content"]
    index, posteriors = new.index, new.posteriors[0].keys["key"]  # and that is the digest of what it always was of
    parts = [new.captions.keys["key"][new.caption_rows], posteriors[index["picture"]], posteriors[index["mirrored"]]]
    parts += [index[name] for name in ("captions", "time_ids", "held_out")]
    assert hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() == new.manifest["content"]


# ---- Rows that are not the index's own


def replaced(name):
    """The cache's rows become another cache's: the same in another order, each with its good checksum."""

    def replace(cache):
        rows, keys = (cache / f"{name}.{kind}" for kind in ("rows", "keys"))
        count = keys.stat().st_size // KEY.itemsize
        for path in (rows, keys):
            path.write_bytes(np.frombuffer(path.read_bytes(), np.uint8).reshape(count, -1)[::-1].tobytes())

    return replace


def cut(name, size):
    return lambda cache: os.truncate(cache / name, (cache / name).stat().st_size - size)


OTHERS, PICTURE_ROWS = "not the rows that the index was made for", "posteriors-64x64"
LOST = {
    "captions replaced": ("captions", OTHERS, replaced("captions")),
    "posteriors replaced": (PICTURE_ROWS, OTHERS, replaced(PICTURE_ROWS)),
    "captions gone": ("captions", "9 rows of the index not there", lambda cache: (cache / "captions.rows").unlink()),
    "keys gone": (PICTURE_ROWS, "16 rows of", lambda cache: (cache / f"{PICTURE_ROWS}.keys").unlink()),
    "a key cut": ("captions", "1 row of the index not there", cut("captions.keys", 1)),
    "a row cut": (PICTURE_ROWS, "2 rows of the index not there", cut(f"{PICTURE_ROWS}.rows", 1)),
}


@pytest.mark.parametrize("case", LOST)
def test_rows_that_were_replaced_or_lost_under_the_index_are_named_when_it_is_opened(case, fresh, run):
    """Each has a good checksum: opened without a word, pictures would be trained with the captions of others."""
    name, message, damage = LOST[case]
    damage(fresh / "cache")
    with pytest.raises(UserError, match=rf"{name}\.rows: {message}.*; run python -m data.precompute again"):
        Cache(fresh / "cache")
    precompute(fresh, run.pictures)
    found, wanted = Cache(fresh / "cache"), Cache(run.folder / "cache")
    none = np.zeros(len(found), bool)
    batches = [cache.batch(range(len(none)), none, none) for cache in (found, wanted)]
    for field in batches[0]:  # encoded in other batches than the first time, which may round differently
        np.testing.assert_allclose(*(batch[field].astype(np.float32) for batch in batches), rtol=5e-3, atol=5e-3)


def test_rows_that_are_added_leave_the_index_as_it_is(fresh, source):
    """Another precompute may append to a cache that is read."""
    folder, none = fresh / "cache", np.zeros(3, bool)
    before = Cache(folder).batch(range(3), none, none)["text"]
    edit_captions(source, lambda rows: [dict(row, text=f"another {i}") for i, row in enumerate(rows)])
    old = {name: (folder / name).read_bytes() for name in ("index.npy", "captions.npy", "names.txt", "manifest.json")}
    precompute(fresh, source)
    assert not np.array_equal(Cache(folder).batch(range(3), none, none)["text"], before)
    for name, blob in old.items():
        (folder / name).write_bytes(blob)
    assert np.array_equal(Cache(folder).batch(range(3), none, none)["text"], before)


def test_what_is_stored_is_told_when_its_keys_are_on_disk(tmp_path, monkeypatch):
    """A bar that runs ahead of the disk promises rows that a kill would lose."""
    monkeypatch.setattr("data.cache.COMMIT_SECONDS", 0)
    told, some = [], ([1, 2], [3], [4, 5])
    rows(tmp_path).write(5, map(batch_of, some), lambda count: told.append((count, len(rows(tmp_path)))))
    assert told == [(2, 2), (1, 3), (2, 5)]


# ---- Caches that are not finished


DAMAGE = {
    "no finished cache here; run python -m data.precompute": lambda path: path.unlink(),
    "damaged": lambda path: path.write_text("{"),
    "manifest.json: damaged": lambda path: path.write_text("[1]"),
    "another version": lambda path: change_cache(path.parent.parent, version=0),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_without_a_good_manifest_there_is_no_cache(message, fresh):
    """It is written last: a folder without it is one that precompute did not finish."""
    path = fresh / "cache" / "manifest.json"
    assert read_manifest(fresh / "cache")["rows"] == len(Cache(fresh / "cache"))
    DAMAGE[message](path)
    with pytest.raises(UserError, match=message):
        Cache(fresh / "cache")


ODD = [
    ("text_shape", None),
    ("posterior_shapes", []),
    ("posterior_shapes", [[2, 4, 8, 8], [2, 4, 8, 8]]),
    ("buckets", [[64, -64]]),
    ("model", {"revision": None}),
    ("components", {"vae": 1}),
    ("unconditional", 2**63),
    ("scaling_factor", float("inf")),
    ("resolution", True),
    ("new", "field"),
]


@pytest.mark.parametrize("field, value", ODD)
def test_a_manifest_that_parses_and_is_odd_is_refused_by_its_field(field, value, fresh):
    """As another program, or an edit with a right checksum, would leave it."""
    path = fresh / "cache" / "manifest.json"
    manifest = json.loads(path.read_text()) | {field: value}
    del manifest["checksum"]
    path.write_text(json.dumps(manifest | {"checksum": _checksum(manifest)}))
    with pytest.raises(UserError, match="manifest.json: .*run python -m data.precompute again") as odd:
        Cache(fresh / "cache")
    assert field in str(odd.value) or "damaged" in str(odd.value)


def test_room_that_a_killed_writer_claimed_is_not_asked_for_again(tmp_path):
    """Or a run that was killed early would not fit on a disk of twice the cache's size."""
    rows = Rows(tmp_path, "rows", SHAPE)
    assert rows.room(100) == 100 * rows.row_bytes

    def killed():
        yield batch_of([1, 2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.write(100, killed())
    again = Rows(tmp_path, "rows", SHAPE)
    assert len(again) == 2 and again.room(98) == 0 and again.room(1000) > 800 * again.row_bytes


@pytest.mark.parametrize("blob", [b"xx", b"", b"PK\x03\x04", None])
def test_a_bad_index_is_named(blob, fresh):
    path = fresh / "cache" / "index.npy"
    path.unlink() if blob is None else path.write_bytes(blob)
    with pytest.raises(
        UserError, match="index.npy: not there or damaged; run python -m data.precompute again, it repairs it"
    ):
        Cache(fresh / "cache")


@pytest.mark.parametrize("name", ["index.npy", "manifest.json"])
def test_no_flipped_bit_is_read_and_precompute_puts_it_right(name, fresh, run):
    """A flipped bit in the index pairs a picture with another's caption, and in the manifest it scales every latent."""
    path = fresh / "cache" / name
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(UserError, match=f"{name}: (not there or )?damaged"):
            Cache(fresh / "cache")
    precompute(fresh, run.pictures)
    assert path.read_bytes() == good


def test_damaged_names_are_put_right_and_stand_in_no_messages_way(fresh, run):
    """A message about a NaN names its rows; that their names are lost must not be said instead of it."""
    path = fresh / "cache" / "names.txt"
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert Cache(fresh / "cache").names([3, 0]) == ["row 3", "row 0"]
    precompute(fresh, run.pictures)
    assert path.read_bytes() == good and Cache(fresh / "cache").names([0]) == [good.decode().split("\n")[0]]


def test_rows_that_become_shorter_while_they_are_read_are_a_line(cached, tmp_path):
    """Another program cuts the file under the map; what is gone of it would kill the process without a word."""
    shutil.copytree(cached / "cache", tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    none = np.zeros(1, bool)
    cache.batch([0], none, none)
    os.truncate(cache.posteriors[0].path, 100)
    with pytest.raises(MachineError, match="posteriors-64x64.rows: became shorter while it was read"):
        cache.batch([0], none, none)
