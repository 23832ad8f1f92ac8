"""The folders that commands work in: created, looked at and locked before anything begins."""

import os

import pytest
from test_safe import finish, python, wait_for

from data.common import door, system
from data.common.errors import UserError

HOLD = "import sys, time; from data.common import door\nwith door.{}: print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_told_the_first_ones_pid_and_the_lock_dies_with_it(tmp_path):
    first = python(HOLD.format("hold(sys.argv[1], '--output_dir')"), tmp_path / "run")
    wait_for(first, "held")
    for _ in range(2):  # being refused must not take the owner's name away
        with pytest.raises(UserError, match=rf"--output_dir .*run: process {first.pid} "):
            with door.hold(tmp_path / "run", "--output_dir"):
                pass
    first.kill()
    finish(first)
    with door.hold(tmp_path / "run", "--output_dir") as run:
        assert run == tmp_path / "run"
    with door.hold(tmp_path / "run", "--output_dir"):
        pass


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_an_output_dir_that_is_a_file_is_refused(path, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--output_dir .*not a folder"):
        with door.hold(tmp_path / path, "--output_dir"):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_dir_that_cannot_be_written_is_refused():
    with pytest.raises(UserError, match="--output_dir /proc/run"):
        with door.hold("/proc/run", "--output_dir"):
            pass


def test_readers_share_a_cache_through_links_and_who_changes_it_is_told_their_pids(tmp_path):
    """The lock is the cache's own: two runs that link to one folder would else write over each other's rows."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    readers = [python(HOLD.format("reading(sys.argv[1])"), tmp_path / name) for name in ("cache", "link")]
    for reader in readers:
        wait_for(reader, "held")
    pids = ", ".join(str(pid) for pid in sorted(reader.pid for reader in readers))
    with pytest.raises(UserError, match=f"processes {pids} are reading this cache"):
        with door.changing(tmp_path / "cache", harmless=lambda: False):
            pass
    with door.changing(tmp_path / "cache", harmless=lambda: True), door.reading(tmp_path / "link"):
        pass
    for reader in readers:
        reader.kill()
        finish(reader)
    with door.changing(tmp_path / "link", harmless=lambda: False):
        pass


def test_nobody_begins_to_read_a_cache_that_is_being_changed(tmp_path):
    (tmp_path / "cache").mkdir()
    writer = python(HOLD.format("changing(sys.argv[1], lambda: False)"), tmp_path / "cache")
    wait_for(writer, "held")
    with pytest.raises(UserError, match=f"process {writer.pid} is changing this cache; wait for it or stop it"):
        with door.reading(tmp_path / "cache"):
            pass
    writer.kill()
    finish(writer)


def test_a_file_system_without_locks_is_said_and_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(next(iter(system.NO_LOCKS)), "no locks")

    monkeypatch.setattr("fcntl.flock", none)
    with door.hold(tmp_path, "--output_dir"):
        pass
    assert (
        f"{tmp_path}: this file system has no locks (no locks); start one command at a time" in capsys.readouterr().out
    )


WRONG = {
    "a dangling link": (lambda path: path.symlink_to("gone"), "a link to gone, which is not there"),
    "a folder": (lambda path: path.mkdir(), "not a file"),
    "a FIFO": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_part_of_the_wrong_kind_is_found_at_the_door(what, tmp_path):
    """After a hundred steps it would be a traceback, and the steps lost."""
    make, words = WRONG[what]
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=f"{tmp_path}/metrics.jsonl: {words}"):
        with door.hold(tmp_path, "--output_dir", ("metrics.jsonl",)):
            pass
    assert os.path.lexists(tmp_path / "metrics.jsonl")
