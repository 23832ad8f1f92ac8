"""Which of our modules may import which, read from the code itself: diffusers imports CLIP, so running it would not tell."""

import ast
import sys

import pytest
from conftest import ROOT

MAY = {
    "data": {"data"},
    "lora": {"lora", "data.safe"},
    "train": {"train", "lora", "data.cache", "data.sampler", "data.ahead", "data.safe", "data.flags", "data.models", "data.fused", "data.check", "infer.sample"},
    "infer": {"infer", "lora", "data.safe", "data.check", "data.flags", "data.models", "data.cache", "data.encoders"},
}
FILES = [path for package in MAY for path in sorted((ROOT / package).glob("*.py"))]
OURS = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES} | {"data.toy"}


def imports(path):
    """Full names of the modules that a file imports, wherever in it: `from data import safe` is data.safe."""
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
    return {name for name in imports(path) if name.split(".")[0] in MAY}


def allowed(name, may):
    return any(name == m or name.startswith(f"{m}.") for m in may)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    """The trainer with a text encoder, or LoRA that knows about caches, is how houses become mazes."""
    may = MAY[path.relative_to(ROOT).parts[0]]
    if path.relative_to(ROOT).as_posix() == "infer/sample.py":  # the trainer imports it
        may = {"data.models", "data.safe"}
    assert not [name for name in own(path) if not allowed(name, may)]
    assert not [name for name in own(path) if allowed(name, {"data.toy", "tests"})]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_trainer_framework(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"accelerate", "peft", "torchvision", "pytest", "tests"}


def test_the_door_is_standard_library():
    """safe and flags are imported before anything is checked."""
    for name in ("safe", "flags"):
        heads = {name.split(".")[0] for name in imports(ROOT / "data" / f"{name}.py")}
        assert heads <= set(sys.stdlib_module_names) | {"data"}


def test_no_import_hides_from_this_test():
    """import_module and __import__ would."""
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not (names | attributes) & {"import_module", "__import__", "exec"}, path


def test_the_walk_sees_every_way_to_import(monkeypatch):
    """The test of the test: each spelling, also inside a function."""
    path = ROOT / "train" / "imaginary.py"
    code = "import data.encoders\nfrom data import encoders\nfrom data.encoders import VAE\nfrom . import loop\nfrom .state import x\n"
    code += "def f():\n    from data import encoders as e, safe\n"
    monkeypatch.setattr(type(path), "read_text", lambda self: code)
    assert sorted(imports(path)) == ["data.encoders"] * 4 + ["data.safe", "train.loop", "train.state"]
