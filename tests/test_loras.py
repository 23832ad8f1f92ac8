"""Which LoRAs get a row: by step, once each, with a name that tells them apart."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from data.common.errors import UserError
from infer.loras import find

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def lora(path, value):
    """A file of weights that are all `value`: two of one value are the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    A, B = np.full((2, 320), value, np.float16), np.full((320, 2), value, np.float16)
    save_file({f"{LAYER}.lora_down.weight": A, f"{LAYER}.lora_up.weight": B}, path)
    return path


@pytest.fixture
def run(tmp_path):
    """A run's folder: saves out of the letters' order, the best and the final one among them."""
    for step in (50, 1_000_000, 100, 200):
        lora(tmp_path / "cats" / f"lora-{step:06d}.safetensors", step / 2**20)
    shutil.copy(tmp_path / "cats" / "lora-000100.safetensors", tmp_path / "cats" / "lora-best.safetensors")
    shutil.copy(tmp_path / "cats" / "lora-1000000.safetensors", tmp_path / "cats" / "lora.safetensors")
    return tmp_path / "cats"


def labels(*paths):
    return [found.label for found in find(paths)]


def test_a_runs_folder_is_in_the_order_of_its_steps_each_file_once(run, capsys):
    found = find([run])
    assert [lora.label for lora in found] == ["step 50", "best (step 100)", "step 200", "final (step 1000000)"]
    assert [lora.step for lora in found] == [50, 100, 200, 1_000_000]
    assert [lora.path.name for lora in found][1::2] == ["lora-000100.safetensors", "lora-1000000.safetensors"]
    assert capsys.readouterr().out == ""  # that the best is a save is no news


def test_marks_without_their_save_come_behind_the_saves_and_others_last(run):
    lora(run / "lora-best.safetensors", 7)
    lora(run / "lora.safetensors", 8)
    lora(run / "a friend's.safetensors", 9)
    assert labels(run)[4:] == ["best", "final", "a friend's"]
    shutil.copy(run / "lora-best.safetensors", run / "lora.safetensors")
    assert labels(run)[4:] == ["best, final", "a friend's"]
    shutil.copy(run / "lora-000200.safetensors", run / "lora.safetensors")
    shutil.copy(run / "lora-000200.safetensors", run / "lora-best.safetensors")
    assert labels(run)[2] == "best, final (step 200)"


def test_files_stay_in_the_order_given_and_the_same_bytes_are_drawn_once(run, capsys):
    a, b = lora(run.parent / "b.safetensors", 3), lora(run.parent / "a.safetensors", 4)
    copy = shutil.copy(a, run.parent / "copy.safetensors")
    assert labels(a, b, copy, a) == ["b", "a"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{copy}: the same bytes as {a}, so it has no row of its own" and len(said) == 2
    assert labels(run / "lora-000200.safetensors", a, run)[:3] == ["step 200", "b", "step 50"]


def test_two_runs_are_told_apart_by_their_names_and_if_need_be_by_their_places(run):
    other = lora(run.parent / "dogs" / "lora-000050.safetensors", 11)
    lora(run.parent / "dogs" / "lora-000060.safetensors", 12)
    found = labels(run, other.parent)
    assert found[0] == "cats: step 50" and found[2] == "cats: step 200" and found[-1] == "dogs: step 60"
    assert labels(lora(run.parent / "b.safetensors", 3), other, run)[:3] == ["b", "dogs: step 50", "cats: step 50"]
    places = [lora(run.parent / place / "cats" / "mine.safetensors", 13 + i) for i, place in enumerate("xy")]
    assert labels(*places) == ["x/cats: mine", "y/cats: mine"]


def test_what_is_no_lora_is_named(run, capsys):
    """In a folder it is left out; named itself it is refused, and so is a folder without any."""
    model = run / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": np.zeros((2, 2), np.float16)}, model)
    (run / "damaged.safetensors").write_bytes(b"not finished")
    (run / "._lora.safetensors").write_bytes(b"macOS leaves these")
    (run / "notes.txt").write_text("mine")
    assert len(labels(run)) == 4
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith(f"left out: {run / 'damaged.safetensors'}: not a readable")
    assert said[1].startswith(f"left out: {model}: ")
    with pytest.raises(UserError, match="model.safetensors: .* can be loaded"):
        find([run, model])
    (run.parent / "empty").mkdir()
    (run.parent / "models").mkdir()
    shutil.copy(model, run.parent / "models")
    for folder in ("empty", "models"):
        with pytest.raises(UserError, match=f"{folder}: a folder without a LoRA that can be loaded"):
            find([run, run.parent / folder])
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        find([run / "gone.safetensors"])
