"""python3 -m data.common.setup requirements.txt: .venv with the tested packages, around a torch that is there already.

`make` runs it. Any Python from 3.6 on can read this file and errors.py, so that one that is too old says what to do.
"""

import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from data.common.errors import UserError, one_line

OLDEST, NEWEST = 11, 13  # Python 3.11, 3.12 and 3.13 were tried
MINOR = sys.version_info[1]
BIN = os.path.join(".venv", "Scripts" if os.name == "nt" else "bin")
PYTHON = os.path.join(BIN, "python")
LOG = os.path.join(".venv", "setup.log")
LINKS = "torch_of_the_system"  # a folder in .venv's site-packages
LARGE = 100  # MB of a download that gets a line of its own
BUILDERS = (  # what makes an environment, where it is there and works; each goes on with what another left half done
    ("venv", [sys.executable, "-m", "venv", ".venv"]),
    ("virtualenv", [sys.executable, "-m", "virtualenv", ".venv"]),
    ("virtualenv", ["virtualenv", "--python", sys.executable, ".venv"]),
    ("uv", ["uv", "venv", "--seed", "--allow-existing", "--python", sys.executable, ".venv"]),
)


def main(argv):
    """argv: a file of requirements to install; or `fits`, to see whether this Python has what is needed already."""
    if argv == ["fits"]:
        fits()
        return
    began, python = time.time(), tested_python(MINOR)
    if python != sys.executable:
        sys.exit(subprocess.call([python, "-m", "data.common.setup", *argv]))
    build()
    torch = link_torch()
    count, fetched = install(argv[0], torch)
    if torch and not answer(PYTHON, "import torch; print(torch.__version__)"):
        say(f"torch {torch} does not start in .venv; another one is installed")
        shutil.rmtree(os.path.join(site_packages(), LINKS))
        count, fetched = install(argv[0], None)
    files = (os.path.join(place, name) for place, _, names in os.walk(".venv") for name in names)
    megabytes = sum(os.lstat(file).st_size for file in files) / 1e6
    say(
        f"{argv[0]}: {count} packages installed in {time.time() - began:.0f} s, {fetched:,.0f} MB downloaded; "
        f".venv has {megabytes:,.0f} MB"
    )


def say(line):
    print(f"setup: {one_line(line)}", flush=True)


