"""What differs from platform to platform."""

import subprocess
import sys

import pytest

from data.common import system


@pytest.mark.parametrize("running, spins", [(0, "10000"), (1, "0"), (7, "0")])
def test_waiting_threads_sleep_at_once_where_the_cores_are_busy(running, spins, monkeypatch):
    """Spinning next to a browser made the first try a hundred times slower; sleeping alone, twice."""
    monkeypatch.setattr(system, "others_running", lambda: running)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    system.share_the_cores()
    assert system.os.environ["GOMP_SPINCOUNT"] == spins
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")  # somebody's own choice stays
    system.share_the_cores()
    assert system.os.environ["GOMP_SPINCOUNT"] == "5"


def test_busy_programs_are_seen():
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        system.time.sleep(0.3)
        assert system.others_running() >= 2
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
