"""macOS, Windows and containers, simulated: Linux without what they lack. No test here has run on one of them."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
from conftest import PRECOMPUTE, PROMPTS, ROOT, TRAIN, untitled

from data.cache import Cache
from data.common import disk, system
from data.common.errors import MachineError, UserError
from data.models.files import Model

# What a system takes away, in a process that then runs one of the commands. On Windows a file that somebody has open
# is not renamed, replaced or removed, byte ranges of a file are locked by one owner each, and no folder can be opened.
COMMON = """
import os, pathlib, runpy, signal, sys
del os.posix_fallocate, os.fdatasync
import data.common.system
data.common.system.ROOT = pathlib.Path("/nowhere")
"""
MACOS = COMMON + "data.common.system.sys = type(sys)('sys'); data.common.system.sys.platform = 'darwin'\n"
WINDOWS = (
    """
import enum, fcntl, mmap, os, psutil, resource, signal, sys
from types import ModuleType, SimpleNamespace

def locking(descriptor, mode, count, lockf=fcntl.lockf, alone=fcntl.LOCK_EX | fcntl.LOCK_NB):
    try:
        lockf(descriptor, alone, count, os.lseek(descriptor, 0, os.SEEK_CUR))
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None

def opened(path):
    path = os.path.realpath(path)
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    there = [os.readlink(link) for link in links if os.path.lexists(link)]
    there += [line.split(maxsplit=5)[-1] for line in open("/proc/self/maps").read().splitlines()]
    return any(name == path or name.startswith(path + "/") for name in there)

def guarded(name):
    real = getattr(os, name)

    def call(*paths, **more):
        if any(opened(path) for path in paths):
            raise PermissionError(13, "Access is denied", str(paths[0]))
        return real(*paths, **more)

    setattr(os, name, call)

def no_folders(path, flags, *more, real=os.open, **named):
    if os.path.isdir(path) and not flags & os.O_DIRECTORY:  # with it shutil and tempfile ask, which know Windows
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, flags, *more, **named)

for name in ("replace", "rename", "unlink", "remove"):
    guarded(name)
os.open = no_folders
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.modules["msvcrt"] = ModuleType("msvcrt")
sys.modules["msvcrt"].locking, sys.modules["msvcrt"].LK_NBLCK = locking, 2
psutil.Process = lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=2**30))
del mmap.MADV_DONTNEED, os.pwrite, os.major, os.sched_getaffinity
del signal.SIGHUP
signal.Signals = enum.IntEnum("Signals", {signum.name: signum for signum in signal.Signals if signum.name != "SIGHUP"})
"""
    + COMMON
)
RUN = "sys.argv = sys.argv[1:]\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
# Several commands, each in a process of its own, which has what all of them import: words of each as JSON.
RUN_ALL = """
import json, os, runpy, sys
from data.common.imports import lean
with lean():
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
for words in json.loads(sys.argv[1]):
    pid = os.fork()
    if not pid:
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(f"ended with {code}", flush=True)
    if code:
        sys.exit(code)
