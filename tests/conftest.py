"""What several tests share: the toy's small SDXL, full SDXL without memory, the real commands, and one finished run."""

import copy
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network is wrong
# Here and in every command one thread, because the tensors are small and more would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "0"  # where a test wants two
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What `make test` was given is not for the makes that tests start.
for name in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS"):
    os.environ.pop(name, None)
gc.disable()  # until all tests are there, for it would look through all that is imported again and again
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, which every command here would inherit
_datasets = tempfile.TemporaryDirectory()  # goes when the session does
os.environ["HF_DATASETS_CACHE"] = _datasets.name

from data.common.imports import COMPILER, without

with without(*COMPILER):  # before a command imports diffusers without peft, which the tests compare with
    from diffusers import UNet2DConditionModel
import numpy as np
import pytest
import torch
from safetensors.torch import load
from tqdm import tqdm

from data.cache import read_index, read_manifest, write_index
from data.common import flags, safe
from lora.inject import inject
from tests.bench.full_size import UNET as SDXL  # its published configuration

tqdm.monitor_interval = 0  # its thread would stand in the way of fork() below
# tqdm's own lock is shared with forked processes: one that is killed inside it would hold it for ever.
tqdm.set_lock(threading.RLock())

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "data" / "toy" / "pipeline"


def pytest_collection_finish():
    gc.freeze(), gc.enable()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


# ---- Models


@pytest.fixture(scope="session")
def _toy_unet():
    return UNet2DConditionModel.from_pretrained(PIPELINE / "unet", dtype=torch.float32).eval()


@pytest.fixture
def unet(_toy_unet):
    """A fresh copy of the toy's UNet, fp32."""
    return copy.deepcopy(_toy_unet)


NARROW = dict(block_out_channels=(32, 64, 96), attention_head_dim=(1, 2, 3), cross_attention_dim=16)
NARROW |= dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)


def sdxl_unet():
    """SDXL base 1.0's UNet without its memory, from its published configuration."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def narrow_sdxl_unet():
    """All of SDXL's layers under their names, about a tenth as wide, with memory."""
    return UNet2DConditionModel(**SDXL | NARROW)


def unet_inputs(batch=2, side=8, seed=0, dtype=torch.float32):
    """Random inputs of the toy's UNet, (positional, keyword), in the widths that its config asks for."""
    config = json.loads((PIPELINE / "unet" / "config.json").read_text())
    pooled_width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    g = torch.Generator().manual_seed(seed)
    xt = torch.randn(batch, 4, side, side, generator=g)
    t = torch.randint(1000, (batch,), generator=g)
    text = torch.randn(batch, 77, config["cross_attention_dim"], generator=g)
    pooled = torch.randn(batch, pooled_width, generator=g)
    time_ids = torch.tensor([[300, 200, 0, 32, 128, 128]] * batch)
    condition = dict(text_embeds=pooled.to(dtype), time_ids=time_ids)
    return (xt.to(dtype), t, text.to(dtype)), dict(added_cond_kwargs=condition)


def predict(unet, inputs):
    args, kwargs = inputs
    return unet(*args, **kwargs).sample


def inject_filled(unet, rank=4, alpha=6.0, seed=0, size=0.05, layers="attn"):
    """Adapters whose B is not zero, so that the update shows; alpha is not rank, so that a lost factor shows too."""
    adapters = inject(unet, rank, alpha, seed, layers)
    g = torch.Generator().manual_seed(seed + 1)
    for _, B in adapters.projections().values():
        B.copy_(torch.randn(B.shape, generator=g) * size)
    adapters.refresh()
    return adapters


def add_gradients(adapters, loss):
    """One backward as the loop does it."""
    adapters.add_gradients(torch.autograd.grad(loss, adapters.parameters))


# ---- Pictures


def icc_profile(name, red, green, blue, gamma):
    """The bytes of an ICC profile, version 2: a matrix of the primaries' XYZ under D50, and a gamma or a table."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = name.encode() + b"\0"
    points = [round(gamma * 256)] if isinstance(gamma, float) else gamma
    curve = b"curv\0\0\0\0" + struct.pack(f">I{len(points)}H", len(points), *points) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78, b"cprt": b"text\0\0\0\0none\0"}
    tags |= {b"wtpt": xyz((0.9642, 1, 0.8249)), b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp"
    return head.ljust(128, b"\0") + table + body


# ---- Commands


def as_a_user():
    """For Popen's preexec_fn: from here on modes of files hold for root as well."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which only root may


def settings(command, **values):
    """The command's settings as its flags would give them; a required one that is not given is empty."""
    kind = flags.COMMANDS[command]
    return kind(**{f.name: "" for f in fields(kind) if f.default is MISSING} | values)


def start(*argv, **popen):
    """Start python -m argv in a process of its own."""
    argv = [sys.executable, "-m", *map(str, argv)]
    return subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)


def command(*argv, code=0, **popen):
    """Run python -m argv to its end, hold it to its exit code, and return what it printed."""
    process = start(*argv, **popen)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}:\n{output}"
    assert "Traceback" not in output, output
    return output


def one_line_error(output):
    """The line of a command that was refused: the last one, and the only one that says so."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and output.splitlines()[-1] == errors[0], output
    return errors[0]


class Forked:
    """One of the commands in a real process that real signals can hit, forked from this one: no seconds of imports.

    name: "data.precompute", "train" or "infer"; what it prints goes to `log`. before(): done in the process first.
    """

    def __init__(self, name, argv, log, before=lambda: None):
        self.log = Path(log)
        self.pid = os.fork()
        if self.pid:
            return
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1, errors="backslashreplace")
            before()
            safe.run(main_of(name), [str(word) for word in argv])
            code = 0
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def send(self, signum):
        os.kill(self.pid, signum)

    def wait(self, seconds=120):
        """-> exit code, or minus the signal that ended it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s:\n{self.output}")

    @property
    def output(self):
        return self.log.read_text()


