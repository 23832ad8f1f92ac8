"""--report_to: what TensorBoard and Weights & Biases are shown of a run.

A tracker begins at a step, is given each step's numbers and the pictures that were drawn, and is closed. Its package
is imported when it begins.
"""

import importlib.util
import json
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from data.common.disk import atomic_write
from data.common.errors import UserError, one_line
from data.common.imports import without
from train.curves import flat

NOT_TOLD = {"cache_dir", "restart", "report_to"}  # a place on this machine, and what is not about the training


class Trackers:
    """Those that --report_to names. One that fails is said once and left alone from there on: a run needs none."""

    def __init__(self, names, folder, start, settings):
        """names: of KINDS, or None. folder: the run's. start: steps that are done. settings: flags.Train"""
        self.working = {name: KINDS[name]() for name in names or ()}
        told = shown_settings(settings)
        self._each(lambda tracker: tracker.begin(Path(folder), start, told))

    def log(self, step, line):
        """line: of metrics.jsonl, with null where a number is not finite."""
        self._each(lambda tracker: tracker.log(step, flat(line)))

    def show(self, step, pictures):
        """pictures: {name: PIL image}"""
        if pictures:
            self._each(lambda tracker: tracker.show(step, pictures))

    def close(self):
        self._each(lambda tracker: tracker.close())

    def _each(self, call):
        """call(tracker) for each that works.

        Whatever it raises is caught, and not only what is known: the other end is a package, a disk and a server whose
        errors have no common kind, and hours of training must not end for a curve. Nothing of ours runs in here but the
        few lines of the tracker itself.
        """
        for name, tracker in list(self.working.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.working[name]
                reason = one_line(f"{type(error).__name__}: {error}", 200)
                warnings.warn(f"--report_to {name}: {reason}; the run goes on without it", stacklevel=3)


class TensorBoard:
    """RUN/tensorboard, a file of events for each time that the run was started.

    Each step is written at once. torch's SummaryWriter makes the same file in a thread of its own, which prints a
    traceback where a disk is full.
    """

    def begin(self, folder, start, settings):
        with without("tensorflow"):  # imported wherever it is installed, for seconds, and not needed
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import RecordWriter, summary

        self.Event, self.Summary, self.RecordWriter, self.summary = Event, Summary, RecordWriter, summary
        folder = folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files whose names have this word in them, in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._write(0, file_version="brain.Event:2")
        # What earlier files have of this step and later ones is not shown.
        self._write(start + 1, session_log=SessionLog(status=SessionLog.START))
        text = "".join(f"    {line}\n" for line in json.dumps(settings, indent=2, ensure_ascii=False).splitlines())
        self._write(start + 1, summary=summary.text("settings", text))

    def log(self, step, numbers):
        values = [self.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(step, summary=self.Summary(value=values))

    def show(self, step, pictures):
        import numpy as np

        for name, picture in pictures.items():
            pixels = np.asarray(picture.convert("RGB"))
            self._write(step, summary=self.summary.image(name, pixels, dataformats="HWC"))

    def _write(self, step, **what):
        with open(self.path, "ab") as file:  # closed each time, so that nothing waits to be written
            event = self.Event(wall_time=time.time(), step=step, **what)
            self.RecordWriter(file).write(event.SerializeToString())

    def close(self):
        """Nothing is open."""


class WeightsAndBiases:
    """A run of its own at wandb.ai or, as wandb's own environment has it, elsewhere or offline; files in RUN/wandb.

    RUN/wandb/id says which one a continuation goes on with.
    """

    def begin(self, folder, start, settings):
        import wandb

        self.wandb = wandb
        known = folder / "wandb" / "id"
        if not known.exists():
            with atomic_write(known, "w") as file:
                file.write(os.urandom(4).hex())
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "barelora"),
            name=folder.resolve().name,
            dir=str(folder),  # in which it makes a folder wandb
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            config=settings,
            allow_val_change=True,  # of the config, for a continuation with more steps
            settings=wandb.Settings(console="off"),  # what is printed stays here
        )

    def log(self, step, numbers):
        # Steps past the state are done again with the same numbers, and there they stand already.
        if step >= self.run.step:
            self.run.log(numbers, step=step)

    def show(self, step, pictures):
        self.log(step, {name: self.wandb.Image(picture) for name, picture in pictures.items()})

    def close(self):
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_installed(names):
    """Raise UserError when a package that --report_to needs is not there."""
    for name in names or ():
        if not importlib.util.find_spec(name):
            raise UserError(f"--report_to {name}: the package {name} is not installed; python -m pip install {name}")


def shown_settings(settings):
    """-> {flag: value} for others to read: of a file its name alone, and no folder but the run's as it was given."""
    told = {name: value for name, value in asdict(settings).items() if name not in NOT_TOLD and value is not None}
    if "network_weights" in told:
        told["network_weights"] = Path(told["network_weights"]).name
    return told
