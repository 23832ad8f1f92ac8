"""What a training leaves on the disk: a line for each step, weights and a state at every save, pictures.

Of several ranks the first has a Writer; the others have a Nobody, so that the loop is the same on all of them.
"""

from functools import partial

from lora import files
from train.metrics import Metrics
from train.state import save_state
from train.trackers import Trackers


def writer_for(run, stop):
    """stop: safe.Signals"""
    return Nobody(run) if run.ranks.index else Writer(run, stop)


def origin_of(folder, settings, manifest, base, scheduler, fingerprint):
    """-> files.Origin, what the run's files of weights say. base: the Model; scheduler: its config."""
    return files.Origin(
        title=folder.resolve().name,
        base=base.public_name(),
        resolution=manifest["resolution"],
        fingerprint=fingerprint,
        prediction_type=scheduler["prediction_type"],
        zero_snr=scheduler["rescale_betas_zero_snr"],
        trigger_phrase=manifest.get("instance_prompt"),
        base_precision=settings.base_precision,
    )


class Writer:
    """A context manager: its file of metrics is open in between."""

    def __init__(self, run, stop):
        settings, path = run.settings, run.folder / "metrics.jsonl"
        trackers = Trackers(settings.report_to, run.folder, run.start, settings)
        # A measurement that a signal left out of the step which the run goes on from is made up for. Else the best save
        # would be another than that of a run that nobody stopped.
        make_up = partial(run.validation.measure, run.start, stop)
        self.run = run
        self.metrics = Metrics(path, run.start, settings.max_train_steps, run.device, trackers, make_up)
        if run.validation.is_best(run.start):
            self.export("lora-best")

    def log(self, step, images, numbers):
        """The step that is done, its images, and what was measured in it: {name: number, or numbers by name}"""
        self.metrics.log(step, images, **numbers)

    def save(self, step):
        """The step's numbers, then the weights, then the state, because a run that goes on from the state starts behind
        the step that wrote the others."""
        self.metrics.sync()
        self.export(f"lora-{step:06d}")
        if self.run.validation.is_best(step):
            self.export("lora-best")
        self.keep_state(step)

    def keep_state(self, step):
        run = self.run
        kept = run.adapters, run.optimizer, run.scaler, run.identity, run.memory_plan, run.validation.best
        save_state(run.folder / "state", step, *kept, run.ranks.count)

    def export(self, name):
        """The weights as they are now -> RUN/name.safetensors"""
        files.export(self.run.adapters, self.run.folder / f"{name}.safetensors", self.run.origin)

    def show(self, step, pictures):
        """Pictures that were drawn after a step, to the trackers."""
        self.metrics.show(step, pictures)

    def seconds(self):
        """Since the first step began."""
        return self.metrics.seconds()

    def __enter__(self):
        self.metrics.__enter__()
        return self

    def __exit__(self, *error):
        self.metrics.__exit__(*error)


class Nobody(Writer):
    """Writes nothing."""

    def __init__(self, run):
        """The run is the first rank's to write down."""

    def log(self, step, images, numbers):
        pass

    def save(self, step):
        pass

    def keep_state(self, step):
        pass

    def export(self, name):
        pass

    def show(self, step, pictures):
        pass

    def seconds(self):
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass
