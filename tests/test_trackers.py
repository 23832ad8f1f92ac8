"""--report_to: what TensorBoard reads back, what wandb is told, and that nothing of it stops a run."""

import io
import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import TOKEN, TRAIN, command, here, settings
from PIL import Image

from data.common import flags
from data.common.errors import UserError
from train import trackers
from train.curves import flat, read
from train.metrics import Metrics
from train.trackers import Trackers, check_installed, shown_settings

HELD_OUT = dict(difference=-0.0123, standard_error=0.0011, pictures=24)
HELD_OUT |= dict(bands=[{"from": 0, "to": 250, "difference": -0.01}, {"from": 250, "to": 500, "difference": 0.02}])
KEY = "0123456789abcdefASentinelNotAKey01234567"


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def train(folder, start, last, names=("tensorboard",), pictures=()):
    """As the loop does it, less the training: steps start + 1 to last, with losses that tell of their step."""
    told = Trackers(names, folder, start, settings("train", output_dir="runs/x"))
    with Metrics(folder / "metrics.jsonl", start, last, torch.device("cpu"), told) as metrics:
        for step in range(start + 1, last + 1):
            more = dict(held_out=HELD_OUT) if step % 2 == 0 else {}
            metrics.log(step, 4, loss=1 / step, lr=1e-4 * step, grad_norm=float("inf") if step == 3 else 1.0, **more)
            metrics.show(step, {f"prompt_{n}": picture(step + n) for n in range(2)} if step in pictures else {})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict(scalars=0, images=0, tensors=0))
    return found.Reload()


def scalars(found):
    """{(name, step): [values]}"""
    out = {}
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            out.setdefault((name, event.step), []).append(event.value)
    return out


def of_the_file(folder):
    lines = read(folder / "metrics.jsonl")
    return {(name, line["step"]): [float(np.float32(value))] for line in lines for name, value in flat(line).items()}


# ---- TensorBoard


def test_tensorboard_reads_what_metrics_jsonl_says(tmp_path):
    train(tmp_path, 0, 5)
    found = scalars(events(tmp_path))
    assert found == of_the_file(tmp_path)
    assert found["held_out/difference", 4] == [pytest.approx(-0.0123)]
    assert found["held_out/band_250_500", 2] == [pytest.approx(0.02)]
    assert ("grad_norm", 3) not in found and ("grad_norm", 2) in found  # infinity is no point of a curve


def test_tensorboards_pictures_have_the_same_pixels(tmp_path):
    train(tmp_path, 0, 4, pictures=(2, 4))
    found = events(tmp_path)
    assert found.Tags()["images"] == ["prompt_0", "prompt_1"]
    for n in range(2):
        shown = {event.step: event.encoded_image_string for event in found.Images(f"prompt_{n}")}
        assert list(shown) == [2, 4]
        for step, png in shown.items():
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(picture(step + n)))


def test_after_a_resume_no_step_stands_there_twice_and_none_past_the_state(tmp_path):
    """Killed at 5 with the state of 3, and the run ends at 4."""
    train(tmp_path, 0, 5, pictures=(2, 4, 5))
    train(tmp_path, 3, 4, pictures=(4,))
    found = events(tmp_path)
    assert scalars(found) == of_the_file(tmp_path)
    assert sorted({step for _, step in scalars(found)}) == [1, 2, 3, 4]
    assert [event.step for event in found.Images("prompt_0")] == [2, 4]
    assert [event.step for event in found.Tensors("settings/text_summary")] == [1, 4]  # of each start


def test_tensorboard_has_the_settings_and_no_place_of_this_machine(tmp_path):
    given = dict(output_dir="runs/x", cache_dir="/srv/caches/c", network_weights="/home/ada/styles/ink.safetensors")
    told = Trackers(["tensorboard"], tmp_path, 0, settings("train", **given, rank=48))
    told.close()
    text = events(tmp_path).Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"rank": 48' in text and '"output_dir": "runs/x"' in text and '"ink.safetensors"' in text
    assert "/srv" not in text and "/home" not in text


@pytest.mark.slow
def test_tensorboard_needs_no_tensorflow_and_does_not_wait_for_one(tmp_path):
    """On Colab it is installed, and importing it takes seconds and some of the GPU."""
    (tmp_path / "tensorflow.py").write_text("print('imported')")
    code = "from train.trackers import Trackers\nfrom data.common.flags import parse\n"
    code += f"told = Trackers(['tensorboard'], {str(tmp_path)!r}, 0, parse('train', ['--output_dir', 'x']))\n"
    code += "told.log(1, dict(loss=0.5))\nprint(*told.working)\n"
    (tmp_path / "program.py").write_text(code)
    assert command("program", env=os.environ | {"PYTHONPATH": str(tmp_path)}) == "tensorboard\n"
    assert scalars(events(tmp_path)) == {("loss", 1): [0.5]}