"""


def run_all(python, commands, **popen):
    """What each of the commands prints. python: the words of an interpreter, with -c and what comes before."""
    commands = json.dumps([[str(word) for word in words] for words in commands])
    words = [*python[:-1], python[-1] + RUN_ALL, commands]
    ended = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)
    if ended.returncode == 99:
        pytest.skip("not allowed to mount here")
    assert ended.returncode == 0 and "Traceback" not in ended.stdout, ended.stdout
    return ended.stdout.split("ended with 0\n")[:-1]


def simulated(prelude, *argv, code=0, **popen):
    """What python -m argv prints in a process of its own that began with `prelude`."""
    words = [sys.executable, "-c", prelude + RUN, *map(str, argv)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **popen)
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("prelude", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_the_commands_give_the_same_bytes(prelude, run, pictures, tmp_path):
    """Precompute, a part of the training, its continuation, and the pictures."""
    commands = [
        ("data.precompute", "--output_dir", tmp_path, "--train_data_dir", pictures, *PRECOMPUTE),
        ("train", "--output_dir", tmp_path, *TRAIN, "--max_train_steps", 4),
        ("train", "--output_dir", tmp_path, *TRAIN),
        ("infer", "--output_dir", tmp_path, "--prompt", *PROMPTS, "--num_inference_steps", 2),
    ]
    said, *others = run_all([sys.executable, "-c", prelude], commands)
    assert said.count("cannot set room aside") == (prelude == MACOS) and len(others) == 3
    for path in run.folder.rglob("*"):
        name = path.relative_to(run.folder)
        if path.suffix in (".rows", ".keys", ".npy", ".txt", ".png"):
            assert path.read_bytes() == (tmp_path / name).read_bytes(), name
        if path.suffix == ".safetensors":
            assert untitled(path) == untitled(tmp_path / name), name


@pytest.mark.parametrize("prelude", [MACOS, WINDOWS], ids=["macos", "windows"])
@pytest.mark.parametrize("name", ["data.precompute", "train", "infer"])
def test_a_mistyped_flag_is_answered_before_torch_is_imported(prelude, name):
    last = "import atexit\natexit.register(lambda: print('torch' in sys.modules))\n"
    said = simulated(prelude + last, name, "--outputdir", "x", code=2)
    assert said.startswith("False\nerror: ")


# ---- One at a time


def test_who_reads_a_cache_holds_no_file_that_a_precompute_replaces(cached):
    """Windows would refuse to replace it. Rows are only added to, which it allows."""
    cache = Cache(cached / "cache")
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    held = "".join(os.readlink(link) + "\n" for link in links if os.path.lexists(link))
    held += pathlib.Path("/proc/self/maps").read_text()
    names = {path.name for path in (cached / "cache").iterdir() if str(path) in held}
    assert len(cache) and names == {path.name for path in (cached / "cache").glob("*.rows")}


@pytest.fixture
def windows(monkeypatch):
    """Locks as Windows has them: of a range of bytes, by one owner. -> [(owner, first byte, past the last)]"""
    held = []

    def locking(descriptor, mode, count):
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        if any(first < start + count and start < end for _, first, end in held):
            raise PermissionError(errno.EACCES, "Permission denied")
        held.append((descriptor, start, start + count))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(system, "WINDOWS", True)
    return held


def test_locks_of_windows_are_shared_by_readers_and_refused_to_writers(windows, tmp_path):
    with open(tmp_path / "a", "ab") as a, open(tmp_path / "a", "ab") as b, open(tmp_path / "a", "ab") as c:
        assert system.lock(a, shared=True) and system.lock(b, shared=True)
        assert not system.lock(c)
        del windows[0]
        assert not system.lock(c)  # one of two readers is there
        del windows[0]
        assert system.lock(c) and not system.lock(a, shared=True) and not system.lock(a)


def test_windows_file_that_somebody_has_open_is_waited_for(monkeypatch, tmp_path):
    """A virus scanner lets go in a moment; who does not is an error, and everywhere else it is one at once."""
    (tmp_path / "a").write_text("new")
    refused, real = [], os.replace

    def replace(*paths, times=2):
        if len(refused) < times:
            refused.append(paths)
            raise PermissionError(errno.EACCES, "Access is denied")
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        system.replace(tmp_path / "a", tmp_path / "b")
    refused.clear()
    monkeypatch.setattr(system, "WINDOWS", True)
    system.replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new" and len(refused) == 2
    monkeypatch.setattr(system, "PATIENCE", 0)
    refused.clear()
    with pytest.raises(PermissionError):
        system.replace(tmp_path / "b", tmp_path / "a")


def test_room_is_taken_by_a_files_length_on_windows_and_only_looked_at_on_a_mac(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate")
    with open(tmp_path / "file", "w+b") as file:
        with pytest.warns(match="cannot set room aside"):
            disk.claim(file, 2**20)
        assert os.fstat(file.fileno()).st_size == 0
        with pytest.warns(), pytest.raises(MachineError, match="MiB are free"):
            disk.claim(file, 2**60)
        monkeypatch.setattr(system, "WINDOWS", True)
        disk.claim(file, 2**20)
        disk.claim(file, 2**10)  # what is there stays
        assert os.fstat(file.fileno()).st_size == 2**20
    assert system.taken(SimpleNamespace(st_size=3000)) == 3000  # Windows does not tell blocks
    assert system.taken(SimpleNamespace(st_size=2**40, st_blocks=8)) == 4096


def test_a_console_of_windows_is_written_in_its_code_page(monkeypatch):
    stream = SimpleNamespace(encoding="utf-8")
    monkeypatch.setattr(os, "device_encoding", {1: "cp850", 2: None}.get)  # a console, and a pipe
    assert system.encoding(stream, 1) == "utf-8"
    monkeypatch.setattr(system, "WINDOWS", True)
    assert (system.encoding(stream, 1), system.encoding(stream, 2)) == ("cp850", "utf-8")


@pytest.mark.parametrize("name, unit", [("linux", 1024), ("darwin", 1)])
def test_the_most_memory_is_in_bytes_everywhere(name, unit, monkeypatch):
    monkeypatch.setattr(system, "sys", SimpleNamespace(platform=name))
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3000))
    assert system.peak_memory() == 3000 * unit


# ---- Containers

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 100 kB\nMemAvailable: 8388608 kB\n"  # 8 GiB can be had
STAT = "anon 5\n{0}inactive_file 1000\n{0}active_file 200\n"
V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def container(root, table, groups, names, prefix=""):
    """The files that tell of limits, under `root`. groups: {folder: (limit, used)}"""
    for path, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": table}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for folder, values in groups.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, values):
            (root / folder / name).write_text(f"{value}\n")
        (root / folder / "memory.stat").write_text(STAT.format(prefix))


CONTAINERS = {
    "none": ("0::/user.slice\n", {"sys/fs/cgroup/user.slice": ("max", 10**9)}, V2, 2**33),
    "docker": ("0::/\n", {"sys/fs/cgroup": (2**30, 2**29)}, V2, 2**29 + 1200),
    "full": ("0::/\n", {"sys/fs/cgroup": (2**30, 2**31)}, V2, 0),
    "roomier than the machine": ("0::/\n", {"sys/fs/cgroup": (2**40, 2**20)}, V2, 2**33),
    "a group above": (
        "0::/pod/job\n",
        {"sys/fs/cgroup/pod": (2**30, 2**29), "sys/fs/cgroup/pod/job": (2**31, 0)},
        V2,
        2**29 + 1200,
    ),
    "the host's path": ("0::/docker/4711\n", {"sys/fs/cgroup": (2**30, 2**29)}, V2, 2**29 + 1200),
    "version 1": (
        "9:memory:/docker/4711\n3:cpu,cpuacct:/x\n0::/\n",
        {"sys/fs/cgroup/memory": (2**30, 2**29)},
        V1,
        2**29 + 1200,
    ),
    "version 1 without": ("9:memory:/\n", {"sys/fs/cgroup/memory": (9223372036854771712, 2**29)}, V1, 2**33),
}


@pytest.mark.parametrize("what", CONTAINERS)
def test_a_containers_limit_counts_and_not_the_hosts_memory(what, monkeypatch, tmp_path):
    """Pages that are only kept of files count as free; the kernel ends who takes more than the limit, unsaid."""
    table, groups, names, free = CONTAINERS[what]
    container(tmp_path, table, groups, names, "total_" if names == V1 else "")
    monkeypatch.setattr(system, "ROOT", tmp_path)
    assert system.free_memory() == free
    with pytest.raises(MachineError, match=r"the model needs .* GiB of RAM, .* are free; .* the container more"):
        system.need_memory(free + 1, "the model")


def test_a_machine_that_tells_nothing_is_asked_through_psutil(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "ROOT", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=12345))
    assert system.free_memory() == 12345 and system.others_running() == 0 and system.holders(__file__) == []


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a name and a home, as `docker run --user 12345` has it. -> the folder that is there instead"""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path / f"huggingface-{os.getuid()}"


