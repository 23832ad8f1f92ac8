"""train/colab.ipynb: it runs, and what a disconnect costs. Colab and Kaggle are folders here."""

import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import PIPELINE, ROOT, TOKEN, lines

PATH = ROOT / "train" / "colab.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


# ---- The file


def test_the_file_changes_only_where_somebody_changed_it():
    """No outputs, and one way to write it, so that a change can be read as a difference of lines."""
    assert json.dumps(NOTEBOOK, indent=1, sort_keys=True, ensure_ascii=False) + "\n" == PATH.read_text()
    assert PATH.stat().st_size < 30_000
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_a_user_sees_a_form_and_every_field_of_it_is_used():
    assert all(cell["metadata"] == {"cellView": "form"} for cell in CODE)
    assert all("".join(cell["source"]).startswith("# @title ") for cell in CODE)
    form = [line for line in CELLS["form"].splitlines() if not line.startswith("# @")]
    assert all(re.fullmatch(r'\w+ = (".*"|\d+|False)  # @param (\{type:"\w+"\}|\[.*\])', line) for line in form), form
    assigned = {node.id for node in ast.walk(ast.parse(CELLS["form"])) if isinstance(node, ast.Name)}
    rest = "\n".join("".join(cell["source"]) for cell in CODE if cell["id"] != "form")
    assert not assigned - {node.id for node in ast.walk(ast.parse(rest)) if isinstance(node, ast.Name)}


# ---- What it keeps and brings back


class Machine:
    """Colab's or Kaggle's machine in a folder, with the code, a GPU that is a name, and this Python's packages."""

    def __init__(self, folder, monkeypatch, place="content"):
        self.drive, self.folder = folder / "content" / "drive" / "MyDrive", folder
        self.work = folder / dict(content="content", kaggle="tmp")[place]
        colab = folder / "packages" / "google" / "colab"
        colab.mkdir(parents=True)
        (colab.parent / "__init__.py").touch(), (colab / "__init__.py").touch()
        (colab / "drive.py").write_text("mount = lambda path: None\n")
        (colab / "files.py").write_text("download = lambda path: print('downloaded', path)\n")
        (colab / "userdata.py").write_text(f"get = dict(HF_TOKEN={TOKEN!r}).get\n")
        (folder / "packages" / "nvidia-smi").touch(0o755)
        self.drive.mkdir(parents=True)
        (folder / "kaggle" / "working").mkdir(parents=True), (folder / "kaggle" / "input").mkdir()
        self.renew()
        monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))
        monkeypatch.setenv("PATH", f"{folder / 'packages'}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHON", sys.executable)
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")  # on Kaggle as well, whose image may come from Colab's
        if place == "kaggle":
            monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")

    def renew(self):
        """Another machine: only Drive is what it was."""
        self.drive.parent.rename(self.folder / "drive")
        shutil.rmtree(self.work, ignore_errors=True), shutil.rmtree(self.folder / "content", ignore_errors=True)
        self.work.mkdir(exist_ok=True), (self.folder / "content").mkdir(exist_ok=True)
        (self.folder / "drive").rename(self.drive.parent)
        (self.work / "barelora").symlink_to(ROOT)

    def sources(self, **values):
        """{id: source} of the code cells, with the form filled in and the machine's folders below this one."""
        sources = {cell["id"]: CELLS[cell["id"]] for cell in CODE}
        for name, value in values.items():
            sources["form"], found = re.subn(
                rf"(?m)^{name} = .*?(?=  # @param)", f"{name} = {value!r}", sources["form"]
            )
            assert found == 1, name
        sources["set-up"] = re.sub('"(?=/(content|kaggle|tmp))', f'"{self.folder}', sources["set-up"])
        return sources


def set_up(machine, **values):
    """Run the form and the set-up in here. -> their names"""
    names, sources = {}, machine.sources(**values)
    exec(sources["form"], names)
    exec(sources["set-up"], names)
    return names


