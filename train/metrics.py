"""RUN/metrics.jsonl, one JSON object per optimizer step, and how far the training is.

python -m train.metrics RUN … draws the curves of what stands there (train/plot.py).
"""

import json
import math
import os
import sys
import time

from data.common import safe, system
from data.common.disk import atomic_write, naming
from data.common.words import duration, many
from data.progress import progress
from train import curves, plot


class Metrics:
    """A context manager whose log(...) is called once per optimizer step. A resumed run's file goes on at its step.

    trackers: trackers.Trackers, which are told the same. make_up() -> {name: numbers}, asked where the line of `step`
    has no held_out.
    """

    def __init__(self, path, step, steps, device, trackers, make_up=dict):
        self.device, self.path, self.trackers = device, path, trackers
        if path.exists():  # lines past the state that the run goes on from would stand there twice
            lines = [line for line in curves.read(path) if line["step"] <= step]
            if lines and lines[-1]["step"] == step and "held_out" not in lines[-1]:
                lines[-1] |= _strict(make_up())
            with atomic_write(path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self.file = open(path, "a", encoding="utf-8", newline="\n")
        self.bar = progress("train", "step", steps, done=step)
        self.began = self.time = time.perf_counter()
        self.logged, self.steps, self.held_out = 0, steps, {}

    def log(self, step, images, **numbers):
        """step: how many are done. images: how many this one trained on. numbers: what else to write down.

        One of them may be held_out, what train/validate.py measured, whose difference the bar shows from then on.
        """
        now = time.perf_counter()
        seconds, self.time = now - self.time - numbers.get("held_out", {}).get("seconds", 0), now
        line = dict(
            step=step, **numbers, s_per_step=seconds, images_per_s=images / seconds, peak_gib=peak_gib(self.device)
        )
        line = _strict(line)
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.trackers.log(step, line)
        shown = {name: f"{line[name]:.3g}" for name in ("loss", "lr", "images_per_s", "peak_gib")}
        if line.get("held_out", {}).get("difference") is not None:
            self.held_out = {"held_out": f"{line['held_out']['difference']:.3g}"}
        self.bar.set_postfix(shown | self.held_out, refresh=False)
        self.bar.update()
        self.logged += 1
        if self.logged == 10 and step < self.steps:
            left = self.steps - step
            self.bar.write(f"{many(left, 'more step')} will take about {duration((now - self.began) / 10 * left)}")

    def show(self, step, pictures):
        """pictures: {name: PIL image}, drawn after `step` steps; {} where none were."""
        self.trackers.show(step, pictures)
        self.time = time.perf_counter()  # a step's seconds are without those of the drawing before it

    def seconds(self):
        """Since the first step began."""
        return time.perf_counter() - self.began

    def sync(self):
        """Let the lines so far survive a power cut."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.trackers.close()
        with naming(self.path):
            self.file.close()


def _strict(value):
    """The same with null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_gib(device):
    """The most memory held so far, GiB: what torch reserved on the GPU, or without one what the process held."""
    if device.type == "cuda":
        import torch  # here, because the command that draws the curves needs none

        return torch.cuda.max_memory_reserved(device) / 2**30
    return system.peak_memory() / 2**30


if __name__ == "__main__":
    safe.run(plot.main, sys.argv[1:])
