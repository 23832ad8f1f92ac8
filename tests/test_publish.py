"""Publishing against a hub on this machine: what arrives, what never does, and every way in which it fails."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, TOKEN, TRAIN, command, here, inject_filled, one_line_error
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.utils import _http
from PIL import Image

from data.common.disk import sha256_file
from data.common.errors import MachineError, UserError
from data.common.flags import parse
from infer.card import Facts, card
from infer.told import Training
from lora import files
from lora.contents import look
from tests.hub import Hub, Repository

ID = "fox/ink"
PROMPTS = ["a red fox", "a blue: bird"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process talks to, as "fox"; waiting between retries takes no time."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.users[TOKEN] = "fox"
        yield hub
        close_session()


def write_png(path, seed):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def exported(_toy_unet, tmp_path_factory):
    """Two files of weights, the final ones and those of an earlier step."""
    import copy

    folder = tmp_path_factory.mktemp("exported")
    for name in ("final", "earlier"):
        adapters = inject_filled(copy.deepcopy(_toy_unet), seed=len(name))
        origin = files.Origin("ink", "somebody/sdxl", 64, trigger_phrase="ohwx ink")
        files.export(adapters, folder / f"{name}.safetensors", origin)
    return folder


@pytest.fixture
def finished(exported, tmp_path):
    """A run's folder with all that a run can have, and what never may be published."""
    run = tmp_path / "home of somebody" / "ink"
    (run / "compare").mkdir(parents=True)
    for name in ("lora", "lora-000200"):
        shutil.copy(exported / "final.safetensors", run / f"{name}.safetensors")
    for name in ("lora-best", "lora-000100"):
        shutil.copy(exported / "earlier.safetensors", run / f"{name}.safetensors")
    sha = sha256_file(run / "lora.safetensors")
    rows = [dict(label="base", lora=None, scale=0.0, pictures=["baseline_0.png", "baseline_1.png"])]
    rows += [dict(label="step 200", lora=dict(sha256=sha), scale=1.0, pictures=["finetuned_0.png", "finetuned_1.png"])]
    rows += [dict(label="0.5", lora=dict(sha256=sha), scale=0.5, pictures=["finetuned-2_0.png", "finetuned-2_1.png"])]
    for i, name in enumerate([name for row in rows for name in row["pictures"]] + ["grid.png"]):
        write_png(run / "compare" / name, i)
    report = dict(
        prompts=PROMPTS[:1],
        unrelated_prompts=PROMPTS[1:],
        rows=rows,
        seed=7,
        guidance_scale=5.0,
        command=shlex.join(["python", "-m", "infer", "--output_dir", "runs/ink", "--prompt", *PROMPTS, "--seed", "7"]),
    )
    (run / "compare" / "report.json").write_text(json.dumps(report))
    (run / "compare" / "report.html").write_text("<!doctype html><p>report")
    (run / "compare" / "scores.json").write_text('{"base": {"style": 0.0}, "lora": {"style": 0.93}}')
    for step, i in ((100, 0), (200, 0), (200, 1)):
        write_png(run / "samples" / f"{step:06d}_{i}.png", step + i)
    identity = dict(
        output_dir=str(run), cache_dir=str(run / "cache"), base="somebody/sdxl", rank=4, learning_rate=0.002
    )
    identity |= dict(lr_scheduler="cosine", network_weights="0123456789abcdef", max_train_steps=900)
    (run / "run.json").write_text(json.dumps(dict(cache_dir=None, identity=identity)))
    measured = dict(difference=-0.0123, standard_error=0.0011, pictures=24, loss=0.11, base_loss=0.1224)
    measured |= dict(train_difference=-0.02, train_standard_error=0.001, bands=[])
    lines = [dict(step=100, loss=1.0, held_out=measured), dict(step=150, loss=1.0)]
    lines += [dict(step=200, loss=0.9, held_out=measured | dict(difference=-0.01))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 201, "held_out"')
    for name in ("state/000200.state", "cache/names.txt", "tensorboard/events", "compare/notes.txt", "compare/.lock"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("a secret caption")
    for name in ("compare/other.png", "samples/other.png", "compare/baseline_9.png", "holiday.png"):
        write_png(run / name, 99)
    return run


def published(hub):
    return hub.repositories[ID].files


def do(run, *more, name=ID):
    here("infer.publish", run, "--hub_model_id", name, *more)


ALLOWED = {"lora.safetensors", "lora-best.safetensors", "README.md", "compare/grid.png", "compare/report.html"}
ALLOWED |= {f"compare/{name}_{i}.png" for name in ("baseline", "finetuned", "finetuned-2") for i in (0, 1)}
ALLOWED |= {"samples/000200_0.png", "samples/000200_1.png"}

# ---- What arrives


def test_all_of_the_allowed_files_arrive_once_and_nothing_else(hub, finished, capfd):
    do(finished)
    assert set(published(hub)) == ALLOWED
    for name, content in published(hub).items():
        assert name == "README.md" or content == (finished / name).read_bytes(), name
    assert len(hub.repositories[ID].lines) == 1 and not hub.repositories[ID].private
    assert hub.kinds().count("upload") == len({c for n, c in published(hub).items() if n.endswith((".png", "tensors"))})
    assert f"{hub.url}/{ID}: published" in capfd.readouterr().out


def test_the_token_is_in_no_byte(hub, finished, capfd):
    do(finished)
    written = [path.read_bytes() for path in finished.rglob("*") if path.is_file()]
    told = capfd.readouterr()
    for some in (*written, *(body for _, body in hub.requests), *published(hub).values(), *map(str.encode, told)):
        assert TOKEN.encode() not in some


def test_no_place_of_this_machine_and_no_caption_is_sent(hub, finished):
    do(finished)
    for body in (*(body for _, body in hub.requests), *published(hub).values()):
        assert b"home of somebody" not in body and b"secret caption" not in body


def test_again_nothing_is_sent(hub, finished, capfd):
    do(finished)
    hub.requests.clear()
    do(finished)
    assert not {"upload", "commit"} & set(hub.kinds()) and len(hub.repositories[ID].lines) == 1
    assert "nothing has changed since the last time" in capfd.readouterr().out


def test_only_what_changed_is_sent_and_what_is_gone_goes(hub, finished):
    do(finished)
    hub.requests.clear()
    own = {"mine.png", "compare/mine_1.png"}
    hub.repositories[ID].files |= dict.fromkeys(own, b"put there by hand")
    write_png(finished / "compare" / "grid.png", 1000)
    (finished / "lora-best.safetensors").unlink()
    do(finished)
    changes = {(line["key"], line["value"]["path"]) for line in hub.repositories[ID].lines[-1][1:]}
    assert changes == {("lfsFile", "compare/grid.png"), ("deletedFile", "lora-best.safetensors"), ("file", "README.md")}
    assert set(published(hub)) == ALLOWED - {"lora-best.safetensors"} | own


def test_private_arrives_and_a_public_one_is_not_filled(hub, finished):
    do(finished, "--private")
    assert hub.repositories[ID].private and set(published(hub)) == ALLOWED
    hub.repositories["fox/seen"] = Repository()
    with pytest.raises(UserError, match="--private: .*fox/seen is there and public"):
        do(finished, "--private", name="fox/seen")
    assert not hub.repositories["fox/seen"].files


def test_a_name_alone_is_ones_own(hub, finished):
    do(finished, name="ink")
    assert set(published(hub)) == ALLOWED


def test_pictures_of_other_weights_stay_here(hub, finished, exported, capfd):
    """They would be taken for what the published file draws."""
    shutil.copy(exported / "earlier.safetensors", finished / "lora.safetensors")
    do(finished)
    assert not [name for name in published(hub) if name.startswith("compare")]
    assert "no pictures" in capfd.readouterr().out
    (finished / "compare" / "report.json").unlink()
    do(finished)
    assert not [name for name in published(hub) if name.startswith("compare")]


def test_a_report_that_names_a_place_of_this_machine_stays_here(hub, finished, capfd):
    (finished / "compare" / "report.html").write_text(f"<pre>python -m infer --output_dir '{finished}'</pre>")
    do(finished)
    assert set(published(hub)) == ALLOWED - {"compare/report.html"}
    assert f"report.html names {finished}" in capfd.readouterr().out


def test_what_the_real_commands_made_is_published(hub, run):
    """Its comparison is of its weights, and its page names no place of this machine."""
    do(run.folder)
    pictures = {f"compare/{name}_{i}.png" for name in ("baseline", "finetuned") for i in range(2)}
    pages = {"README.md", "compare/grid.png", "compare/report.html"}
    assert published(hub).keys() - {"lora-best.safetensors"} == {"lora.safetensors"} | pages | pictures
    for content in published(hub).values():
        assert str(run.folder.parent).encode() not in content and str(ROOT).encode() not in content
    assert ModelCard(published(hub)["README.md"].decode()).data.base_model is None


# ---- How it fails


def test_a_refused_token_is_named_and_not_shown(hub, finished, monkeypatch):
    hub.users.clear()
    with pytest.raises(UserError, match=r"the hub refuses HF_TOKEN \(Unauthorized\); make one that may write") as error:
        do(finished)
    assert error.value.code == 2 and TOKEN not in str(error.value) and not hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_with-an-ümlaut")
    with pytest.raises(UserError, match="^HF_TOKEN has characters that no token has"):
        do(finished)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="hf auth login"):
        do(finished)


@pytest.mark.parametrize("there", [Repository(), Repository(private=True), None])
def test_a_repository_of_another_is_refused_before_anything_is_sent(hub, finished, there):
    hub.repositories |= {"wolf/ink": there} if there else {}
    with pytest.raises(UserError, match="wolf/ink: HF_TOKEN may not write there") as error:
        do(finished, name="wolf/ink")
    assert error.value.code == 2 and not {"preupload", "upload", "commit"} & set(hub.kinds())


def test_without_network_it_says_so(hub, finished, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as error:
        do(finished)
    assert error.value.code == 2 and not hub.requests


@pytest.mark.parametrize("name", ["a/b/c", "fox/<lora:x>", "fox/../x", "../x", "fox/a--b", "fox/a b", "x" * 97, "/x"])
def test_a_bad_id_is_refused_without_asking(hub, finished, name):
    with pytest.raises(UserError, match="^--hub_model_id .*not a name that the hub takes") as error:
        do(finished, name=name)
    assert error.value.code == 2 and not hub.requests


PLACES = ["whoami", "create", "may write", "info", "validate", "preupload", "batch", "upload", "verify", "commit"]


FEW = [("create", 503), ("upload", "cut"), ("commit", "lost")]
FAULTS = [
    pytest.param(place, fault, marks=[] if (place, fault) in FEW else pytest.mark.slow)
    for place in PLACES
    for fault in (503, "cut", "lost")
]


@pytest.mark.parametrize("place, fault", FAULTS)
def test_after_any_failure_the_same_command_finishes(hub, finished, place, fault):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    hub.faults[place] = [fault] * 100
    with pytest.raises(MachineError, match=r"nothing is lost, run (the same command|python -m infer.publish .*ink)"):
        do(finished)
    assert {
        path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path != finished / ".lock"
    } == before
    hub.faults.clear()
    stored = set(hub.storage)
    hub.requests.clear()
    do(finished)
    assert set(published(hub)) == ALLOWED
    assert not [body for kind, body in hub.requests if kind == "upload" and hashlib.sha256(body).hexdigest() in stored]


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_short_failure_is_waited_out(hub, finished, fault):
    hub.faults |= dict(preupload=[fault] * 2, batch=[fault], upload=[fault] * 3)
    do(finished)
    assert set(published(hub)) == ALLOWED


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_not_waited_for_without_end(hub, finished, monkeypatch):
    monkeypatch.setattr("infer.publish.SECONDS", 0.1)
    for place in ("whoami", "info", "commit"):
        hub.faults[place] = ["silent"]
        with pytest.raises(MachineError, match="the hub was not reached: .*timed out"):
            do(finished)
    do(finished)
    assert set(published(hub)) == ALLOWED


def test_what_is_missing_is_named_with_the_command_that_makes_it(hub, finished, tmp_path):
    with pytest.raises(UserError, match="lora.safetensors: not there; run python -m train --output_dir"):
        do(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists() and not hub.requests


def test_a_file_under_a_pictures_name_is_not_published(hub, finished, tmp_path):
    (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY-----")
    (finished / "compare" / "finetuned_1.png").unlink()
    with pytest.raises(UserError, match="finetuned_1.png: not there"):
        do(finished)
    (finished / "compare" / "finetuned_1.png").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match="finetuned_1.png: not a PNG"):
        do(finished)
    assert not published(hub)


@pytest.mark.parametrize("change", [
    lambda report: report.pop("rows"),
    lambda report: report.update(rows=[{}]),
    lambda report: report.update(prompts=[1]),
    lambda report: report["rows"][1].update(scale=None),
    lambda report: report["rows"][1].update(pictures=3),
])  # fmt: skip
def test_an_odd_report_is_refused(hub, finished, change):
    path = finished / "compare" / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    with pytest.raises(UserError, match="report.json: damaged, or of an earlier version; run python -m infer"):
        do(finished)


def test_a_report_leads_to_no_other_file(hub, finished):
    path = finished / "compare" / "report.json"
    report = json.loads(path.read_text())
    report["rows"][1]["pictures"] = ["../holiday.png", "other.png"]
    path.write_text(json.dumps(report))
    do(finished)
    assert not [name for name in published(hub) if "holiday" in name or "other" in name]


# ---- The card

HOSTILE = [
    "",
    "a: b",
    "- x\n---\n# y",
    "'\"`",
    "```\n````",
    "🦊 狐",
    "{a} [b] &c *d !e %f @g",
    "null",
    "1e3",
    "#",
    "\t",
    "? :",
]
HOSTILE += [
    "\x85\u2028",
    "\\n",
    "~",
    " spaces ",
    "---",
    "a" * 2000,
    "<script>",
    "|",
    "key: |\n  text",
    "\ufeffx",
    "\x1b[0m",
]


def a_card(exported, settings, **facts):
    weights = look(exported / "final.safetensors")
    return card(Facts(ID, "ink", weights, ("lora.safetensors",), training=Training(settings), **facts))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_the_head_is_read_back_whatever_the_prompt(exported, text):
    weights = look(exported / "final.safetensors")
    weights.metadata["modelspec.trigger_phrase"] = text
    facts = dict(gallery=((text, "a.png"),), training=Training(dict(rank=4)), command=shlex.join([text]))
    read = ModelCard(card(Facts(ID, "ink", weights, ("lora.safetensors",), **facts)))
    line = " ".join(text.split())
    assert read.data.widget == [{"text": line or "-", "output": {"url": "a.png"}}]
    assert read.data.get("instance_prompt") == (line or None)
    assert read.data.tags[:4] == ["text-to-image", "diffusers", "lora", "template:sd-lora"]
    assert read.data.library_name == "diffusers" and read.data.base_model is None and read.data.license is None
    assert read.text.count("\n## How to use it\n") == 1 and read.text.count("\n# ink\n") == 1


@pytest.mark.parametrize(
    "base, named", [("somebody/sdxl", True), ("local-0123456789abcdef", False), ("/home/x/y", False)]
)
def test_a_base_is_named_by_its_hub_id_alone(exported, base, named):
    read = ModelCard(a_card(exported, dict(base=base)))
    assert read.data.base_model == (base if named else None)
    assert (base in read.text) == named


def test_no_prompt_ends_a_block_of_code(exported):
    """What stands behind it would be headings, links and pictures of somebody else's."""
    prompt = "x\n```\n# owned\n````\n## owned"
    text = a_card(exported, dict(rank=4), command=shlex.join(["python", prompt]))
    blocks = re.compile(r"^(`{3,})[^`\n]*\n.*?^\1`*$", re.M | re.S)
    assert text.count("owned") == 2 and "owned" not in blocks.sub("", text)


def test_the_licence_is_the_bases_where_it_is_known(exported):
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    assert ModelCard(a_card(exported, dict(base=sdxl))).data.license == "openrail++"
    assert ModelCard(a_card(exported, dict(base="somebody/sdxl"))).data.license is None


def test_the_card_tells_what_the_run_was(hub, finished):
    do(finished)
    text = published(hub)["README.md"].decode()
    assert "A LoRA of rank 4, alpha 6, for [somebody/sdxl]" in text and "200 steps" in text
    assert "--learning_rate 0.002 \\\n  --lr_scheduler cosine" in text and "--network_weights FILE.safetensors" in text
    assert "| --learning_rate | 0.002 |" in text and "0123456789abcdef" not in text
    assert "python -m infer --output_dir runs/ink --prompt 'a red fox' 'a blue: bird' --seed 7\n" in text
    assert "Lowest at step 100: on 24 held-out pictures the loss is 0.0123 ± 0.0011 below the base's" in text
    assert "| style | 0.000 | 0.930 |" in text and "`ohwx ink`" in text
    head = yaml.safe_load(text.split("---")[1])
    assert [shown["output"]["url"] for shown in head["widget"]] == ["compare/finetuned_0.png"]
    assert head["instance_prompt"] == "ohwx ink" and head["base_model"] == "somebody/sdxl"


def test_the_commands_of_the_card_are_commands(hub, finished):
    """Each is parsed as the real one would."""
    do(finished)
    text = published(hub)["README.md"].decode()
    found = [shlex.split(line) for line in text.replace("\\\n", "").splitlines() if line.startswith("python -m ")]
    assert [words[2] for words in found] == ["data.precompute", "train", "infer"]
    for words in found:
        settings = parse(words[2], words[3:])
        assert settings.output_dir == "runs/ink"
    assert parse("train", found[1][3:]).rank == 4


# ---- Flags


@pytest.mark.parametrize("name", ["--hub_token", "--hub-token", "--token", "--hub_token=" + TOKEN])
@pytest.mark.parametrize("which", ["train", "infer.publish"])
def test_a_token_on_the_command_line_is_not_taken_and_not_shown(which, name, capfd):
    with pytest.raises(UserError, match="set HF_TOKEN, or log in once with: hf auth login") as error:
        parse(which, ["x", "--output_dir", "x", *([name] if "=" in name else [name, TOKEN])])
    assert TOKEN not in str(error.value) and TOKEN not in "".join(capfd.readouterr())


# ---- The real commands


def environment(hub, tmp_path, **more):
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return env | dict(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1") | more


def test_the_real_command_imports_no_torch(hub, finished, tmp_path):
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules]))\n"
        "runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=True)\n"
    )
    words = [sys.executable, "-c", code, "infer.publish", str(finished), "--hub_model_id", ID]
    code = code.replace("sys.argv[1]", "sys.argv.pop(1)")
    words[2] = code
    ended = subprocess.run(words, cwd=ROOT, env=environment(hub, tmp_path), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("published\n[]\n") and set(published(hub)) == ALLOWED
    assert TOKEN not in ended.stdout + ended.stderr


def test_a_signal_behind_the_last_step_ends_at_once():
    """Nothing is left to save while a finished run is published."""
    code = (
        "import os, signal\n"
        "from data.common import safe\n"
        "def main(argv):\n"
        "    safe.Signals()\n"
        "    safe.end_at_once()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "safe.run(main, [])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 130 and ended.stderr == "error: interrupted; run the same command to go on\n"


@pytest.mark.slow
def test_files_go_in_pieces_where_the_hub_takes_them_so(hub, finished, tmp_path):
    """By hf_xet, which is how huggingface.co has it."""
    env = environment(hub, tmp_path)
    del env["HF_HUB_DISABLE_XET"]
    hub.faults["xet"] = [403]
    output = command("infer.publish", finished, "--hub_model_id", ID, code=3, env=env)
    assert "nothing is lost, run python -m infer.publish" in one_line_error(output) and not published(hub)
    again = command("infer.publish", finished, "--hub_model_id", ID, env=env)
    assert set(published(hub)) == ALLOWED and TOKEN not in output + again
    large = [finished / name for name, content in published(hub).items() if isinstance(content, str)]
    assert len(large) == len(ALLOWED) - 2 and all(
        published(hub)[path.relative_to(finished).as_posix()] == sha256_file(path) for path in large
    )
    assert sum(hub.pieces) == sum(path.stat().st_size for path in large)
    assert "nothing has changed" in command("infer.publish", finished, "--hub_model_id", ID, env=env)


@pytest.mark.slow
def test_train_asks_before_the_first_step_and_publishes_after_the_last(hub, cached, tmp_path):
    run = tmp_path / "run"
    words = ["--output_dir", run, "--cache_dir", cached / "cache", *TRAIN, "--push_to_hub", "--hub_model_id", ID]
    env = environment(hub, tmp_path)
    refused = command("train", *words, code=2, env=env | dict(HF_TOKEN="hf_another"))
    assert "the hub refuses HF_TOKEN" in one_line_error(refused)
    assert not (run / "metrics.jsonl").exists() and not hub.repositories
    hub.faults["commit"] = [503]
    output = command("train", *words, code=3, env=env)
    assert f"run python -m infer.publish {run} --hub_model_id {ID}" in one_line_error(output)
    assert (run / "lora.safetensors").exists() and not published(hub)
    command("infer.publish", run, "--hub_model_id", ID, env=env)
    assert published(hub)["lora.safetensors"] == (run / "lora.safetensors").read_bytes()
    assert set(published(hub)) == {"lora.safetensors", "README.md"}
    again = command("train", *words, env=env)  # finished, and published already
    assert "nothing has changed since the last time" in again
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in refused + output + again


def test_the_weights_are_the_same_whether_they_are_published_or_not():
    """The flags may differ between a run and its continuation, and are no part of what is trained."""
    from train.same_run import MAY_CHANGE

    assert {"push_to_hub", "hub_model_id", "private"} <= MAY_CHANGE
