"""A minute of what nobody would write by hand: every JSON that a user can hand in with one edit, broken pictures, odd
flags. Whatever comes in, each command keeps its contract, which `keeps_the_contract` spells out.

The edits follow from SEED alone. How many there are depends on the machine, because each kind has its SECONDS; `pytest
-rP` shows the count and what the commands answered.
"""

import collections
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import PIPELINE, PRECOMPUTE, TRAIN, here, main_of, one_line_error
from PIL import Image

from data.cache import _checksum
from data.common import flags, safe
from data.models.schema import CONFIGS

SEED = 1
SECONDS = float(os.environ.get("FUZZ_SECONDS", "8"))  # for each kind
HANG, STOP = 60, 10  # seconds: what no command takes without an end; what a training gets before it is told to stop
MEMORY = 2 * 2**30
PROGRESS = r"(captions|pictures|train|compare): [\d,]+ of [\d,]+ "
PICTURES = ["--resolution", 64, "--mixed_precision", "no"]


# ---- One try


def attempt(name, argv, folder):
    """Run a command in a process forked from this one, in an empty folder. -> (exit code, stdout, stderr, peak bytes)

    One that does not end is told to stop after STOP seconds, and killed after HANG.
    """
    logs = [folder / "stdout", folder / "stderr"]
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for descriptor, log in enumerate(logs, 1):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1, errors="backslashreplace")
            os.chdir(folder / "here")
            limit = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + 2 * MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            safe.run(main_of(name), [str(word) for word in argv])
            code = 0
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    began, told = time.monotonic(), False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        passed = time.monotonic() - began
        if passed > STOP and not told:
            told = True
            os.kill(pid, signal.SIGTERM)
        if passed > HANG:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    _, status, usage = ended
    out, err = (log.read_text(errors="replace") for log in logs)
    return os.waitstatus_to_exitcode(status), out, err, usage.ru_maxrss * 1024


def keeps_the_contract(code, out, err, peak):
    """Exit 0, 2, 3, 4, 130 or 143; one line more than progress on stderr; no traceback; no hang; less than 2 GiB."""
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not re.match(PROGRESS, line)]
    lines = [line for line in lines if line != "no GPU here: the CPU computes"]
    assert "Traceback" not in out + err, "a traceback"
    assert code in (0, 2, 3, 4, 130, 143), f"exit code {code}"
    assert len(lines) <= 1, "more than one line on stderr"
    assert code == 0 or (lines and lines[0].startswith("error: ") and len(lines[0]) < 2000), "no short error line"
    assert peak < MEMORY, f"{peak / 2**30:.1f} GiB"


