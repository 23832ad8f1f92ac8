"""Several ranks train what one rank trains: real processes, real sums by gloo."""

import os
import shutil
import signal
import socket
import time

import pytest
import torch
from conftest import TRAIN, Forked, again, command, lines, metrics, one_line_error, start, untitled, vector, when

import train.loop  # noqa: F401 - before the processes are forked
from train import parallel


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """The processes that torchrun would start for one command, forked from this one."""

    def __init__(self, folder, count, *argv):
        port = free_port()
        self.processes = [self._start(folder, i, count, port, argv) for i in range(count)]

    def _start(self, folder, index, count, port, argv):
        words = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        log = folder.with_name(f"{folder.name}-rank{index}.log")
        argv = ("--output_dir", folder, *TRAIN, *argv)
        return Forked("train", argv, log, lambda: os.environ.update({k: str(v) for k, v in words.items()}))

    def wait(self):
        return [process.wait() for process in self.processes]


def test_two_ranks_equal_one(cached, tmp_path):
    """The same numbers but for the order of sums; one writer; and the other rank says nothing."""
    one, two = again(cached, tmp_path, "one"), again(cached, tmp_path, "two")
    alone = Forked("train", ("--output_dir", one, *TRAIN), tmp_path / "alone.log")
    both = Ranks(two, 2)
    assert alone.wait() == 0, alone.output
    assert both.wait() == [0, 0], [process.output for process in both.processes]
    torch.testing.assert_close(vector(two, 6), vector(one, 6), rtol=0, atol=1e-6)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], 1e-4)
    said = [process.output for process in both.processes]
    assert "a step on 2 GPUs" in said[0] and said[1] == ""


@pytest.mark.slow
def test_going_on_with_as_many_ranks_is_exact_and_with_another_number_is_said(cached, tmp_path):
    straight, stopped = again(cached, tmp_path, "straight"), again(cached, tmp_path, "stopped")
    assert Ranks(straight, 2).wait() == [0, 0]
    assert Ranks(stopped, 2, "--max_train_steps", 2).wait() == [0, 0]
    shutil.copytree(stopped, tmp_path / "alone")
    resumed = Ranks(stopped, 2)
    assert resumed.wait() == [0, 0] and "before" not in resumed.processes[0].output
    assert untitled(stopped / "lora.safetensors") == untitled(straight / "lora.safetensors")
    assert torch.equal(vector(stopped, 6), vector(straight, 6))
    alone = Forked("train", ("--output_dir", tmp_path / "alone", *TRAIN), tmp_path / "alone.log")
    assert alone.wait() == 0 and "on 1 GPU now, 2 GPUs before" in alone.output
    torch.testing.assert_close(vector(tmp_path / "alone", 6), vector(straight, 6), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_a_save(cached, tmp_path):
    """torchrun sends it to each of them, but not at the same moment of their steps."""
    run = again(cached, tmp_path, "run")
    ranks = Ranks(run, 2, "--max_train_steps", 400)
    when(lambda: lines(run / "metrics.jsonl") >= 3, ranks.processes[0])
    ranks.processes[1].send(signal.SIGTERM)
    assert ranks.wait() == [143, 143], [process.output for process in ranks.processes]
    step = int(max((run / "state").glob("*.state")).stem)
    assert 3 <= step < 400 and lines(run / "metrics.jsonl") == step
    assert f"stopped after step {step}, saved" in ranks.processes[0].output


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_stops_the_others_who_name_it(dies, cached, tmp_path):
    """And the run goes on from its last save."""
    run = again(cached, tmp_path, "run")
    ranks = Ranks(run, 2, "--max_train_steps", 400)
    when(lambda: (run / "state" / "000004.state").exists(), ranks.processes[0])
    ranks.processes[dies].send(signal.SIGKILL)
    began = time.monotonic()
    assert ranks.processes[1 - dies].wait(60) == 3 and time.monotonic() - began < 60
    said = ranks.processes[1 - dies].output
    assert f"rank {dies} ended" in one_line_error(said.replace("rank 1: error", "error"))
    assert ranks.processes[dies].wait() == -signal.SIGKILL
    assert Ranks(run, 2, "--max_train_steps", 12).wait() == [0, 0]


def test_sums_on_the_gpu_are_asked_for_when_every_rank_has_answered_on_the_cpu(monkeypatch):
    """A rank that ended never answers, and what waits for it on the GPU waits for ever."""
    asked = []

    def all_reduce(tensor, op):
        asked.append(tensor)
        if len(asked) == 2:
            assert asked[0].device.type == "cpu" and asked[1] is gradient

    monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
    gradient, loss = torch.empty(4, device="meta"), torch.tensor(2.0)  # meta, as a GPU's stays where it is
    assert parallel.Ranks.add_up(object.__new__(parallel.Ranks), gradient, loss) == 2 and len(asked) == 2


def test_micro_steps_that_ranks_cannot_share_are_refused_with_what_to_choose(cached, tmp_path):
    run = again(cached, tmp_path, "run")
    ranks = Ranks(run, 2, "--gradient_accumulation_steps", 3)
    assert ranks.wait() == [2, 2]
    assert "choose 2, 4, 6" in one_line_error(ranks.processes[0].output) and ranks.processes[1].output == ""


@pytest.mark.slow
def test_torchrun_itself(cached, tmp_path):
    """The launcher's words, environment and exit codes; the run goes on with one process."""
    run = again(cached, tmp_path, "run")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "train")
    output = command(*torchrun, "--output_dir", run, *TRAIN, "--max_train_steps", 4)
    assert "a step on 2 GPUs" in output and (run / "state" / "000004.state").exists()
    process = start(*torchrun, "--output_dir", run, *TRAIN, "--max_train_steps", 4000)
    when(lambda: lines(run / "metrics.jsonl") >= 6, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert "saved; run the same command to go on" in output and process.returncode != 0
    process = start(*torchrun, "--output_dir", run, *TRAIN, "--gradient_accumulation_steps", 3)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and output.count("error: --gradient_accumulation_steps 3") == 1