@pytest.fixture
def colab(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in [name for name in sys.modules if name.split(".")[0] == "google"]:
        monkeypatch.delitem(sys.modules, name)
    return machine


def train(run, step, every=10):
    """The files that a training which is at `step` has, in the order in which it writes them."""
    (run / "state").mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "rows.npz"):
        (run / name).write_text(name)
    (run / "metrics.jsonl").write_text("".join(f"{i + 1}\n" for i in range(step)))
    there = [int(path.stem[5:]) for path in run.glob("lora-*.safetensors")]
    for done in range(max(there, default=0) + every, step + 1, every):
        (run / f"lora-{done:06d}.safetensors").write_text(f"weights {done}")
        (run / "state" / f"{done:06d}.state").write_text(f"state {done}")
        (run / "state" / f"{done - 2 * every:06d}.state").unlink(missing_ok=True)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_another_machine_needs_is_on_drive_after_each_save(colab, capsys):
    names = set_up(colab, name="cats")
    run, kept = names["RUN"], colab.drive / "barelora" / "cats"
    for step in (10, 25, 47):
        train(run, step)
        names["keep"]()
        last = [f"{n // 10 * 10:06d}" for n in (step - 10, step) if n >= 10]
        wanted = {"run.json", "rows.npz", "metrics.jsonl"}
        wanted |= {f"lora-{n}.safetensors" for n in last} | {f"state/{n}.state" for n in last}
        assert set(content(kept)) == wanted
        assert f"{last[-1]}.state" in capsys.readouterr().out
    assert lines(kept / "metrics.jsonl") >= 40  # all that the state counts
    names["keep"]()
    assert capsys.readouterr().out == ""  # nothing is new
    (run / "lora.safetensors").write_text("done")
    (run / "lora-best.safetensors").write_text("best")
    names["keep"]()
    before = content(kept)
    assert before["lora.safetensors"] == b"done" and before["lora-best.safetensors"] == b"best" and len(before) == 9

    names = set_up(colab, name="cats")  # the same machine, run again: what was removed on Drive is not copied again
    capsys.readouterr(), names["keep"]()
    assert "lora-000010" not in capsys.readouterr().out and content(kept) == before

    colab.renew()
    names = set_up(colab, name="cats")
    assert content(names["RUN"]) == before
    capsys.readouterr(), names["keep"]()
    assert capsys.readouterr().out == "" and content(kept) == before


def test_another_name_is_another_run(colab):
    names = set_up(colab, name="cats")
    train(names["RUN"], 10), names["keep"]()
    assert content(set_up(colab, name="dogs")["RUN"]) == {}


@pytest.mark.slow
def test_a_copy_that_is_cut_off_is_not_taken_for_a_save(colab, monkeypatch):
    """Wherever a machine ends, the next one finds a run that can go on: no state without what belongs to it."""
    for copies in itertools.count():
        names = set_up(colab, name=f"run {copies}")
        train(names["RUN"], 20), names["keep"]()
        train(names["RUN"], 40)
        real, left = shutil.copyfile, iter(range(copies))

        def copyfile(source, target):
            if next(left, None) is None:
                target.write_bytes(b"half")
                raise OSError("Transport endpoint is not connected")
            real(source, target)

        monkeypatch.setattr(shutil, "copyfile", copyfile)
        with contextlib.suppress(OSError):
            names["keep"]()
            assert copies == 7
        monkeypatch.setattr(shutil, "copyfile", real)
        kept = content(names["KEPT"])
        states = [int(name[6:12]) for name in kept if name.endswith(".state")]
        assert states and all(kept[f"state/{n:06d}.state"] == f"state {n}".encode() for n in states)
        assert len(kept["metrics.jsonl"].split()) >= max(states) and f"lora-{max(states):06d}.safetensors" in kept
        names["keep"]()  # the next try
        assert max(name for name in content(names["KEPT"]) if name.endswith(".state")) == "state/000040.state"
        if copies == 7:
            break


def test_what_is_removed_takes_no_space_in_drives_bin(colab):
    names = set_up(colab, saves_kept=1)
    train(names["RUN"], 10), names["keep"]()
    bin = colab.folder / "bin"
    os.link(names["KEPT"] / "state" / "000010.state", bin)
    train(names["RUN"], 20), names["keep"]()
    assert bin.read_bytes() == b"" and [path.name for path in (names["KEPT"] / "state").iterdir()] == ["000020.state"]


def test_a_state_that_train_removes_meanwhile_is_passed_over(colab, monkeypatch):
    names, real = set_up(colab), shutil.copyfile
    train(names["RUN"], 20)

    def copyfile(source, target):
        if source.name == "lora-000020.safetensors":
            train(names["RUN"], 30)  # 000010.state goes
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    names["keep"]()
    assert [path.name for path in (names["KEPT"] / "state").iterdir()] == ["000020.state"]
    names["keep"]()
    assert sorted(path.name for path in (names["KEPT"] / "state").iterdir()) == ["000020.state", "000030.state"]