class Fuzz:
    """A folder with a model, pictures and a finished run, and the tries on it."""

    def __init__(self, kind, folder, run):
        self.kind, self.folder, self.random = kind, folder, random.Random(f"{SEED} {kind}")
        self.answers, self.broken, self.began = collections.Counter(), [], time.monotonic()
        (folder / "here").mkdir(parents=True)
        shutil.copytree(PIPELINE, folder / "model")
        shutil.copytree(run, folder / "run")
        self.model, self.run = folder / "model", folder / "run"

    def __iter__(self):
        """Count tries until the time is over."""
        return itertools.takewhile(lambda _: time.monotonic() - self.began < SECONDS, itertools.count())

    def tried(self, what, name, *argv):
        """-> the exit code; a broken contract is kept for the end"""
        before = self.outside()
        result = attempt(name, argv, self.folder)
        try:
            keeps_the_contract(*result)
            assert self.outside() == before, "a file outside the run"
        except AssertionError as error:
            self.broken.append(f"{what}: {str(error).splitlines()[0]}\n  {name} {argv}\n  {result[2][-1500:]}")
        self.answers[f"{name} {result[0]}"] += 1
        return result[0]

    def outside(self):
        """All that the commands must leave as it is."""
        return {
            (path, path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.folder.rglob("*")
            if self.run not in (path, *path.parents) and path.name not in ("stdout", "stderr") and not path.is_dir()
        }

    def done(self):
        print(f"{self.kind}: {self.answers.total()} tries, {dict(self.answers)}")
        assert self.answers.total() > 0
        assert not self.broken, f"{len(self.broken)} of {self.answers.total()}:\n" + "\n".join(self.broken[:20])


@pytest.fixture
def fuzz(request, tmp_path_factory, finished):
    fuzz = Fuzz(request.node.name, tmp_path_factory.mktemp("fuzz"), finished)
    yield fuzz
    fuzz.done()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with four pictures through all commands, in this process: what they import is there when it is forked."""
    folder = tmp_path_factory.mktemp("finished")
    write_pictures(folder / "run" / "pictures", 4)
    base = ["--output_dir", folder / "run"]
    data = ["--train_data_dir", folder / "run" / "pictures", "--pretrained_model_name_or_path", PIPELINE]
    here("data.precompute", *base, *data, *PICTURES)
    here("train", *base, *TRAIN, "--max_train_steps", 2)
    here("infer", *base, "--prompt", "a fox", "--num_inference_steps", 1)
    return folder / "run"


def write_pictures(folder, count):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 72, 3), np.uint8)
    for i in range(count):
        Image.fromarray(pixels[i]).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


# ---- Edits


DEEP = "@deep"
ODD = [None, True, False, -1, 0, 1, 2, 7, 3.5, 1e-300, 1e308, float("nan"), float("-inf"), 2**31, 2**63, -(2**64)]
ODD += [10**400, "", "x", "../x", "/etc/passwd", "a\nb", "\0", "\ud800", "x" * 10**5, [], {}, [None], {"a": 1}, DEEP]
ODD += [[1] * 10**5, [4, 4, 4], "float16", "linear", "NaN"]
ODD += ["F8_E4M3", "BF16", "F64", "I64", "U8", "BOOL"]


def places(value, path=()):
    """Paths to everything inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inside:
        yield from places(part, (*path, name))


def edited(document, rng):
    """-> (what was done, the JSON text of `document` after one edit)"""
    document = json.loads(json.dumps(document))
    *path, last = rng.choice([path for path in places(document) if path])
    parent = document
    for name in path:
        parent = parent[name]
    where, how = (
        "/".join(map(str, [*path, last])),
        rng.choice(["replace", "replace", "replace", "remove", "add", "text"]),
    )
    if how == "replace":
        parent[last] = rng.choice([*ODD, rng.choice(list(parent.values()) if isinstance(parent, dict) else parent)])
    elif how == "remove":
        del parent[last]
    elif how == "add" and isinstance(parent, dict):
        parent[f"new_{last}"] = rng.choice(ODD)
    text = json.dumps(document).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    if how == "text":
        at = rng.randrange(len(text))
        whole = ["", "null", text[:at], text + text, "[" + text + "]", "\ufeff" + text, '{"a": 1, "a": 2, ' + text[1:]]
        text = rng.choice([*whole, *(text[:at] + sign + text[at + 1 :] for sign in '{}[],:"\\0é')])
    return f"{how} {where}", text


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def flipped(data, rng):
    """Bytes with one fault."""
    how = rng.choice(["byte", "byte", "cut", "insert", "several"])
    at = rng.randrange(len(data))
    if how == "cut":
        return data[:at]
    if how == "insert":
        return data[:at] + rng.randbytes(rng.choice([1, 4, 1000])) + data[at:]
    changed = bytearray(data)
    for _ in range(1 if how == "byte" else 20):
        changed[rng.randrange(len(data))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    return bytes(changed)


# ---- The kinds


@pytest.mark.slow
def test_configs_of_a_model(fuzz):
    """Precompute, and what it lets in is trained and drawn with as well."""
    for _ in fuzz:
        name = fuzz.random.choice(sorted(CONFIGS))
        path = fuzz.model / ("" if name == "model_index" else name) / CONFIGS[name][0]
        kept = path.read_bytes()
        what, text = edited(json.loads(kept), fuzz.random)
        write(path, text)
        through(fuzz, f"{name}: {what}", name)
        path.write_bytes(kept)


@pytest.mark.slow
def test_vocabularies_and_weights_of_a_model(fuzz):
    names = ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"]
    names += [str(path.relative_to(PIPELINE)) for path in sorted(PIPELINE.rglob("*.safetensors"))]
    for _ in fuzz:
        path = fuzz.model / fuzz.random.choice(names)
        kept = path.read_bytes()
        if path.suffix == ".json" and fuzz.random.random() < 0.8:
            what, text = edited(json.loads(kept), fuzz.random)
            write(path, text)
        elif path.suffix == ".safetensors" and fuzz.random.random() < 0.8:
            what = with_header(path, kept, fuzz.random)
        else:
            what = "bytes"
            path.write_bytes(flipped(kept, fuzz.random))
        through(fuzz, f"{path.parent.name}: {what}", path.parent.name)
        path.write_bytes(kept)


def through(fuzz, what, name):
    """Precompute, and where more than the text depends on what was edited the other commands, as long as they go on."""
    run = fuzz.run / "again"
    data = ["--train_data_dir", fuzz.run / "pictures", "--pretrained_model_name_or_path", fuzz.model, *PICTURES]
    line = [("data.precompute", data), ("train", [*TRAIN, "--max_train_steps", 1])]
    line += [("infer", ["--prompt", "a fox", "--num_inference_steps", 1])]
    for command, argv in line[:1] if name.startswith("t") else line:
        if fuzz.tried(what, command, "--output_dir", run, *argv):
            break
    shutil.rmtree(run, ignore_errors=True)


def with_header(path, kept, rng):
    """Write a safetensors file with one edit of its header. -> what was done"""
    (size,) = struct.unpack("<Q", kept[:8])
    what, text = edited(json.loads(kept[8 : 8 + size]), rng)
    blob = text.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(blob)) + blob + kept[8 + size :])
    return what