def environment(*names):
    return [os.environ.get(name) for name in names]


def test_without_a_home_downloads_go_to_a_temporary_folder_of_the_user_alone(nobody, capsys):
    system.find_a_place_for_downloads()
    assert environment("HF_HOME", "HF_DATASETS_CACHE") == [str(nobody), str(nobody / "datasets")]
    assert nobody.stat().st_mode & 0o777 == 0o700
    said = f"cannot be written; what is downloaded goes to {nobody}; HF_HOME names another folder\n"
    assert capsys.readouterr().out == f"~/.cache/huggingface: {said}"
    system.find_a_place_for_downloads()  # in a later command, and with the place found by itself: nothing is said
    assert capsys.readouterr().out == ""


def test_a_home_that_can_be_written_is_left_alone(nobody, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "not" / "yet"))
    system.find_a_place_for_downloads()
    assert environment("HF_HOME", "HF_DATASETS_CACHE") == [None, None] and capsys.readouterr().out == ""


def test_a_hub_cache_that_is_read_only_is_read(nobody, tmp_path, monkeypatch, capsys):
    """What somebody mounted for all containers is not downloaded again; datasets unpack beside what they read."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "shared"))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    system.find_a_place_for_downloads()
    assert environment("HF_HOME", "HF_DATASETS_CACHE") == [str(tmp_path / "shared"), str(nobody / "datasets")]
    assert f"models that are in it are used, datasets are unpacked in {nobody};" in capsys.readouterr().out


def test_a_temporary_folder_of_somebody_else_is_not_trusted(nobody, monkeypatch):
    nobody.mkdir()
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    nobody.rename(nobody.with_name(f"huggingface-{os.getuid()}"))
    system.find_a_place_for_downloads()
    assert environment("HF_HOME", "HF_DATASETS_CACHE") == [None, None]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_download_into_a_read_only_cache_says_what_to_name(number, monkeypatch):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number), "/shared/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(UserError, match=r"someone/model: .* downloaded to /shared/hub \(.*\); .* with HF_HOME"):
        Model("someone/model").check()


# A container: /dev/shm of a page, a home that cannot be written, no locks, an unknown user.
BOX = """
mount --make-rprivate / && mount -t tmpfs -o size=4k none /dev/shm || exit 99
mount -t tmpfs -o ro none "$TMPDIR/home" || exit 99
exec "$@"
"""
NO_LOCKS = """
import errno, fcntl, os, runpy, sys
def none(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = fcntl.lockf = none
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make such a place")
@pytest.mark.parametrize("user", [0, 12345])
def test_the_commands_run_in_a_container(user, run, pictures):
    """As root with a read-only home, and as a user whom no file names, without HOME."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777), os.mkdir(f"{place}/home")
        shutil.copytree(pictures, f"{place}/pictures")
        env = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": place}
        env |= {"HOME": f"{place}/home"} if user == 0 else {}
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        box = ["unshare", "-m", "sh", "-c", BOX, "sh", *become, sys.executable, "-c", NO_LOCKS]
        commands = [
            ("data.precompute", "--output_dir", f"{place}/run", "--train_data_dir", f"{place}/pictures", *PRECOMPUTE),
            ("train", "--output_dir", f"{place}/run", *TRAIN),
            ("infer", "--output_dir", f"{place}/run", "--prompt", *PROMPTS, "--num_inference_steps", 2),
        ]
        outputs = run_all(box, commands, env=env)
        assert len(outputs) == 3
        for said in outputs:
            assert said.count("has no locks (No locks available)") >= 1
            assert said.count(f"what is downloaded goes to {place}/huggingface-{user}") == 1
        assert untitled(pathlib.Path(place, "run", "lora.safetensors")) == untitled(run.folder / "lora.safetensors")
