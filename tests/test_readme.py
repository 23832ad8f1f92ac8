"""README says what the code does: every flag with its default and meaning, and no file that is not there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields

import datasets
import pytest
from conftest import PIPELINE, ROOT, TOKEN
from PIL import Image

from data.common.flags import COMMANDS, spelled
from tests.hub import Hub

README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "data/toy/README.md", "tests/bench/NOTES.md", "tests/FAULTS.md")


def rglob(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_the_table_of_its_command(command):
    table = README.split(f"**`python -m {command}`**")[1].split("\n\n")[1]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    wanted, words = {}, {MISSING: "required", False: "off", None: "", (): ""}
    for f in fields(COMMANDS[command]):
        word = next((word for default, word in words.items() if f.default is default), f"`{f.default}`")
        wanted[f"`{spelled(f)}`"] = [word, f.metadata["meaning"]]
    assert {row[1]: row[2:4] for row in cells} == wanted


def test_the_page_is_short_and_says_nothing_twice():
    outside = re.sub(r"<details>.*?</details>", "", README, flags=re.S)
    assert len(outside.splitlines()) <= 240
    prose = re.sub(r"```.*?```", "", outside, flags=re.S)
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.:;|])\s", prose)]
    long = [sentence for sentence in sentences if len(sentence.split()) > 5]
    assert len(long) > 60 and len(long) == len(set(long))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """To a file of this repository, and where it names a heading to one that is there; other sites are not asked."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", file.read_text()) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
        assert not heading or heading in slugs, target


def test_what_the_page_says_of_the_code_is_so():
    """The lines of the files to read, and the messages that a reader looks up."""
    read = ["lora/linear.py", "lora/inject.py", "train/diffusion.py", "train/loop.py"]
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in read)
    assert f"four files, {round(lines, -1)} lines" in " ".join(README.split())
    product = "".join(path.read_text() for folder in ("lora", "data", "train", "infer") for path in rglob(folder))
    symptoms = README.split("## What can go wrong")[1].split("\n\n")[1].splitlines()[2:]
    quoted = [re.match(r"\| `([^`]+)`", line) for line in symptoms]
    assert len(symptoms) == 8 and sum(map(bool, quoted)) >= 4
    for match in filter(None, quoted):
        assert match[1] in product, match[1]


def test_the_table_of_faults_names_tests_that_are_there():
    """A test that is renamed or gone would leave a promise that nobody keeps."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"def test_(\w+)", tests))
    table = (ROOT / "tests" / "FAULTS.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[1]) for row in rows] == sorted({int(row[1]) for row in rows})
    for row in rows:
        if row[3].strip().startswith("not tried"):
            continue
        words = [word for word in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", row[4]) if not word.startswith("test_")]
        assert words or "test_" in row[4], row
        for word in words:
            assert any(word in name for name in names), word


# ---- Its commands, typed

FAST = dict(  # what a few seconds need besides what the page says; the toy is typed as it is
    precompute="--resolution 64 --mixed_precision no",
    train="--max_train_steps 2 --mixed_precision no",
    compare="--num_inference_steps 2",
)
ELSEWHERE = {  # command: who types it, in which words
    "make lint": (".ci/run", "make lint"),
    "make test": (".ci/run", "make test\n"),
    "make test-all": (".ci/run", "make test-all"),
    "git apply tests/recipes/NAME.diff": ("tests/test_recipes.py", '"git", "apply"'),
} | {
    f"python -m tests.bench.{words}": ("tests/test_end_to_end.py", f'"{words.split()[0]}": [')
    for words in ("step OUT", "precompute OUT", "job OUT", "ranks OUT", "full_size OUT --single")
}
NEEDS_RUNS = r"make (compare|publish|check)|python -m (train\.metrics|lora\.files)"  # typed last


def typed():
    """-> every whole command on the page, once, in its order. One with … in it is none, nor is a flag alone."""
    fenced = [
        line.split("  #")[0].strip()
        for block in re.findall(r"(?s)```sh\n(.*?)```", README)
        for line in block.splitlines()
    ]
    inline = re.findall(r"`((?:make|python -m|git|torchrun) [^`…]+)`", README.split("<details>")[0])
    return list(dict.fromkeys(fenced + [" ".join(command.split()) for command in inline]))


def not_run():
    """-> the commands that the page itself says no test runs."""
    names = re.findall(r"`([^`]+)`", README.split("no test runs")[1].split(".\n")[0])
    return tuple(" ".join(name.split()) for name in names)


@pytest.fixture
def checkout(tmp_path, pictures):
    """A folder that looks like the repository, in which the hub's names are folders: the toy's model and pictures."""
    folder = tmp_path / "barelora"
    folder.mkdir()
    for name in ("lora", "data", "train", "infer", "tests", "Makefile", "requirements.txt", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    for owner, name, there in (
        ("stabilityai", "stable-diffusion-xl-base-1.0", PIPELINE),
        ("madebyollin", "sdxl-vae-fp16-fix", PIPELINE / "vae"),
    ):
        (folder / owner).mkdir()
        (folder / owner / name).symlink_to(there)
    captions = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows = dict(image=[str(pictures / row["file_name"]) for row in captions], text=[row["text"] for row in captions])
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(folder / "lambdalabs" / "naruto-blip-captions")
    shutil.copytree(pictures, folder / "my_pictures")
    return folder


def in_steps(command):
    """A command of the page -> the shell lines that are typed for it here, one for each of make's targets."""
    if command.startswith("python -m "):
        return [command.replace("python", shlex.quote(sys.executable), 1).replace("FILE", "runs/r8/lora.safetensors")]
    _, *words = shlex.split(command)
    values = dict(word.split("=", 1) for word in words if "=" in word)
    run = "runs/two" if "GPUS" in values else values.get("RUN", f"runs/{values.get('PRESET', 'toy')}")
    steps = []
    for target in (word for word in words if "=" not in word):
        settings = values | dict(PYTHON=sys.executable, RUN=run)
        fast = FAST.get(target, "") if "PRESET" in values else ""
        settings["ARGS"] = f"{values.get('ARGS', '')} {fast}"
        steps.append(shlex.join(["make", target, *(f"{name}={value}" for name, value in settings.items())]))
    return steps