@pytest.mark.slow
def test_captions_and_pictures(fuzz):
    """metadata.jsonl with one edit, and pictures of every format with faults."""
    folder = fuzz.folder / "pictures"
    originals = pictures_of_every_format()
    for i in fuzz:
        shutil.rmtree(folder, ignore_errors=True)
        write_pictures(folder, 4)
        skip = ["--skip_bad"] if fuzz.random.random() < 0.5 else []
        if i % 2:
            lines = (folder / "metadata.jsonl").read_text().splitlines()
            what, lines[1] = edited(json.loads(lines[1]), fuzz.random)
            write(folder / "metadata.jsonl", "\n".join(lines) + "\n")
        else:
            what = []
            for suffix in fuzz.random.sample(sorted(originals), 4):
                what.append(suffix)
                (folder / f"broken.{suffix}").write_bytes(flipped(originals[suffix], fuzz.random))
                (folder / f"broken.{suffix}.txt").write_text("a caption")
            (folder / "metadata.jsonl").unlink()
            for picture in folder.iterdir():
                picture.with_suffix(".txt").write_text(picture.name)
        run = fuzz.run / "again"
        flags = ["--train_data_dir", folder, "--pretrained_model_name_or_path", fuzz.model, *PICTURES, *skip]
        fuzz.tried(what, "data.precompute", "--output_dir", run, *flags)
        shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def pictures_of_every_format():
    pixels = np.random.default_rng(1).integers(0, 256, (72, 80, 3), np.uint8)
    found = {}
    for suffix, kind, mode in [
        ("png", "PNG", "RGB"),
        ("apng", "PNG", "P"),
        ("jpg", "JPEG", "RGB"),
        ("jpeg", "JPEG", "CMYK"),
        ("webp", "WEBP", "RGBA"),
        ("gif", "GIF", "P"),
        ("bmp", "BMP", "RGB"),
        ("tif", "TIFF", "RGB"),
        ("tiff", "TIFF", "I;16"),
    ]:
        blob = io.BytesIO()
        array = pixels[..., 0].astype(np.uint16) if mode == "I;16" else pixels
        Image.fromarray(array).convert(mode).save(blob, kind)
        found[suffix] = blob.getvalue()
    return found


@pytest.mark.slow
def test_the_caches_manifest(fuzz):
    path = fuzz.run / "cache" / "manifest.json"
    kept = path.read_bytes()
    for i in fuzz:
        manifest = json.loads(kept)
        what, text = edited(manifest, fuzz.random)
        if i % 4:  # as a program of one's own would write it
            try:
                changed = json.loads(text)
                changed.pop("checksum", None)
                text = json.dumps(changed | {"checksum": _checksum(changed)})
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass  # no JSON any more, or no object: left as it is
        write(path, text)
        fuzz.tried(what, "train", "--output_dir", fuzz.run, *TRAIN, "--max_train_steps", 2)
        if i % 3 == 0:
            fuzz.tried(what, "infer", "--output_dir", fuzz.run, "--prompt", "a fox", "--num_inference_steps", 1)
        path.write_bytes(kept)