def test_a_full_drive_ends_no_training(colab, monkeypatch, capsys):
    names, done = set_up(colab), threading.Event()
    train(names["RUN"], 10)
    waits = iter([False, True, True])
    monkeypatch.setattr(done, "wait", lambda seconds: next(waits))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    names["keep_while_it_trains"](done)
    assert re.search("not copied to Drive: .*No space left on device", capsys.readouterr().out)


# ---- Where it runs


@pytest.mark.parametrize("cards, gpus", [(0, None), (1, None), (2, 2), (3, 2), (8, 4)])
def test_all_gpus_train(cards, gpus, colab, monkeypatch):
    """Kaggle's two T4s share a step's four micro-steps; three could not."""
    names, commands, glob = set_up(colab, name="cats"), [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda *a: [0] * cards if a[0] == Path("/dev") else glob(*a))
    names["run"] = lambda *words: commands.append([str(word) for word in words])
    exec(colab.sources()["train"], names)
    launched = commands[0][1 : commands[0].index("train") - 1]
    assert launched == (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus else [])


def test_kaggles_run_is_in_its_output_and_goes_on_from_an_earlier_one(tmp_path, monkeypatch):
    kaggle = Machine(tmp_path, monkeypatch, "kaggle")
    names = set_up(kaggle, name="cats")
    assert names["RUN"] == tmp_path / "kaggle" / "working" / "cats"
    train(names["RUN"], 30), names["keep"]()
    before = content(names["RUN"])
    assert before and not content(kaggle.drive)
    shutil.rmtree(names["RUN"])
    for newest in "abc":  # of several versions' outputs the one that is furthest
        for version in "abc":
            train(tmp_path / "kaggle" / "input" / version / f"cats {newest}", 30 if version == newest else 20)
        assert content(set_up(kaggle, name=f"cats {newest}")["RUN"]) == before
    assert not (tmp_path / "kaggle" / "working" / "barelora").exists()  # thousands of files of no use to anybody


@pytest.mark.parametrize(
    "values, broken, line",
    [
        (dict(name="a/b"), None, "name: 'a/b' must be letters"),
        ({}, "nvidia-smi", "there is no GPU here; choose Runtime → Change runtime type → T4 GPU"),
        ({}, "barelora", "write the address of the code into the form's field `repository`"),
        (dict(repository="/nowhere"), "barelora", "the lines above say why"),
    ],
)
def test_what_cannot_go_on_says_so_in_one_line(values, broken, line, colab, monkeypatch):
    (colab.folder / "packages" / "nvidia-smi").unlink() if broken == "nvidia-smi" else None
    (colab.work / "barelora").unlink() if broken == "barelora" else None
    monkeypatch.setenv("PATH", f"{colab.folder / 'packages'}:/usr/bin:/bin")
    with pytest.raises(Exception, match=re.escape(line)) as stop:
        set_up(colab, **values)
    (shown,) = stop.value._render_traceback_()  # IPython's way to ask for what it shows
    assert shown.startswith("Stopped: ") and "\n" not in shown


