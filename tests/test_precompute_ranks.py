"""Several ranks write the cache that one rank writes: real processes that send real batches to each other by gloo."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    PICTURES,
    PRECOMPUTE,
    ROOT,
    Forked,
    command,
    content,
    edit_captions,
    one_line_error,
    precompute,
    when,
)
from PIL import Image

from data import check
from data.cache import Cache
from data.common import ranks
from data.common.ahead import behind
from data.common.errors import MachineError
from data.loaded import LoadedTextEncoders, LoadedVAE


class Ranks:
    """The processes that torchrun would start for one precompute, forked from this one."""

    def __init__(self, run, source, *more, count=2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        argv = ("--output_dir", run, "--train_data_dir", source, *PRECOMPUTE, *more)
        self.processes = [
            Forked("data.precompute", argv, run.with_name(f"{run.name}-rank{i}.log"), lambda: self._be(i, count, port))
            for i in range(count)
        ]

    def _be(self, index, count, port):
        words = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in words.items()})

    def wait(self, seconds=120):
        """-> exit codes"""
        return [process.wait(seconds) for process in self.processes]

    def said(self):
        return [process.output for process in self.processes]

    def succeed(self):
        assert self.wait() == [0] * len(self.processes), self.said()
        assert not any(self.said()[1:])
        return self.said()[0]


@pytest.fixture
def told_by(monkeypatch, tmp_path):
    """A row tells the whole batch that it was encoded in, as its rounding does. -> a function: batches of each rank"""

    def counted(real, change):
        def start(self, batch):
            with open(tmp_path / f"batches-{os.environ.get('RANK', 'alone')}", "a") as file:
                file.write(".")
            return real(self, change(batch))

        return start

    monkeypatch.setattr(LoadedVAE, "_start", counted(LoadedVAE._start, lambda pixels: pixels + pixels.sum().byte()))
    texts = counted(LoadedTextEncoders._start, lambda some: [f"{text} {hash(tuple(some))}" for text in some])
    monkeypatch.setattr(LoadedTextEncoders, "_start", texts)
    return lambda rank: (tmp_path / f"batches-{rank}").stat().st_size


@pytest.fixture
def slowly(monkeypatch, small_batches):
    """Batches of two, each a fifth of a second, so that there is a middle."""
    real = LoadedVAE._start
    monkeypatch.setattr(LoadedVAE, "_start", lambda *a: (time.sleep(0.2), real(*a))[1])


def rows_of(run):
    """How many pictures are on disk."""
    keys = run / "cache" / "posteriors-64x64.keys"
    return keys.stat().st_size // 36 if keys.exists() else 0


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """An encoder gives nothing back before two more batches are started."""

    def in_flight(start, finish, batches):
        started = ((tag, batch, start(batch)) for tag, batch in batches)
        return behind(lambda begun: begun, lambda begun: (begun[0], finish(*begun[1:])), started, 2)

    monkeypatch.setattr("data.loaded.in_flight", in_flight)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_write_the_bytes_of_one(count, source, tmp_path, small_batches, told_by, as_on_a_gpu):
    """In buckets, with mirror images, a long caption, several orders of tags, a prompt; and each rank has its share."""
    shapes = [(64, 96), (96, 64), (80, 80)]
    for i in range(PICTURES):
        with Image.open(source / f"{i:03d}.png") as image:
            image.resize(shapes[i % 3]).save(source / f"{i:03d}.png")
    edit_captions(source, lambda rows: [rows[0] | {"text": "a fox, " * 60}, *rows[1:]])
    more = ("--buckets", "--resolution", 128, "--random_flip", "--shuffle_caption", "--validation_prompt", "a red fox")
    precompute(tmp_path / "one", source, *more)
    said = Ranks(tmp_path / "several", source, *more, count=count).succeed()
    assert content(tmp_path / "several") == content(tmp_path / "one")
    assert "longer than CLIP reads: 1 caption; " in said and f"{PICTURES} of {PICTURES} rows encoded" in said
    alone, shares = told_by("alone"), [told_by(rank) for rank in range(count)]
    assert sum(shares) == alone and min(shares) > alone // (2 * count), (alone, shares)


def cut(source):
    """Two pictures end in their middle, which only decoding shows."""
    for i in (1, 5):
        path = source / f"{i:03d}.png"
        with Image.open(path) as image:
            image.save(path, "JPEG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("number", range(1, PICTURES))
@pytest.mark.slow
def test_any_number_of_batches(number, source, tmp_path, small_batches, told_by, as_on_a_gpu):
    more = ("--max_train_samples", number)
    precompute(tmp_path / "one", source, *more)
    Ranks(tmp_path / "several", source, *more, count=3).succeed()
    assert content(tmp_path / "several") == content(tmp_path / "one")


@pytest.mark.slow
def test_bad_pictures_are_left_out_whichever_rank_has_them(source, tmp_path, small_batches, monkeypatch):
    """Two that cannot be decoded, and two without finite numbers, in two batches."""
    real = LoadedVAE._finish

    def finish(self, pixels, *waiting):
        posteriors = real(self, pixels, *waiting).clone()
        posteriors[(pixels == 77).all(dim=(2, 3)).any(dim=1)] = float("inf")
        return posteriors

    monkeypatch.setattr(LoadedVAE, "_finish", finish)
    cut(source)
    for i in (2, 4):
        with Image.open(source / f"{i:03d}.png") as image:
            image.paste((77, 77, 77), (0, image.height // 2 - 20, image.width, image.height // 2 + 20))
            image.save(source / f"{i:03d}.png")
    precompute(tmp_path / "one", source, "--skip_bad")
    said = Ranks(tmp_path / "two", source, "--skip_bad").succeed()
    assert "4 rows left out, e.g. " in said
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert len(Cache(tmp_path / "two" / "cache").manifest["skipped"]) == 4
    strict = Ranks(tmp_path / "strict", source)
    assert strict.wait() == [2, 2] and one_line_error(strict.said()[0]).startswith("error: 001.png: not a picture that")
    assert strict.said()[1] == ""


@pytest.mark.slow
def test_the_first_rank_alone_explains_and_finds_nothing_to_do(cached, pictures, tmp_path):
    shutil.copytree(cached, tmp_path / "run")
    for more in ((), ("--explain",)):
        said = Ranks(tmp_path / "run", pictures, *more).succeed()
        assert f"0 of {PICTURES} rows to encode: nothing changed" in said
    Ranks(tmp_path / "other", pictures, "--explain").succeed()
    assert not (tmp_path / "other").exists()


def test_each_rank_sees_its_own_gpu_before_torch_can_look(pictures, tmp_path, monkeypatch):
    """What CUDA saw at its first call it sees for ever, so that both would share the first GPU."""
    real = torch.distributed.init_process_group

    def join(*args, **kwargs):
        (tmp_path / os.environ["RANK"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        real(*args, **kwargs)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    Ranks(tmp_path / "run", pictures, "--explain").succeed()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "5"]


def test_what_is_wrong_with_the_command_is_said_once(source, tmp_path):
    for more, why in (
        (("--resolution", 100), "--resolution 100: must be"),
        (("--dataset_name", "x"), "--dataset_name"),
    ):
        wrong = Ranks(tmp_path / "run", source, *more)
        assert wrong.wait(20) == [2, 2] and why in one_line_error(wrong.said()[0]) and wrong.said()[1] == ""


def test_an_error_of_another_rank_is_the_first_ones_to_say(source, tmp_path, small_batches, monkeypatch):
    real = LoadedTextEncoders._finish

    def finish(self, captions, fetch):
        flat, finite = fetch.wait()
        return real(self, captions, type(fetch)(flat, finite & torch.tensor(os.environ["RANK"] == "0")))

    monkeypatch.setattr(LoadedTextEncoders, "_finish", finish)
    ranks = Ranks(tmp_path / "run", source)
    assert ranks.wait(20) == [2, 2]
    assert "text encoders give numbers that are not finite" in one_line_error(ranks.said()[0]) and not ranks.said()[1]


def test_an_encoder_that_another_rank_cannot_load_stops_all(source, tmp_path, monkeypatch):
    def unfit():
        if os.environ["RANK"] == "1":
            raise MachineError("rank 1 has no GPU")
        return torch.device("cpu")

    monkeypatch.setattr(check, "device", unfit)
    ranks = Ranks(tmp_path / "run", source)
    assert ranks.wait(20) == [3, 3]
    assert one_line_error(ranks.said()[0]) == "error: rank 1 has no GPU" and not ranks.said()[1]


@pytest.mark.parametrize("to", [(0, 1), *(pytest.param((i,), marks=pytest.mark.slow) for i in (0, 1))])
def test_a_signal_to_any_rank_keeps_what_is_encoded(to, source, tmp_path, slowly, monkeypatch):
    monkeypatch.setattr("data.encoding.PICTURES_AT_ONCE", 1)
    ranks, run = Ranks(tmp_path / "run", source), tmp_path / "run"
    when(lambda: rows_of(run), ranks.processes[0])
    for index in to:
        ranks.processes[index].send(signal.SIGTERM)
    assert ranks.wait(20) == [143, 143]
    assert one_line_error(ranks.said()[0]) == "error: stopped, what is encoded is kept; run the same command to go on"
    assert ranks.said()[1] == "" and 0 < rows_of(run) < PICTURES


@pytest.mark.slow
def test_ctrl_c_while_the_first_rank_looks_ends_all_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr("data.precompute.survey", lambda *_: time.sleep(60))
    ranks = Ranks(tmp_path / "run", source)
    when(lambda: (tmp_path / "run" / "cache" / ".writer").exists(), ranks.processes[0])
    time.sleep(1)
    for process in ranks.processes:
        process.send(signal.SIGINT)
    assert ranks.wait(20) == [130, 130]
    assert (
        one_line_error(ranks.said()[0]) == "error: interrupted; run the same command to go on" and not ranks.said()[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("killed, count", [(1, 2), (0, 2), (2, 3)])
def test_a_killed_rank_is_named_and_another_number_of_ranks_goes_on(killed, count, source, tmp_path, slowly, told_by):
    cut(source)
    more, run = ("--skip_bad", "--random_flip"), tmp_path / "run"
    precompute(tmp_path / "one", source, *more)
    ranks = Ranks(run, source, *more, count=count)
    when(lambda: rows_of(run), ranks.processes[0])
    ranks.processes[killed].send(signal.SIGKILL)
    codes, said = ranks.wait(60), ranks.said()
    assert codes == [-signal.SIGKILL if index == killed else 3 for index in range(count)], said
    line = f"error: rank {killed} ended; its own last lines say why\n"
    assert one_line_error(said[0]) + "\n" == line if killed else said[1] == f"rank 1: {line}"
    assert 0 < rows_of(run) < 2 * (PICTURES - 2)
    Ranks(run, source, *more, count=5 - count).succeed()
    assert content(run) == content(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_itself(cached, pictures, tmp_path):
    argv = ("--standalone", "--nproc_per_node", 2, "-m", "data.precompute", "--output_dir", tmp_path / "run")
    said = command("torch.distributed.run", *argv, "--train_data_dir", pictures, *PRECOMPUTE)
    assert said.count(f"{PICTURES} of {PICTURES} rows encoded: ") == 1
    assert content(tmp_path / "run") == content(cached)


@pytest.fixture
def second_rank(monkeypatch):
    """This process is the second of two on a machine whose GPUs nobody has seen yet."""
    for name, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="0").items():
        monkeypatch.setenv(name, value)
    ranks.see_own_gpu()


def test_more_ranks_than_gpus(second_rank, monkeypatch):
    """Not a rank that computes on the CPU, which the others would wait for. Exit code 3 is said by whoever ends so."""
    monkeypatch.setattr(check, "has_nvidia", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="^rank 1 has no GPU: start at most as many processes as there are GPUs"):
        check.device()


def test_make_starts_as_many_as_it_is_told(tmp_path):
    """And the toy's step has its eight pictures on each number of them that divides eight; train refuses the others."""
    words = ["make", "-n", "precompute", "train", f"PYTHON={sys.executable}", f"RUN={tmp_path}"]

    def said(*more):
        output = subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        batch, slots = re.search(r"--train_batch_size (\d+) --gradient_accumulation_steps (\d+)", output).groups()
        return output.count("torch.distributed.run --standalone --nproc_per_node"), int(batch), int(slots)

    assert said() == (0, 8, 1) and said("GPUS=1") == (2, 8, 1)
    assert said("GPUS=2") == (2, 4, 2) and said("GPUS=8") == (2, 1, 8)
    assert said("GPUS=3") == said("GPUS=16") == (2, 8, 1)  # a micro-step for each is what train wants at least
