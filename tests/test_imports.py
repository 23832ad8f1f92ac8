"""What a command imports, in a process of its own, because each import that nobody asked for costs seconds."""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import PRECOMPUTE, ROOT, TRAIN, precompute

from data.common.imports import COMPILER, UNUSED, lean, without


def imported(module, *flags):
    """Names of all modules that a successful command has imported at its end."""
    code = "import atexit, runpy, sys\n"
    code += "atexit.register(lambda: print('modules:', *(name for name, m in sys.modules.items() if m)))\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    words = [sys.executable, "-c", code, module, *map(str, flags)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split("modules: ")[1].split())


def test_packages_are_hidden_and_come_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "there", sys)  # imported before: it stays
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with without("colorsys", "there"):
        assert find_spec("colorsys") is None
        with pytest.raises(ImportError, match="colorsys"):
            import colorsys
        import there

        assert there is sys
    import colorsys

    assert sys.modules["colorsys"] is colorsys and "there" in sys.modules


def test_who_has_seen_a_package_is_not_told_that_it_is_gone():
    """diffusers would fail in the middle of an import of what it believes to be there."""
    assert "diffusers" in sys.modules  # by conftest
    with lean():
        assert all(sys.modules.get(name, name) is not None for name in UNUSED)


def test_a_precompute_that_has_nothing_to_do_imports_no_torch(pictures, tmp_path):
    precompute(tmp_path / "run", pictures)
    modules = imported("data.precompute", "--output_dir", tmp_path / "run", "--train_data_dir", pictures, *PRECOMPUTE)
    assert not modules & {"torch", "diffusers", "transformers", "datasets"}


@pytest.mark.slow
def test_train_imports_what_it_uses(cached, tmp_path):
    flags = ("--output_dir", tmp_path / "run", "--cache_dir", cached / "cache", *TRAIN, "--max_train_steps", 1)
    modules = imported("train", *flags, "--use_8bit_adam")
    assert "bitsandbytes" in modules  # it is used, and was not hidden from the optimizer
    assert not modules & ({*UNUSED, *COMPILER, "transformers", "torchvision", "infer.sample"} - {"bitsandbytes"})


@pytest.mark.slow
def test_train_with_validation_prompts_imports_what_draws_them(cached, pictures, tmp_path):
    """And no encoder of ours."""
    shutil.copytree(cached, tmp_path / "run")
    precompute(tmp_path / "run", pictures, "--validation_prompt", "a fox")
    modules = imported("train", "--output_dir", tmp_path / "run", *TRAIN, "--max_train_steps", 1)
    assert {"infer.sample", "transformers"} <= modules and (tmp_path / "run" / "samples" / "000001_0.png").exists()
    assert not modules & {*UNUSED, *COMPILER, "data.encoders", "data.loaded"}


@pytest.mark.slow
def test_compare_imports_what_it_uses(run, tmp_path):
    """In two parts, diffusers first and transformers when the text encoders are loaded."""
    shutil.copytree(run.folder, tmp_path / "run")
    flags = ("--output_dir", tmp_path / "run", "--prompt", "x", "--num_inference_steps", 1)
    assert not imported("infer", *flags) & {*UNUSED, *COMPILER}