def test_the_code_is_fetched_once(colab, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "Makefile").write_text("setup:\n\t@echo $(PYTHON) >> installed\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "code"]):
        subprocess.run(["git", *words], cwd=tmp_path / "code", check=True)
    (colab.work / "barelora").unlink()
    for times in (1, 2):
        project = set_up(colab, repository=str(tmp_path / "code"))["PROJECT"]
        assert (project / "installed").read_text() == f"{sys.executable}\n" * times


@pytest.mark.parametrize("form", ["folder", "zip", "nested"])
def test_pictures_come_as_people_have_them(form, colab, pictures):
    """A Mac puts the folder itself into the zip, and files of its own beside it."""
    if form == "folder":
        shutil.copytree(pictures, colab.drive / "mine")
    else:
        root = pictures.parent if form == "nested" else pictures
        shutil.make_archive(colab.drive / "mine", "zip", root, "pictures" if form == "nested" else None)
        with zipfile.ZipFile(colab.drive / "mine.zip", "a") as file:
            file.writestr("__MACOSX/pictures/._metadata.jsonl", b"\0")
    names, calls = set_up(colab, pictures="mine" if form == "folder" else "mine.zip", trigger_word="ink style"), []
    names["run"] = lambda *words: calls.append([str(word) for word in words])
    exec(CELLS["precompute"], names)
    (words,) = calls
    source = words[words.index("--train_data_dir") + 1]
    assert source.startswith(str(colab.work)) and os.path.exists(f"{source}/metadata.jsonl")
    assert words[words.index("--instance_prompt") + 1] == "ink style" and "--model_config" not in words


def test_a_base_on_drive_is_copied_and_one_of_the_hub_is_not(colab):
    (colab.drive / "models").mkdir()
    (colab.drive / "models" / "mine.safetensors").write_text("tensors")
    names = set_up(colab)
    assert names["here"]("models/mine.safetensors", "base").read_text() == "tensors"
    (colab.drive / "models" / "mine.safetensors").write_text("other tensors")
    assert names["here"]("models/mine.safetensors", "base").read_text() == "other tensors"
    assert names["here"]("stabilityai/stable-diffusion-xl-base-1.0", "base").count("/") == 1
    with pytest.raises(Exception, match="base: .*models/typo.safetensors is not there"):
        names["here"]("models/typo.safetensors", "base")


# ---- All of it


WORK = """
import time
from data.common.safe import Signals
stop = Signals()
print("training", flush=True)
while not stop.received:
    time.sleep(0.01)
print("saved")
raise SystemExit(130)
"""


@pytest.mark.slow
def test_the_stop_button_lets_a_command_save(colab):
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    begun = colab.folder / "begun"
    sources = colab.sources()
    work = f"open({str(begun)!r}, 'w')\nrun(PYTHON, '-c', {WORK!r})"
    cells = [nbformat.v4.new_code_cell(source) for source in (sources["form"], sources["set-up"], work)]
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=60, kernel_name="python3")

    def press():
        while not begun.exists() or "training" not in str(cells[2].outputs):
            time.sleep(0.01)
        os.killpg(client.km.provisioner.pid, signal.SIGINT)  # as Jupyter does it

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(CellExecutionError, match="Stopped: what was done is kept, Run all goes on from there"):
        client.execute()
    assert "saved" in str(cells[2].outputs)


def run_all(machine, until=None, **values):
    """Run all on the machine; until() true ends it as a disconnect does. -> all that the cells printed"""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    notebook = nbformat.read(PATH, 4)
    for cell in notebook.cells:
        cell.source = machine.sources(**values).get(cell.id, cell.source)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": machine.work}}
    )

    def disconnect():
        while not until():
            time.sleep(0.01)
        os.killpg(client.km.provisioner.pid, signal.SIGKILL)

    if until:
        threading.Thread(target=disconnect, daemon=True).start()
    with pytest.raises(DeadKernelError) if until else contextlib.nullcontext():
        client.execute()
    return json.dumps([cell.get("outputs") for cell in notebook.cells])


@pytest.mark.slow
def test_run_all_again_after_a_disconnect_ends_with_the_same_bytes(pictures, tmp_path, monkeypatch):
    """The machine is gone in the middle of a training. What is on Drive is all that the next one has."""
    values = dict(name="ink", pictures="mine.zip", base=str(PIPELINE), vae="", trigger_word="ink", resolution=64)
    values |= dict(rank=4, length=40, save_every=5, prompts="a red fox | a blue bird", use_hf_token=True)
    values |= dict(precompute_flags="--mixed_precision no", train_flags="--mixed_precision no --learning_rate 1e-2")
    found = []
    for kind in ("whole", "cut"):
        with monkeypatch.context() as patch:
            machine = Machine(tmp_path / "machine", patch)
            shutil.make_archive(machine.drive / "mine", "zip", pictures)
            kept = machine.drive / "barelora" / "ink"
            if kind == "cut":
                run_all(machine, lambda: any(kept.glob("state/*.state")), **values)
                last = max(int(path.stem) for path in kept.glob("state/*.state"))
                assert last < 40 and not (kept / "lora.safetensors").exists()
                machine.renew()
            printed = run_all(machine, **values)
        assert TOKEN not in printed and "downloaded" in printed and "image/png" in printed
        found.append(content(kept))
        shutil.rmtree(tmp_path / "machine")
    whole, cut = found
    assert f"of weights; from step {last}" in printed
    assert whole.keys() == cut.keys() and "state/000040.state" in whole and "grid.png" in whole
    assert not any(TOKEN.encode() in data for data in cut.values())
    for name in whole.keys() - {"metrics.jsonl"}:
        assert whole[name] == cut[name], name
    steps, again = ([json.loads(line) for line in files["metrics.jsonl"].splitlines()] for files in (whole, cut))
    for name in ("step", "loss", "grad_norm"):
        assert [line[name] for line in steps] == [line[name] for line in again]