MODULES = {"data.precompute": "data.precompute", "train": "train.__main__", "infer": "infer.__main__"}
MODULES |= {"train.metrics": "train.plot"}
MODULES["infer.publish"] = "infer.publish"


def main_of(name):
    return importlib.import_module(MODULES[name]).main


def here(name, *argv):
    """Run one of the commands in this process. What it refuses is raised; signal handlers are put back afterwards."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        main_of(name)([str(word) for word in argv])
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def when(happened, process, seconds=120):
    """Wait until happened() is true. A process that does not get there is killed."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
            raise AssertionError(f"not in {seconds} s")
        time.sleep(0.002)


def lines(path):
    """How many whole lines a file has that is being written; 0 while it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def vector(run, step):
    """The LoRA vector of a saved state, fp32: what the exported fp16 would hide shows here."""
    return load((run / "state" / f"{step:06d}.state").read_bytes()[:-32])["vector"]


def again(run, tmp_path, name):
    """Another new run on the same cache."""
    shutil.copytree(run / "cache", tmp_path / name / "cache")
    return tmp_path / name


def untitled(path):
    """A file of weights without its title, which is the run's folder: what two runs of one command have in common."""
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    del header["__metadata__"]["modelspec.title"]
    return json.dumps(header).encode() + blob[start:]


PICTURES = 8
PRECOMPUTE = ("--pretrained_model_name_or_path", PIPELINE, "--resolution", 64, "--mixed_precision", "no")
STEPS = 6
TRAIN = ("--rank", 4, "--lora_alpha", 6, "--train_batch_size", 2, "--gradient_accumulation_steps", 2)
TRAIN += ("--learning_rate", 1e-2, "--mixed_precision", "no", "--proportion_empty_prompts", 0.2)
TRAIN += ("--max_train_steps", STEPS, "--checkpointing_steps", 2)
PROMPTS = ("a red fox in the forest", "a blue bird in the snow")
TOKEN = "hf_notASecretButASentinel0123456789"


@dataclass
class Run:
    """A run that went through the real commands, and what they printed."""

    folder: Path
    pictures: Path
    precompute: str
    train: str
    infer: str


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures with metadata.jsonl: the first of the toy's set."""
    from data.toy import draw

    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    full, draw.COUNT = draw.COUNT, PICTURES
    try:
        draw.draw_set(folder)
    finally:
        draw.COUNT = full
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, pictures):
    """One small run through precompute, train and infer, for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    env = {**os.environ, "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN}
    return Run(
        folder,
        pictures,
        command("data.precompute", "--output_dir", folder, "--train_data_dir", pictures, *PRECOMPUTE, env=env),
        command("train", "--output_dir", folder, *TRAIN, env=env),
        command("infer", "--output_dir", folder, "--prompt", *PROMPTS, "--num_inference_steps", 2, env=env),
    )


@pytest.fixture
def fresh(run, tmp_path):
    """A new run's folder with the same cache, nothing trained."""
    folder = tmp_path / "fresh"
    shutil.copytree(run.folder / "cache", folder / "cache")
    return folder


# ---- Caches made here


@pytest.fixture
def source(pictures, tmp_path):
    """A copy of the pictures to change."""
    shutil.copytree(pictures, tmp_path / "source")
    return tmp_path / "source"


def precompute(run, source, *more):
    here("data.precompute", "--output_dir", run, "--train_data_dir", source, *PRECOMPUTE, *more)


def content(folder):
    return {p.name: p.read_bytes() for p in (folder / "cache").iterdir() if not p.name.startswith(".")}


def change_cache(run, index=lambda index: index, **values):
    """Write the cache again as precompute would, with index(the index) and with `values` in the manifest."""
    records, names = read_index(run / "cache")
    captions = np.load(run / "cache" / "captions.npy")
    write_index(run / "cache", index(records), captions, names, read_manifest(run / "cache") | values)


def caption_rows(cache, index=None):
    """The row of each example's first caption."""
    return cache.caption_rows[(cache.index if index is None else index)["first_caption"]]


def edit_captions(source, change):
    path = source / "metadata.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def small_batches(monkeypatch):
    """Two rows at a time, committed each time, so that eight pictures have a middle."""
    monkeypatch.setattr("data.cache.COMMIT_SECONDS", 0)
    monkeypatch.setattr("data.encoding.PICTURES_AT_ONCE", 2)
    monkeypatch.setattr("data.encoding.CAPTIONS_AT_ONCE", 2)


@pytest.fixture(scope="session")
def cached(tmp_path_factory, pictures):
    """A run's folder with the pictures' cache and nothing else; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("cached") / "run"
    precompute(folder, pictures)
    return folder


@pytest.fixture
def done(monkeypatch):
    """What is encoded from here on: captions, and pixels (H, W, 3) of pictures."""
    from data.loaded import LoadedTextEncoders, LoadedVAE

    done = dict(captions=[], pictures=[])
    captions, start = LoadedTextEncoders._start, LoadedVAE._start

    def start_captions(self, some):
        done["captions"].extend(some)
        return captions(self, some)

    def start_pictures(self, pixels):
        done["pictures"].extend(pixels.numpy())
        return start(self, pixels)

    monkeypatch.setattr(LoadedTextEncoders, "_start", start_captions)
    monkeypatch.setattr(LoadedVAE, "_start", start_pictures)
    return done
