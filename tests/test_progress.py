"""How far a command is: a bar in a terminal, and few lines everywhere else."""

import os
import pty
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from data import progress

WORK = """
import sys, time
import data.precompute, train.__main__, infer.__main__  # before safe.run, as the commands do; none may import tqdm
from data import progress
from data.common import safe

def main(argv):
    with progress.progress("train", "step", 300, done=100) as bar:
        for i in range(200):
            bar.set_postfix({"loss": "0.5"}, refresh=False)
            bar.update()
    import tqdm
    for _ in tqdm.tqdm(range(50), desc="a download"):  # a library's own bar
        time.sleep(0.01)

safe.run(main, [])
"""


@pytest.fixture
def clock(monkeypatch):
    """What the time is, to be moved by the test."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_at_most(clock, capsys):
    """A notebook keeps each line that it was ever given, and a browser that has ten thousand of them stands still."""
    with progress.progress("train", "step", 1500, done=500) as bar:
        for i in range(999):
            clock[0] += 0.25
            bar.set_postfix({"loss": f"{i}"}, refresh=False)
            bar.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and len(lines) == 999 * 0.25 // 10
    assert lines[0] == "train: 540 of 1,500 steps, loss 39, 0.25 s each, 4.0 minutes left"
    assert lines[-1] == "train: 1,460 of 1,500 steps, loss 959, 0.25 s each, 10 seconds left"


def test_the_time_left_follows_the_pace(clock, capsys):
    """Of the last lines, not of all: the first step compiles, another program may have come."""
    bar = progress.progress("pictures", "image", 1000)
    for seconds in (100, 10):
        clock[0] += seconds
        bar.update(100)
    slow, fast = capsys.readouterr().err.splitlines()
    assert slow == "pictures: 100 of 1,000 images, 1 s each, 15.0 minutes left"
    assert fast == "pictures: 200 of 1,000 images, 0.1 s each, 1.3 minutes left"


def test_the_end_is_said_whenever_it_comes(clock, capsys):
    """And pictures that cannot be used are not waited for."""
    bar = progress.progress("pictures", "image", 3)
    bar.update()
    bar.total -= 1
    bar.update()
    assert capsys.readouterr().err == "pictures: 2 of 2 images, 0 s each\n"


def test_nobody_reads_bars_in_a_log(tmp_path):
    """The libraries' bars as well."""
    done = subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert done.returncode == 0 and lines[0].startswith("train: 300 of 300 steps, loss 0.5, "), done.stderr
    assert [line.split("|")[0] for line in lines[1:]] == ["a download:   0%", "a download: 100%"]


@pytest.mark.slow
def test_a_terminal_has_its_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", WORK], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    found = b""
    try:
        while data := os.read(ours, 4096):
            found += data
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0 and "300/300 [" in found.decode() and "loss=0.5" in found.decode()
