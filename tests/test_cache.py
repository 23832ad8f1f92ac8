"""The cache on disk: rows found by what they are made of, committed one by one, checked when read."""

import errno
import os
import shutil

import numpy as np
import pytest

from data.cache import KEY, Cache, Rows, read_manifest
from data.safe import MachineError, UserError

SHAPE = (3, 5)


def row_key(i):
    return bytes([i]) * 32


def values(*numbers):
    return np.stack([np.full(SHAPE, n) + np.arange(15).reshape(SHAPE) / 16 for n in numbers]).astype(np.float16)


def rows(folder):
    return Rows(folder, "things", SHAPE)


def fill(folder, *numbers, batch=2):
    made = rows(folder)
    made.append([row_key(n) for n in numbers], [values(*numbers[i : i + batch]) for i in range(0, len(numbers), batch)])
    return made


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_rows_come_back_by_key_and_from_a_new_reader(tmp_path):
    made = fill(tmp_path, 4, 9, 1)
    made.append([row_key(7)], [values(7)])
    for reader in (made, rows(tmp_path)):
        for position, n in enumerate((4, 9, 1, 7)):
            assert row_key(n) in reader and reader.position(row_key(n)) == position
            assert np.array_equal(reader[position], values(n)[0]) and reader[position].dtype == np.float16
        assert row_key(5) not in reader and reader.position(row_key(5)) is None


def test_nothing_to_append_writes_nothing(tmp_path):
    rows(tmp_path).append([], [])
    assert not files(tmp_path)


def test_a_key_with_zero_bytes_at_its_end_is_found(tmp_path):
    """numpy's bytes type drops them; one sha256 in 256 ends in one."""
    key = b"\1" * 30 + b"\0\0"
    made = rows(tmp_path)
    made.append([key], [values(1)])
    assert key in made and key in rows(tmp_path)


@pytest.mark.parametrize("cut_rows", [0, 7, 30, 31, 90])
@pytest.mark.parametrize("cut_keys", [0, 1, 35, 36, 37, 72])
def test_a_killed_writer_is_continued_to_the_same_bytes(cut_rows, cut_keys, tmp_path):
    """Whatever was left behind the last key, in the middle of a row or of a key, is made again and nothing else is."""
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
    todo = [n for n in (1, 2, 3, 4, 5) if row_key(n) not in again]
    assert len(todo) == 5 - committed
    again.append([row_key(n) for n in todo], [values(n) for n in todo])
    assert files(killed) == files(tmp_path / "whole")


def test_rows_are_committed_batch_by_batch(tmp_path):
    """An encoder that dies at row 900 of 1,000 must not cost 900."""

    def dies():
        yield values(1, 2)
        yield values(3, 4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rows(tmp_path).append([row_key(n) for n in range(1, 7)], dies())
    again = rows(tmp_path)
    assert [row_key(n) in again for n in range(1, 7)] == [True] * 4 + [False] * 2
    assert np.array_equal(again[3], values(4)[0])


def test_bytes_are_on_disk_before_their_keys(tmp_path, monkeypatch):
    """The other way round, a power cut leaves keys for rows that are not there."""
    done, real = [], os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real(fd)))
    fill(tmp_path, 1, 2, 3)
    assert done == ["things.rows", "things.keys"] * 2


def test_a_full_disk_is_found_before_the_first_row(tmp_path, monkeypatch):
    """A write through a map on a full disk kills the process by SIGBUS."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match=r"things.rows: No space left on device; \d+ MiB are needed"):
        rows(tmp_path).append([row_key(1)], (pytest.fail("encoded") for _ in range(1)))


def test_a_flipped_byte_is_found_when_read(tmp_path):
    """In every byte of a row, and only there: the rows beside it stay good."""
    fill(tmp_path, 1, 2, 3)
    path = tmp_path / "things.rows"
    whole = path.read_bytes()
    for at in range(30, 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        damaged = rows(tmp_path)
        with pytest.raises(UserError, match=r"things.rows: row 1 is damaged; delete"):
            damaged[1]
        assert damaged[0] is not None and damaged[2] is not None


def test_rows_that_are_gone_are_named(tmp_path):
    fill(tmp_path, 1, 2, 3)
    os.truncate(tmp_path / "things.rows", 89)
    with pytest.raises(UserError, match="things.rows: shorter than its 3 rows"):
        rows(tmp_path)
    (tmp_path / "things.rows").unlink()
    with pytest.raises(UserError, match="things.rows: shorter"):
        rows(tmp_path)


# ---- a finished cache


def test_a_batch_is_what_the_rows_say(run):
    """Each example with its own caption, picture and sizes, in the order asked for."""
    cache = Cache(run.folder / "cache")
    examples = [5, 0, 5]
    batch = cache.batch(examples, np.zeros(3, bool), np.zeros(3, bool))
    assert set(batch) == {"mean", "std", "text", "pooled", "time_ids"}
    for i, example in enumerate(examples):
        record = cache.index[example]
        moments, caption = cache.moments[record["picture"]], cache.captions[record["caption"]]
        assert np.array_equal(batch["mean"][i], moments[0]) and np.array_equal(batch["std"][i], moments[1])
        assert np.array_equal(np.concatenate([batch["text"][i].ravel(), batch["pooled"][i]]), caption)
        assert batch["time_ids"][i].tolist() == record["time_ids"].tolist()
    assert (batch["std"] > 0).all()
    assert not np.array_equal(batch["mean"][0], batch["mean"][1]) and not np.array_equal(batch["text"][0], batch["text"][1])
    batch["mean"][:] = 0  # a copy: the map cannot be written, and must not be
    assert cache.batch([5], np.zeros(1, bool), np.zeros(1, bool))["mean"].any()


def test_an_empty_caption_is_the_unconditional_row_of_that_example_alone(run):
    """SDXL's is zeros; the other examples keep theirs."""
    cache = Cache(run.folder / "cache")
    plain = cache.batch([1, 2], np.zeros(2, bool), np.zeros(2, bool))
    dropped = cache.batch([1, 2], np.zeros(2, bool), np.array([False, True]))
    assert plain["text"][1].any() and plain["pooled"][1].any()
    assert not dropped["text"][1].any() and not dropped["pooled"][1].any()
    assert np.array_equal(dropped["text"][0], plain["text"][0]) and np.array_equal(dropped["mean"], plain["mean"])


def test_names_are_the_examples(run):
    assert Cache(run.folder / "cache").names([3, 0]) == ["row 3 (003.png)", "row 0 (000.png)"]


DAMAGE = {
    "no finished cache here; run python -m data.precompute": lambda path: path.unlink(),
    "damaged": lambda path: path.write_text("{"),
    "another version": lambda path: path.write_text('{"version": 0}'),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_without_a_good_manifest_there_is_no_cache(message, fresh):
    """It is written last: a folder without it is one that precompute did not finish."""
    path = fresh / "cache" / "manifest.json"
    assert read_manifest(fresh / "cache")["rows"] == len(Cache(fresh / "cache"))
    DAMAGE[message](path)
    with pytest.raises(UserError, match=message):
        Cache(fresh / "cache")
