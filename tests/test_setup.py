"""`make setup` on other machines: Python without ensurepip or too old, a torch that is there, a bare one.

A machine is a folder with a Python of its own (a copy of this program, links to its standard library) and what lies in
its site-packages. PyPI is a folder of empty wheels, so that nothing is downloaded.
"""

import ast
import base64
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from data.common import setup
from data.common.errors import UserError

OLD = {"diffusers": "0.39.0", "transformers": "5.15.0", "datasets": "4.0.0", "numpy": "2.1.3"}  # Colab, 2026-08
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
VERSION = f"python3.{sys.version_info[1]}"
STDLIB = Path(sysconfig.get_path("stdlib"))
INSTALLED = f"lib/{VERSION}/site-packages"


# ---- Stand-ins


def content(name, version, needs=(), code=""):
    """{path: text} of a package that does nothing but say its version."""
    info = f"{name}-{version}.dist-info"
    about = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {line}" for line in needs)]
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n{code}",
        f"{info}/METADATA": "\n".join(about) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digest = lambda text: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    record = [f"{path},sha256={digest(text)},{len(text.encode())}" for path, text in files.items()]
    return {**files, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,"]) + "\n"}


def wheel(folder, name, version, *more):
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in content(name, version, *more).items():
            file.writestr(path, text)


def cuda_torch(cuda):
    return f"import types\nversion = types.SimpleNamespace(cuda={cuda!r})\n"


class Machine:
    """A Python and a fresh clone: `packages` lie in its site-packages, its standard library is `without` some."""

    def __init__(self, folder, index, packages=(), without=()):
        self.root, self.clone, self.index = folder / "system", folder / "clone", index
        self.site = self.root / INSTALLED
        self.site.mkdir(parents=True)
        for path in STDLIB.iterdir():
            if path.name not in {*without, "site-packages", "dist-packages"}:
                (self.site.parent / path.name).symlink_to(path)
        self.bin = self.root / "bin"
        self.bin.mkdir()
        shutil.copy(os.path.realpath(sys.executable), self.bin / VERSION)
        (self.bin / "python3").symlink_to(VERSION)
        for package in packages:
            for path, text in content(*package).items():
                (self.site / path).parent.mkdir(exist_ok=True)
                (self.site / path).write_text(text)
        (self.clone / "data" / "common").mkdir(parents=True)
        for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
            shutil.copy(ROOT / name, self.clone)
        for name in ("data/__init__.py", "data/common/__init__.py", "data/common/errors.py", "data/common/setup.py"):
            shutil.copy(ROOT / name, self.clone / name)

    def program(self, name, script):
        """Put a program on this machine's PATH."""
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def environment(self):
        ours = ("PIP_", "PYTHON", "MAKE", "MFLAGS")  # the last two where `make test` runs this
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        pip = dict(PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(self.index))
        return {**kept, **pip, "PATH": f"{self.bin}:/usr/bin:/bin"}

    def make(self, *words, code=0):
        """-> what `make` prints; its last line where it fails."""
        words = ["make", *(words or ["setup"])]
        ended = subprocess.run(words, cwd=self.clone, env=self.environment(), capture_output=True, text=True)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout if not code else ended.stdout + ended.stderr

    def installed(self, *names):
        """[version] of packages as a command in .venv imports them."""
        code = f"import {', '.join(names)}; print({', '.join(f'{name}.__version__' for name in names)})"
        python = self.clone / ".venv" / "bin" / "python"
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """A PyPI with what requirements.txt names at constraints.txt's versions, and older ones."""
    folder = tmp_path_factory.mktemp("index")
    for name in setup.needs():
        wheel(folder, name, PINS[name])
    for name, version in OLD.items():
        wheel(folder, name, version)
    wheel(folder, "nvidia_nccl", "1.0")
    return folder


NEEDS = ["numpy", "nvidia_nccl==1.0", "cuda_toolkit[cufft]==12.8", "opt_einsum; extra == 'opt-einsum'"]
TORCH = ("torch", "2.11.0+cu128", NEEDS, cuda_torch("12.8"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)  # where `make` runs it


# ---- Whole machines


def give_virtualenv(machine):
    """What unpacks the wheel of pip that this Python brings."""
    places = [STDLIB / "ensurepip" / "_bundled", Path("/usr/share/python-wheels")]
    pip = next((path for place in places for path in place.glob("pip-*.whl")), None)
    if pip is None:
        pytest.skip("this Python brings no wheel of pip")
    info = f"{pip.name.split('-py')[0]}.dist-info"
    machine.program(
        "virtualenv",
        f'#!/bin/sh\nset -e; "$2" -m venv --without-pip "$3"\n"$2" -m zipfile -e {pip} "$3/{INSTALLED}"\n'
        f'echo pip > "$3/{INSTALLED}/{info}/INSTALLER"\n',
    )


@pytest.mark.slow
def test_colab_whose_torch_is_used_and_nothing_else_of_it(tmp_path, index):
    """What is older there does not win, and what was not tried stays out of sight. It has no ensurepip."""
    old = list(OLD.items())
    others = [("nvidia_nccl", "1.0"), ("nvidia_cufft", "1.0"), ("tensorflow", "2.20"), ("opt_einsum", "1.0")]
    runtime = ("cuda_toolkit", "12.8", ["nvidia_cufft; extra == 'cufft'", "tensorflow; extra == 'all'"])
    machine = Machine(tmp_path, index, [TORCH, runtime, *others, *old], without={"ensurepip"})
    give_virtualenv(machine)
    output = machine.make()
    assert "setup: .venv is made by virtualenv" in output
    assert f"setup: torch 2.11.0+cu128 of {machine.site} is used as it is\n" in output
    assert re.search(
        r"setup: requirements.txt: \d packages installed in \d+ s, 0 MB downloaded; .venv has \d+ MB", output
    )
    assert len(output.splitlines()) == 3
    assert machine.installed("torch", *OLD) == ["2.11.0+cu128", *(PINS[name] for name in OLD)]
    assert machine.installed("nvidia_nccl", "nvidia_cufft") == ["1.0", "1.0"]  # gigabytes, which pip would bring again
    for name in ("tensorflow", "opt_einsum"):  # only an extra that nobody asked for needs them
        with pytest.raises(subprocess.CalledProcessError):
            machine.installed(name)
    shutil.rmtree(machine.clone / ".venv")
    assert (machine.site / "torch" / "__init__.py").exists()


def test_nothing_that_can_make_an_environment_is_one_line(tmp_path, index):
    output = Machine(tmp_path, index, without={"ensurepip"}).make(code=2)
    ours = [line for line in output.splitlines() if not line.startswith("make: ")]
    assert len(ours) == 1 and "can make no .venv" in ours[0] and "apt install python3-venv" in ours[0]


UNFIT = {
    "another version": (("torch", "2.9.1+cu128", [], cuda_torch("12.8")), "tested is >=2.11,<2.14"),
    "a pre-release": (("torch", "2.12.0a0+git", [], cuda_torch("12.8")), "tested is >=2.11,<2.14"),
    "broken": (("torch", "2.11.0+cu128", [], "raise ImportError"), "it does not start"),
    "for the CPU, next to a GPU": (("torch", "2.11.0+cpu", [], cuda_torch(None)), "it cannot use the GPU"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNFIT)
def test_a_torch_that_does_not_fit_is_said_and_another_one_comes(kind, tmp_path, index):
    package, why = UNFIT[kind]
    machine = Machine(tmp_path, index, [package], without={"ensurepip"})
    give_virtualenv(machine)  # which is quicker
    machine.program("nvidia-smi", "#!/bin/sh\n")
    output = machine.make()
    assert f"torch {package[1]} is there, but {why}: another one is installed" in output
    assert machine.installed("torch") == [PINS["torch"]]


@pytest.mark.slow
def test_a_torch_that_starts_there_and_not_in_venv_is_replaced(tmp_path, index):
    code = cuda_torch("12.8") + "import secret_of_that_place\n"
    packages = [("torch", "2.11.0+cu128", [], code), ("secret_of_that_place", "1")]
    machine = Machine(tmp_path, index, packages, without={"ensurepip"})
    give_virtualenv(machine)  # which is quicker
    assert "torch 2.11.0+cu128 does not start in .venv; another one is installed" in machine.make()
    assert machine.installed("torch") == [PINS["torch"]]


@pytest.mark.slow
def test_a_bare_machine_whose_setup_fails_goes_on_and_follows_what_changes(tmp_path, index):
    """One life of a .venv: no half one counts as done, and what is there is not built again."""
    shelf = tmp_path / "shelf"
    shutil.copytree(index, shelf)
    gone = shelf / f"datasets-{PINS['datasets']}-py3-none-any.whl"
    gone.rename(tmp_path / gone.name)
    machine = Machine(tmp_path, shelf)
    output = machine.make(code=2)
    reason = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(reason) == 1 and f"datasets=={PINS['datasets']}" in reason[0] and ".venv/setup.log" in reason[0]
    assert not (machine.clone / ".venv" / "installed").exists()
    assert "datasets" in (machine.clone / ".venv" / "setup.log").read_text()

    (tmp_path / gone.name).rename(gone)
    output = machine.make()
    assert ".venv is made by" not in output and machine.installed("torch", "datasets") == [
        PINS["torch"],
        PINS["datasets"],
    ]
    assert machine.make() == ""

    # pip was killed while it unpacked numpy: pip itself would take that for installed
    site = machine.clone / ".venv" / INSTALLED
    (site / f"numpy-{PINS['numpy']}.dist-info" / "INSTALLER").unlink()
    (site / "numpy" / "__init__.py").unlink()
    (machine.clone / ".venv" / "installed").unlink()
    assert "1 packages installed" in machine.make()
    assert machine.installed("numpy") == [PINS["numpy"]]

    pins = machine.clone / "constraints.txt"
    pins.write_text(pins.read_text().replace(f"numpy=={PINS['numpy']}", f"numpy=={OLD['numpy']}"))
    needs = machine.clone / "requirements.txt"
    needs.write_text(needs.read_text().replace("numpy>=2.4", "numpy>=2.1"))
    assert "1 packages installed" in machine.make()
    assert machine.installed("numpy") == [OLD["numpy"]]


@pytest.mark.slow
def test_a_signal_to_make_ends_pip_and_the_next_make_goes_on(tmp_path, index):
    machine = Machine(tmp_path, index)
    silent = socket.create_server(("127.0.0.1", 0))  # an index that takes the connection and never answers
    asked = dict(machine.environment(), PIP_NO_INDEX="0", PIP_INDEX_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
    process = subprocess.Popen(["make", "setup"], cwd=machine.clone, env=asked, start_new_session=True)
    deadline = time.time() + 60

    def pips():
        """Commands that run in .venv in this clone."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ends while it is looked at
                if (
                    place.joinpath("cwd").readlink() == machine.clone
                    and b"pip\0install" in (place / "cmdline").read_bytes()
                ):
                    found.append(place.name)
        return found

    while not pips():
        assert time.time() < deadline
        time.sleep(0.1)
    time.sleep(1)
    assert pips()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    time.sleep(1)
    assert not pips() and not (machine.clone / ".venv" / "installed").exists()
    machine.make()
    assert machine.installed("torch") == [PINS["torch"]]


# ---- Pythons


@pytest.mark.parametrize("name", ["setup.py", "errors.py", "__init__.py"])
def test_a_python_that_is_too_old_can_read_what_says_so(name):
    ast.parse((ROOT / "data" / "common" / name).read_text(), feature_version=(3, 6))


def test_a_real_python_3_10_gets_one_line(tmp_path):
    """Ubuntu 22.04's."""
    old = [*Path("/root/.pyenv/versions").glob("3.10*/bin/python3"), shutil.which("python3.10")]
    works = [path for path in old if path and setup.answer(str(path), "import sys; print(sys.version_info[1])") == "10"]
    if not works:
        pytest.skip("no Python 3.10 here")
    words = [works[0], "-m", "data.common.setup", "requirements.txt"]
    ended = subprocess.run(words, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout and len(ended.stderr.splitlines()) == 1
    assert "python3 is 3.10, too old" in ended.stderr and "apt install python3.11" in ended.stderr


def python_that_says(path, version):
    path.write_text(f"#!/bin/sh\n{version}\n")
    path.chmod(0o755)


def test_which_python_it_is(tmp_path, monkeypatch, capsys):
    """The one that was asked, where it was tried; else the newest of PATH that was tried and starts."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for minor in (11, 12, 13):
        assert setup.tested_python(minor) == sys.executable
    with pytest.raises(UserError, match="python3 is 3.10, too old, and no python3.11 to python3.13 is on PATH"):
        setup.tested_python(10)
    assert setup.tested_python(14) == sys.executable and "newer than" in capsys.readouterr().out
    python_that_says(tmp_path / "python3.13", "exit 127")  # pyenv's, of a version that is not switched on
    python_that_says(tmp_path / "python3.11", "echo 11")
    python_that_says(tmp_path / "python3.12", "echo 12")
    assert setup.tested_python(10) == setup.tested_python(14) == str(tmp_path / "python3.12")
    assert f"python3 is 3.10, tried were 3.11 to 3.13: {tmp_path}/python3.12 is used" in capsys.readouterr().out


# ---- What is needed


def test_ranges():
    for version in ("2.11", "2.11.0", "2.11.0+cu128", "2.13.9.post1"):
        assert setup.within(version, ">=2.11,<2.14")
    for version in ("2.9", "2.10.9", "2.14", "2.14.0+cu130", "2.11.0a0", "2.12.0rc1", "3"):
        assert not setup.within(version, ">=2.11,<2.14")


def test_every_requirement_is_understood_and_pinned_within_its_range(monkeypatch):
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    monkeypatch.setattr("sys.platform", "linux")
    needs = setup.needs()
    assert len(needs) == len(lines) - 1  # psutil is for others
    for name, ranges in needs.items():
        assert setup.within(PINS[name], ranges), name
    for platform in ("darwin", "win32"):
        monkeypatch.setattr("sys.platform", platform)
        assert needs.keys() ^ setup.needs().keys() == {"bitsandbytes", "psutil"}


def test_an_environment_that_is_given_fits_or_is_told_all_that_does_not(tmp_path, index):
    machine = Machine(tmp_path, index, [(name, PINS[name]) for name in setup.needs()])
    assert machine.make("setup", "PYTHON=python3") == ""
    shutil.rmtree(machine.site / f"tqdm-{PINS['tqdm']}.dist-info")
    shutil.move(
        machine.site / f"numpy-{PINS['numpy']}.dist-info",
        machine.site / "numpy-2.1.3.dist-info",
    )
    about = machine.site / "numpy-2.1.3.dist-info" / "METADATA"
    about.write_text(about.read_text().replace(PINS["numpy"], "2.1.3"))
    output = machine.make("train", "PYTHON=python3", code=2)
    assert "tqdm is not installed; numpy is 2.1.3, tested is >=2.4,<3: " in output and "Traceback" not in output
    assert "leave PYTHON= out" in output and not (machine.clone / ".venv").exists()


# ---- pip's words


def test_pips_words_become_lines(capsys):
    words = [
        "Collecting torch==2.13.0",
        "  Downloading torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl (526.6 MB)",
        "  Downloading h11-0.16.0-py3-none-any.whl (1500 kB)",
        "  Using cached numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl (16.9 MB)",
        "  Downloading nvidia_cudnn_cu13-9.1-py3-none-manylinux_2_27_x86_64.whl (1.1 GB)",
        "Successfully installed h11-0.16.0 torch-2.13.0",
    ]
    count, fetched, error = setup.follow(line.encode() for line in words)
    assert (count, round(fetched, 1), error) == (2, 1628.1, "")
    assert capsys.readouterr().out == "setup: torch 2.13.0, 527 MB\nsetup: nvidia_cudnn_cu13 9.1, 1,100 MB\n"


def test_pips_first_error_is_the_reason_and_the_network_is_named():
    words = [
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(name resolution)': /x/",
        "ERROR: Could not find a version that satisfies the requirement x==1 (from versions: none)",
        "ERROR: No matching distribution found for x==1",
    ]
    error = setup.follow(line.encode() for line in words)[2]
    assert error.startswith(
        "Could not find a version that satisfies the requirement x==1 (from versions: none) (the netw"
    )
    assert "name resolution" in error


def test_a_presets_pictures_have_their_default():
    """Exported before it is read, the variable would be empty and the default never be taken."""
    said = subprocess.run(["make", "-np", "PRESET=mine"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "\nPICTURES = my_pictures\n" in said or "\nPICTURES := my_pictures\n" in said


@pytest.mark.slow
def test_half_a_pip_is_made_anew(tmp_path, index):
    """As an interrupt in the middle of ensurepip leaves it: it can be imported, and installs nothing."""
    machine = Machine(tmp_path, index)
    machine.make()
    (vendor,) = machine.clone.glob(".venv/lib/*/site-packages/pip/_vendor/rich")
    shutil.rmtree(vendor)
    (machine.clone / ".venv" / "installed").unlink()
    machine.make()
    assert vendor.is_dir()