@pytest.mark.slow
def test_the_facts_of_a_state_and_of_a_run(fuzz):
    state = max((fuzz.run / "state").glob("*.state"))
    others = {path: path.read_bytes() for path in (fuzz.run / "state").glob("*") if path != state}
    kept, began = state.read_bytes(), (fuzz.run / "run.json").read_bytes()
    for i in fuzz:
        for path in others:
            path.unlink(missing_ok=True)
        if i % 3:
            blob = kept[:-32]
            (size,) = struct.unpack("<Q", blob[:8])
            header = json.loads(blob[8 : 8 + size])
            if i % 3 == 1:
                what, header["__metadata__"]["state"] = edited(json.loads(header["__metadata__"]["state"]), fuzz.random)
                text = json.dumps(header)
            else:
                what, text = edited(header, fuzz.random)
            head = text.encode("utf-8", "surrogatepass")
            blob = struct.pack("<Q", len(head)) + head + blob[8 + size :]
            state.write_bytes(blob + hashlib.sha256(blob).digest())
        else:
            what, text = edited(json.loads(began), fuzz.random)
            write(fuzz.run / "run.json", text)
        fuzz.tried(what, "train", "--output_dir", fuzz.run, *TRAIN, "--max_train_steps", 2)
        state.write_bytes(kept)
        (fuzz.run / "run.json").write_bytes(began)


@pytest.mark.slow
def test_weights_to_draw_with(fuzz):
    path = fuzz.run / "lora.safetensors"
    kept = path.read_bytes()
    for i in fuzz:
        if i % 3:
            what = with_header(path, kept, fuzz.random)
        else:
            what = "bytes"
            path.write_bytes(flipped(kept, fuzz.random))
        fuzz.tried(what, "infer", "--output_dir", fuzz.run, "--prompt", "a fox", "--num_inference_steps", 1)
        path.write_bytes(kept)


WORDS = ["", " ", "-1", "0", "-0", "2", "1.5", "nan", "inf", "-inf", "1e999", "1e-999", "1e38", "9" * 400, "x", "true"]
WORDS += [
    "0x10",
    "1_0",
    "１",
    "—5",
    "\udcff",
    "no",
    "fp16",
    "a\nb",
    "x" * 300,
    "/dev/null",
    "/dev/null/x",
    "/proc/x",
    ".",
]
FOLDERS = {"output_dir", "cache_dir"}  # which are made wherever they say


@pytest.mark.slow
def test_flags_with_odd_values(fuzz):
    run = ["--output_dir", fuzz.run]
    usual = {
        "data.precompute": [*run, "--train_data_dir", fuzz.run / "pictures", *PRECOMPUTE, *PICTURES],
        "train": [*run, *TRAIN, "--max_train_steps", 2],
        "train.metrics": [fuzz.run],
        "infer": [*run, "--prompt", "a fox", "--num_inference_steps", 1],
        "infer.publish": [fuzz.run, "--hub_model_id", "fox/ink"],
    }
    for _ in fuzz:
        name = fuzz.random.choice(sorted(flags.COMMANDS))
        flag = fuzz.random.choice(fields(flags.COMMANDS[name]))
        word = fuzz.random.choice([word for word in WORDS if flag.name not in FOLDERS or word[:1] in ("/", "")])
        value = [] if flag.type is bool else [word]
        argv = [*usual[name], *([] if flag.metadata["positional"] else [f"--{flag.name}"]), *value]
        fuzz.tried(f"{name} --{flag.name} {word!r}"[:100], name, *argv)


def test_the_contract_would_notice():
    """A fuzzer that accepts everything finds nothing."""
    fine = (2, "", "error: x\n", 0)
    keeps_the_contract(*fine)
    progress = "train: 1 of 2 steps, loss 0.1, 0.2 s each, 0 seconds left\n"
    keeps_the_contract(0, "done", f"{progress}no GPU here: the CPU computes\n", 0)
    for code, out, err, peak in [
        (1, "", "error: x\n", 0),
        (-9, "", "", 0),
        (2, "", "", 0),
        (2, "", "error: x\nerror: y\n", 0),
        (2, "", "Traceback (most recent call last):\n", 0),
        (0, "", "a warning\nof two lines\n", 0),
        (0, "", "", MEMORY),
    ]:
        with pytest.raises(AssertionError):
            keeps_the_contract(code, out, err, peak)
    assert one_line_error("error: x\n") == "error: x"