def test_every_flag_is_told_or_said_not_to_be():
    told = shown_settings(settings("train", output_dir="x", network_weights="a/b", report_to=("wandb",)))
    absent = {name for name, default in vars(settings("train")).items() if name not in told}
    assert absent >= trackers.NOT_TOLD
    assert all(getattr(settings("train"), name) is None for name in absent - trackers.NOT_TOLD)
    json.dumps(told)


# ---- wandb, as its API is (wandb/sdk/wandb_init.py and wandb_run.py), recording what it is told

WANDB = """
import json, os

TOLD = os.environ["WANDB_TOLD"]

def tell(*words):
    with open(TOLD, "a") as file:
        file.write(json.dumps(words) + "\\n")

class Settings:
    def __init__(self, console="auto"):
        self.console = console

class Image:
    def __init__(self, data_or_path, mode=None, caption=None):
        self.size = data_or_path.size

class Run:
    def __init__(self, id):
        self.step, self.id = int(os.environ.get("WANDB_AT", 0)), id

    def log(self, data, step=None, commit=None):
        if os.environ.get("WANDB_FAILS") == str(step):
            raise ConnectionError("no route to host")
        assert step >= self.step
        self.step = step
        tell("log", step, {name: getattr(value, "size", value) for name, value in data.items()})

    def finish(self, exit_code=None, quiet=None):
        tell("finish")

def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
         config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
         mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
         tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None):
    tell("init", dict(project=project, dir=dir, id=id, name=name, config=config, resume=resume,
                      allow_val_change=allow_val_change, console=settings.console))
    return Run(id)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package wandb in its own folder. -> told(): what it was told since the last time"""
    place, said = tmp_path / "packages", tmp_path / "told"
    place.mkdir()
    (place / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("WANDB_TOLD", str(said))
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def told():
        lines = [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []
        said.unlink(missing_ok=True)
        return lines

    yield told
    sys.modules.pop("wandb", None)


def test_wandb_is_told_the_numbers_the_pictures_and_the_settings(tmp_path, wandb):
    run = tmp_path / "my run"
    run.mkdir()
    train(run, 0, 4, ("wandb",), pictures=(4,))
    (_, began), *logged, ended = wandb()
    assert began["project"] == "barelora" and began["name"] == "my run" and began["dir"] == str(run)
    assert began["resume"] == "allow" and began["console"] == "off" and began["config"]["rank"] == 32
    assert ended == ["finish"]
    numbers = {step: data for _, step, data in logged[:4]}
    assert numbers == {line["step"]: flat(line) for line in read(run / "metrics.jsonl")}
    assert logged[4:] == [["log", 4, {"prompt_0": [24, 16], "prompt_1": [24, 16]}]]


def test_wandb_goes_on_with_its_run_and_tells_no_step_twice(tmp_path, wandb, monkeypatch):
    train(tmp_path, 0, 5, ("wandb",))
    first = wandb()[0][1]["id"]
    monkeypatch.setenv("WANDB_AT", "6")  # the step that a run that goes on stands at
    train(tmp_path, 3, 7, ("wandb",))
    (_, began), *logged, _ = wandb()
    assert began["id"] == first and [step for _, step, _ in logged] == [6, 7]
    assert first.isalnum() and (tmp_path / "wandb" / "id").read_text() == first


# ---- What fails


class Fails:
    """A tracker that fails where it is told to."""

    def __init__(self, where):
        self.where, self.calls = where, []

    def _call(self, name):
        self.calls.append(name)
        if name == self.where:
            raise ZeroDivisionError(f"of {name}\nhere")

    def begin(self, *_):
        self._call("begin")

    def log(self, *_):
        self._call("log")

    def show(self, *_):
        self._call("show")

    def close(self):
        self._call("close")


@pytest.mark.parametrize("where", ["begin", "log", "show", "close"])
def test_a_tracker_that_fails_is_said_once_and_left_alone(tmp_path, where, monkeypatch):
    """And the other one goes on."""
    bad, good = Fails(where), Fails("never")
    monkeypatch.setattr(trackers, "KINDS", dict(bad=lambda: bad, good=lambda: good))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(tmp_path, 0, 3, ("bad", "good"), pictures=(2, 3))
    assert len(said) == 1
    assert str(said[0].message) == f"--report_to bad: ZeroDivisionError: of {where} here; the run goes on without it"
    assert bad.calls[-1] == where and bad.calls.count(where) == 1
    assert good.calls == ["begin", "log", "log", "show", "log", "show", "close"]
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_file_where_its_folder_should_be_stops_nothing(tmp_path, name, wandb):
    (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match=f"--report_to {name}: .*; the run goes on without it"):
        train(tmp_path, 0, 2, (name,))
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_a_full_disk_stops_only_tensorboard(tmp_path, monkeypatch):
    """/dev/full refuses each write, as a disk does."""
    told = Trackers(["tensorboard"], tmp_path, 0, settings("train"))
    told.working["tensorboard"].path = "/dev/full"
    with pytest.warns(UserWarning, match="--report_to tensorboard: OSError.*No space left") as said:
        for step in (1, 2):
            told.log(step, dict(step=step, loss=1.0))
        told.close()
    assert len(said) == 1


def test_a_signal_is_no_failure(tmp_path, monkeypatch):
    """Whoever stops the run must not be taken for a tracker's error."""
    tracker = Fails("never")
    monkeypatch.setattr(tracker, "log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(trackers, "KINDS", dict(bad=lambda: tracker))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 0, 1, ("bad",))


# ---- The commands


def test_a_package_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    remedy = r"^--report_to tensorboard: the package tensorboard is not installed; python -m pip install tensorboard$"
    with pytest.raises(UserError, match=remedy):
        check_installed(("tensorboard",))
    check_installed(None)
    assert set(trackers.KINDS) == set(flags.TRACKERS)


def test_at_the_door_before_torch_is_imported(tmp_path):
    code = "import sys; sys.modules['tensorboard'] = None\n"
    code += "from data.common import safe; from train.__main__ import main\n"
    code += f"try: safe.run(main, ['--output_dir', {str(tmp_path / 'run')!r}, '--report_to', 'tensorboard'])\n"
    code += "except SystemExit as left: print(left.code, 'torch' in sys.modules)\n"
    (tmp_path / "door.py").write_text(code)
    output = command("door", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert "tensorboard is not installed" in output and output.endswith("2 False\n")
    assert not (tmp_path / "run").exists()


def test_both_are_named_as_people_type_them(tmp_path):
    parsed = lambda *words: flags.parse("train", ["--output_dir", "x", *words]).report_to
    assert parsed("--report_to", "tensorboard", "wandb") == ("tensorboard", "wandb")
    assert parsed("--report_to", "wandb") == ("wandb",) and parsed() is None
    told = Trackers(("tensorboard", "tensorboard"), tmp_path, 0, settings("train"))
    assert len(told.working) == 1 and len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_the_real_command_with_both_gives_the_same_weights(fresh, run, wandb, monkeypatch):
    """With the sentinels of a token and a key in its environment, which stand in no byte afterwards."""
    for name, value in {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "WANDB_FAILS": "4"}.items():
        monkeypatch.setenv(name, value)
    argv = ("--output_dir", fresh, *TRAIN)
    here("train", *argv, "--max_train_steps", 2)  # without: a continuation may ask for them
    output = command("train", *argv, "--report_to", "tensorboard", "wandb")
    said = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert said == ["warning: --report_to wandb: ConnectionError: no route to host; the run goes on without it"]
    found = scalars(events(fresh))
    assert found == {(name, step): value for (name, step), value in of_the_file(fresh).items() if step > 2}
    assert [words[:2] for words in wandb() if words[0] == "log"] == [["log", 3]]
    assert torch.equal(*(load_weights(folder) for folder in (fresh, run.folder)))
    for path in fresh.rglob("*"):
        assert path.is_dir() or not {TOKEN, KEY} & {s for s in (TOKEN, KEY) if s.encode() in path.read_bytes()}


def load_weights(folder):
    from safetensors.torch import load_file

    return torch.cat([value.flatten().float() for _, value in sorted(load_file(folder / "lora.safetensors").items())])


def test_a_restart_moves_what_the_trackers_wrote(tmp_path):
    from train.same_run import put_aside

    for part in ("tensorboard", "wandb"):
        (tmp_path / part).mkdir()
    (tmp_path / "curves.png").write_text("")
    put_aside(tmp_path)
    assert {path.name for path in (tmp_path / "earlier-1").iterdir()} == {"tensorboard", "wandb", "curves.png"}
