"""Which of our modules may import which, read from their code, because diffusers imports CLIP whenever it runs."""

import ast
import sys

import pytest
from conftest import ROOT

TRAIN = {
    "train",
    "lora",
    "data.common",
    "data.models",
    "data.cache",
    "data.sampler",
    "data.check",
    "data.progress",
    "infer.sample",
}
MAY = {  # a folder, or one file of it, and what it may import; the longest name that fits counts
    "data/common": {"data.common"},
    "data/models": {"data.models", "data.common"},
    "data": {"data"},
    "lora": {"lora", "data.common", "data.models"},
    "train": TRAIN,
    "train/__main__.py": TRAIN | {"infer.publish"},  # before the first step and after the last
    "infer": {
        "infer",
        "lora",
        "data.common",
        "data.models",
        "data.cache",
        "data.check",
        "data.encoders",
        "data.progress",
        "train.curves",
    },
    "train/curves.py": {"data.common"},  # infer reads with it too
    "infer/sample.py": {"data.common", "data.models"},  # the trainer imports it
}
PACKAGES = {"lora", "data", "train", "infer"}
FILES = [
    path
    for package in sorted(PACKAGES)
    for path in sorted((ROOT / package).rglob("*.py"))
    if "toy" not in path.relative_to(ROOT).parts
]
OURS = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES} | {
    "data.toy"
}


def imports(path):
    """Full names of the modules that a file imports, wherever in it: `from data import cache` is data.cache."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative to the file's own package
                package = path.relative_to(ROOT).parts[: -node.level]
                module = ".".join([*package, *filter(None, [module])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name in OURS else module


def own(path):
    return {name for name in imports(path) if name.split(".")[0] in PACKAGES}


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    """A trainer with a text encoder, or a LoRA that knows about caches, is how houses become mazes."""
    place = path.relative_to(ROOT).as_posix()
    may = MAY[max((room for room in MAY if f"{place}/".startswith(f"{room}/")), key=len)]
    assert not [name for name in own(path) if not within(name, may)]
    assert not [name for name in own(path) if within(name, {"data.toy", "tests"})]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_trainer_framework(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"accelerate", "peft", "torchvision", "pytest", "tests"}


def test_the_door_is_standard_library():
    """data.common is imported before anything is checked; psutil, where a system tells its memory to nobody else."""
    for path in (ROOT / "data" / "common").glob("*.py"):
        heads = {name.split(".")[0] for name in imports(path)}
        assert heads - {path.name == "system.py" and "psutil"} <= set(sys.stdlib_module_names) | {"data"}, path


def test_no_import_hides_from_this_test():
    """import_module and __import__ would."""
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not (names | attributes) & {"import_module", "__import__", "exec"}, path


def test_the_walk_sees_every_way_to_import(monkeypatch):
    """The test of the test: each spelling, also inside a function."""
    path = ROOT / "train" / "imaginary.py"
    code = "import data.encoders\nfrom data import encoders\nfrom data.encoders import VAE\n"
    code += "from . import loop\nfrom .state import x\n"
    code += "def f():\n    from data import encoders as e, cache\n"
    monkeypatch.setattr(type(path), "read_text", lambda self: code)
    assert sorted(imports(path)) == ["data.cache"] + ["data.encoders"] * 4 + ["train.loop", "train.state"]