@pytest.mark.slow
def test_every_command_of_the_page_runs(checkout):
    """With the toy's model and pictures in folders that have the hub's names. The toy itself prints what the page
    quotes, and its pictures score what the page says of them, with some room for another processor's rounding."""
    for command, (place, words) in ELSEWHERE.items():
        assert command in typed() and words in (ROOT / place).read_text()
    commands = [command for command in typed() if command not in ELSEWHERE and not command.startswith(not_run())]
    assert len(commands) > 10
    env = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": "-1"}

    def type_in(commands, printed):
        for step in (step for command in commands for step in in_steps(command)):
            online = dict(HF_HUB_OFFLINE="0") if "publish" in step else {}
            done = subprocess.run(step, shell=True, cwd=checkout, env=env | online, capture_output=True, text=True)
            assert not done.returncode, f"{step}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout + done.stderr)

    with Hub() as hub, ThreadPoolExecutor(2) as both:  # each takes one of two cores
        env["HF_ENDPOINT"] = hub.url
        hub.users[TOKEN] = "me"
        for late in (False, True):
            now = [command for command in commands if bool(re.match(NEEDS_RUNS, command)) is late]
            mine = [command for command in now if "mine" in command]
            printed = [], []
            list(both.map(type_in, (mine, [command for command in now if command not in mine]), printed))
            if not late:
                said = as_shape("\n".join(printed[1]))
        assert hub.repositories["me/naruto"].files["lora.safetensors"]
    quoted = README.split("among other things:\n\n```\n")[1].split("```")[0].splitlines()
    assert len(quoted) > 4 and not [line for line in quoted if as_shape(line) not in said]
    scores = json.loads((checkout / "runs" / "toy" / "compare" / "scores.json").read_text())["lora"]
    assert scores["style"] >= 0.95 and scores["lines"] >= 0.93 and scores["lines_worst"] >= 0.8, scores
    assert scores["colour"] >= 0.9 and scores["subject"] == 1, scores
    snippet = re.search(r"(?s)```python\n(.*?)```", README)[1]
    snippet = snippet.replace("torch.float16", "torch.float32").replace('.to("cuda")', "") + 'image.save("a.png")\n'
    subprocess.run([sys.executable, "-c", snippet], cwd=checkout, env=env, check=True, timeout=300)
    assert Image.open(checkout / "a.png").size == (128, 128)


def as_shape(text):
    """A text without what differs from run to run: its numbers, and which unit of time they are in."""
    return re.sub(r"-?\d[\d.]*(e[+-]?\d+)?( seconds?| minutes?)?", "#", text)
