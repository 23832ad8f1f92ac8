"""Files that are whole or not there; what a disk answers, in one line."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from test_safe import finish, python, wait_for

from data.common import disk, door, errors, safe

# ---- atomic_write


def test_the_file_appears_whole_and_readable(tmp_path):
    path = tmp_path / "new" / "file"
    with disk.atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_its_mode_is_as_the_umask_has_it(mask, mode, tmp_path):
    """One who works with 077 wants nobody to read it, one with 002 wants the group to write it."""
    before = os.umask(mask)
    try:
        with disk.atomic_write(tmp_path / "file", "w") as file:
            file.write("×")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode and (tmp_path / "file").read_bytes() == "×".encode()


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with disk.atomic_write(path) as file:
            file.write(b"half")
            1 / 0
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_kill_in_the_middle_leaves_the_old_file_and_the_next_command_cleans_up(tmp_path):
    """At SDXL's size each would be half a gigabyte, under a name that nobody sees."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / ".file2.other").write_bytes(b"not ours")
    code = (
        "import sys, time; from data.common.disk import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n"
        "    f.write(b'half'); f.flush(); print('half', flush=True); time.sleep(60)"
    )
    process = python(code, path)
    wait_for(process, "half")
    process.kill()
    finish(process)
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 3
    with door.hold(tmp_path, "--output_dir"):
        assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == [".file2.other", ".lock", "file"]


def test_bytes_are_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    """If the file were renamed first, a power cut would leave an empty one under the final name."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    with disk.atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    assert done == ["fsync", "replace", "fsync"]  # the bytes, the name, the folder


def test_a_full_disk_is_named_with_what_is_needed_and_free(tmp_path):
    with pytest.raises(errors.MachineError, match=r"the cache needs 1000000000 MiB in .* MiB are free"):
        disk.need_space(tmp_path, 10**6 * 1000 * 2**20, "the cache")
    disk.need_space(tmp_path, 1, "the cache")


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert disk.sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


# ---- disks of a simple kind


def refuse(number):
    def refusing(*_):
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_disk_that_does_not_sync_folders_is_said_once(number, tmp_path, monkeypatch, capfd):
    """SMB, 9p and some of FUSE; and nothing else that goes wrong there is passed over."""
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (refuse(number) if Path(f"/proc/self/fd/{d}").is_dir() else real)(d))

    def main(_):
        for _ in range(3):
            with disk.atomic_write(tmp_path / "file") as file:
                file.write(b"whole")

    safe.run(main, [])
    line = f"warning: {tmp_path}: its disk does not sync folders; a power cut may undo the last save\n"
    assert capfd.readouterr().out == line and (tmp_path / "file").read_bytes() == b"whole"
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_set_room_aside_is_said_and_looked_at(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    with open(tmp_path / "file", "w+b") as file:
        with pytest.warns(match=f"{tmp_path}: its disk cannot set room aside"):
            disk.claim(file, 2**20)
        with pytest.warns(), pytest.raises(errors.MachineError, match=f"{tmp_path / 'file'} needs .* MiB are free"):
            disk.claim(file, 2**60)


def test_room_that_is_not_there_is_refused_with_the_file_and_what_it_needs(tmp_path, monkeypatch):
    with open(tmp_path / "file", "w+b") as file:
        disk.claim(file, 2**20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 2**20
        monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
        with pytest.raises(
            errors.MachineError, match=f"{tmp_path / 'file'}: No space left on device; 1 MiB are needed"
        ):
            disk.claim(file, 2**20)


# ---- an OSError in one line


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EISDIR", "ENOTDIR", "ENOENT", "ELOOP", "ENAMETOOLONG", "EEXIST"])
def test_what_a_user_can_see_to_is_bad_input(name):
    number = getattr(errno, name)
    found = disk.in_words(OSError(number, os.strerror(number), "/x/y"))
    assert type(found) is errors.UserError and str(found).startswith(f"/x/y: {os.strerror(number)}; ")


MACHINE = ["EIO", "EROFS", "ESTALE", "ENOTCONN", "ETIMEDOUT", "ENODEV", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO"]


@pytest.mark.parametrize("name", [*MACHINE, "EMFILE", "ENOMEM", "EUCLEAN"])
@pytest.mark.parametrize("path", ["/x/y", None])
def test_what_the_disk_or_the_machine_does_is_its_fault(name, path):
    number = getattr(errno, name)
    found = disk.in_words(OSError(number, os.strerror(number), path))
    assert type(found) is errors.MachineError and os.strerror(number) in str(found)
    assert str(found).startswith(path or "the machine") and str(found).endswith("run the same command")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_is_said_with_what_is_free(name, tmp_path):
    number = getattr(errno, name)
    found = disk.in_words(OSError(number, os.strerror(number), str(tmp_path / "file")))
    assert type(found) is errors.MachineError
    assert str(found).startswith(f"the disk refused to write {tmp_path}/file: {os.strerror(number)}, ")
    assert "MiB are free there; free some" in str(found)


def test_a_name_that_is_not_utf_8_can_be_said():
    found = disk.in_words(PermissionError(errno.EACCES, "Permission denied", os.fsdecode(b"/x/\xff")))
    assert str(found).startswith("/x/?: Permission denied")