def answer(python, code):
    """What a line of code prints in another Python; "" where it fails."""
    try:
        return subprocess.check_output([python, "-c", code], stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---- What is needed


def needs():
    """{name: ranges} of the lines of requirements.txt that hold on this platform, as {"torch": ">=2.11,<2.14"}."""
    found = {}
    with open(os.path.join(os.path.dirname(__file__), "..", "..", "requirements.txt")) as file:
        for line in file:
            match = re.match(r'([\w.-]+)([<>=][^;\s]*)(?:; sys_platform ([!=]=) "(\w+)")?\s*$', line)
            if match and (not match.group(3) or (match.group(4) == sys.platform) == (match.group(3) == "==")):
                found[match.group(1)] = match.group(2)
    return found


def within(version, ranges):
    """Whether "2.11.0+cu128" is within ">=2.11,<2.14". What is no release ("2.12.0a0") is not: it was not tried."""
    version = version.split("+")[0]
    if not re.match(r"[\d.]+(\.post\d+)?$", version):
        return False
    lowest, below = re.match(r">=([\d.]+),<([\d.]+)$", ranges).groups()
    return _numbers(lowest) <= _numbers(version) < _numbers(below)


def _numbers(version):
    numbers = [int(n) for n in re.findall(r"\d+", version.split(".post")[0])]
    return numbers + [0] * (4 - len(numbers))


def fits():
    """-> {name: version} of what is needed. Raises UserError naming all that is missing or was not tested."""
    if MINOR < OLDEST:
        raise UserError(f"{sys.executable} is Python 3.{MINOR}, which is too old; 3.{OLDEST} to 3.{NEWEST} were tried")
    from importlib.metadata import PackageNotFoundError, version

    found, wrong = {}, []
    for name, ranges in needs().items():
        try:
            found[name] = version(name)
            if not within(found[name], ranges):
                wrong.append(f"{name} is {found[name]}, tested is {ranges}")
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
    if wrong:
        if os.path.basename(sys.prefix) == ".venv":
            raise UserError(f"{'; '.join(wrong)}: .venv is damaged; make clean, then make again")
        raise UserError(
            f"{'; '.join(wrong)}: {sys.executable} -m pip install -r requirements.txt -c constraints.txt, or leave "
            "PYTHON= out and make builds .venv"
        )
    return found


# ---- The environment


def tested_python(minor):
    """-> the Python for .venv: this one, which is 3.`minor`, or one of PATH where this one was not tried.

    Raises UserError when it is too old and there is no other. One that is too new may be good enough.
    """
    if OLDEST <= minor <= NEWEST:
        return sys.executable
    for other in range(NEWEST, OLDEST - 1, -1):
        path = shutil.which(f"python3.{other}")
        if path and answer(path, "import sys; print(sys.version_info[1])") == str(other):
            say(f"python3 is 3.{minor}, tried were 3.{OLDEST} to 3.{NEWEST}: {path} is used")
            return path
    if minor < OLDEST:
        raise UserError(
            f"python3 is 3.{minor}, too old, and no python3.{OLDEST} to python3.{NEWEST} is on PATH; install one "
            "(Ubuntu 22.04: apt install python3.11 python3.11-venv; elsewhere: uv python install 3.12), then make again"
        )
    say(f"python3 is 3.{minor}, newer than 3.{OLDEST} to 3.{NEWEST}, which were tried and are not on PATH")
    return sys.executable


def build():
    """Make .venv, or go on with the one that is there. Raises UserError where nothing can make one."""
    if has_pip():
        return
    shutil.rmtree(".venv", ignore_errors=True)  # what an interrupted one left, half a pip for example
    for name, command in BUILDERS:
        os.makedirs(".venv", exist_ok=True)
        with open(LOG, "a") as log:
            try:
                subprocess.call(command, stdout=log, stderr=log)
            except FileNotFoundError:
                continue
        if has_pip():
            say(f".venv is made by {name}, with Python 3.{MINOR} ({sys.executable})")
            return
    raise UserError(
        f"{sys.executable} can make no .venv: venv fails, virtualenv and uv fail or are not there; install one "
        f"(Debian, Ubuntu: apt install python3-venv; elsewhere: pip install virtualenv), then make again; see {LOG}"
    )


def has_pip():
    """Whether .venv is there and can install. Raises UserError when it is another Python's."""
    minor = answer(PYTHON, "import sys; print(sys.version_info[1])")
    if minor and minor != str(MINOR):
        raise UserError(f".venv is Python 3.{minor}, python3 is 3.{MINOR}; make clean, then make again")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return bool(minor) and subprocess.call([PYTHON, "-m", "pip", "--version"], **quiet) == 0


def site_packages():
    return answer(PYTHON, "import sysconfig; print(sysconfig.get_path('purelib'))")


def link_torch():
    """Where this Python has a torch that fits, make it visible in .venv. -> its version, or None.

    By links to torch and to what it needs and constraints.txt does not pin (CUDA's libraries, Triton), and to nothing
    else, because what else is installed there was not tried next to the packages that come into .venv.
    """
    links = os.path.join(site_packages(), LINKS)
    if glob.glob(os.path.join(site_packages(), "torch-*.dist-info")):  # .venv has its own
        return None
    torch = fitting_torch()
    places = parts("torch") if torch else []
    shutil.rmtree(links, ignore_errors=True)
    if not places:
        return None
    os.mkdir(links)
    try:
        for place in places:
            os.symlink(place, os.path.join(links, os.path.basename(place)))
    except OSError as error:  # Windows lets few make links
        say(f"torch {torch} is there and cannot be linked ({error.strerror}); another one is installed")
        shutil.rmtree(links)
        return None
    with open(f"{links}.pth", "w") as file:  # Python looks there after .venv's own packages
        file.write(f"{LINKS}\n")
    say(f"torch {torch} of {os.path.dirname(places[0])} is used as it is")
    return torch


def fitting_torch():
    """-> the version of this Python's torch, or None and a line that says why it is not used."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        return None
    tested = needs()["torch"]
    if not within(torch, tested):
        why = f"tested is {tested}"
    else:
        cuda = answer(sys.executable, "import torch; print(torch.version.cuda)")
        if cuda and (cuda != "None" or not shutil.which("nvidia-smi")):
            return torch
        why = "it cannot use the GPU" if cuda else "it does not start"
    say(f"torch {torch} is there, but {why}: another one is installed")
    return None


def parts(name):
    """-> the files and folders of an installed package and of what it needs, less what constraints.txt pins."""
    from importlib.metadata import PackageNotFoundError, distribution

    with open("constraints.txt") as file:
        pinned = {_plain(line.split("==")[0]) for line in file} - {name}
    found, seen, todo = set(), set(), [(name, "")]
    while todo:
        wanted = todo.pop()  # a name and its extras: torch needs "cuda-toolkit[cublas,cudart]==13.0.2"
        if wanted in seen or _plain(wanted[0]) in pinned:
            continue
        seen.add(wanted)
        try:
            package = distribution(wanted[0])
        except PackageNotFoundError:  # pip installs it
            continue
        tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
        found |= {os.path.realpath(str(package.locate_file(top))) for top in tops}
        for line in package.requires or ():
            extra = re.search(r"extra == .([\w.-]+)", line)
            if not extra or extra.group(1) in wanted[1].split(","):
                todo.append(re.match(r"([\w.-]+) *(?:\[(.*?)\])?", line).groups(""))
    return sorted(found)


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def install(file, torch):
    """Install a file of requirements at constraints.txt's versions, and at the version of a torch that is there.

    -> how many packages, how many MB were downloaded. Raises UserError with pip's reason.
    """
    for info in glob.glob(os.path.join(site_packages(), "*.dist-info")):
        if not os.path.exists(os.path.join(info, "INSTALLER")):  # written last: a pip that was killed left this
            shutil.rmtree(info)
    with open("constraints.txt") as pins:
        lines = [f"torch=={torch}\n" if torch and line.startswith("torch==") else line for line in pins]
    constraints = os.path.join(".venv", "constraints.txt")
    with open(constraints, "w") as copy:
        copy.writelines(lines)
    # Python compiles what it imports, a fraction of what comes.
    command = [PYTHON, "-m", "pip", "install", "--no-compile", "-r", file, "-c", constraints]
    command += ["--log", LOG, "--progress-bar", "off", "--disable-pip-version-check"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    try:
        count, fetched, error = follow(pip.stdout)
        code = pip.wait()
    finally:
        pip.terminate()  # a signal to `make` does not reach it
    if code:
        raise UserError(f"{file}: {error or f'pip ended with {code}'}; all that pip said is in {LOG}")
    return count, fetched


def follow(output):
    """Say what of pip's output takes long. -> packages installed, MB downloaded, pip's first error."""
    count, fetched, error, network = 0, 0.0, "", ""
    for line in output:
        line = line.decode(errors="replace").strip()
        size = re.match(r"Downloading ([^-]+)-([^-]+)-\S+ \(([\d.]+) ([kMG]?)B\)", line)
        if size:
            megabytes = float(size.group(3)) * {"": 1e-6, "k": 1e-3, "M": 1, "G": 1e3}[size.group(4)]
            fetched += megabytes
            if megabytes > LARGE:
                say(f"{size.group(1)} {size.group(2)}, {megabytes:,.0f} MB")
        elif line.startswith("Successfully installed"):
            count = len(line.split()) - 2
        elif line.startswith("WARNING: Retrying"):
            network = f" (the network: {line.split('connection broken by')[-1].strip()})"
        elif line.startswith("ERROR:") and not error:
            error = line[len("ERROR:") :].strip()
        elif error and re.match("The user requested|[^ ]+ [^ ]+ depends on", line):  # what is in conflict
            error += f"; {line}"
    return count, fetched, error + network if error else ""


def _stop(signum, _frame):
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.code)
    except PermissionError as error:
        print(f"error: {error.filename}: {error.strerror}; this folder must be one that you can write", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
