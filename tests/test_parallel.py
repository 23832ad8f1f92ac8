"""Several ranks train what one rank trains: real processes, real sums by gloo."""

import json
import os
import shutil
import socket

import pytest
import torch
from conftest import TRAIN, Forked, command, lines, one_line_error, untitled, when
from safetensors.torch import load

import train.loop  # noqa: F401 - before the processes are forked


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


def vector(run, step):
    return load((run / "state" / f"{step:06d}.state").read_bytes()[:-32])["vector"]


def new(cached, tmp_path, name):
    shutil.copytree(cached / "cache", tmp_path / name / "cache")
    return tmp_path / name


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_equal_one(cached, tmp_path):
    """The same numbers but for the order of sums; one writer; and the other rank says nothing."""
    one, two = new(cached, tmp_path, "one"), new(cached, tmp_path, "two")
    alone = Forked("train", ("--output_dir", one, *TRAIN), tmp_path / "alone.log")
    both = Ranks(two, 2)
    assert alone.wait() == 0, alone.output
    assert both.wait() == [0, 0], [process.output for process in both.processes]
    torch.testing.assert_close(vector(two, 6), vector(one, 6), rtol=0, atol=1e-6)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], 1e-4)
    said = [process.output for process in both.processes]
    assert "a step on 2 GPUs" in said[0] and said[1] == ""
