"""Did it learn? The loss on pictures that were held out, with the LoRA and without it on the same noise.

One picture's loss differs from another's, and from one timestep's to the next's, by far more than a LoRA changes it. So
every picture has noise and timesteps of its own, which never change, and what counts is the difference that the LoRA
makes to each. Some of the trained pictures are looked at in the same way: where these get better and those held out do
not, the LoRA learns its pictures by heart.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data import sampler
from data.common.ahead import ahead, behind

# Of those held out, at most, and half as many of those trained on: a tenth of the time of a hundred steps.
PICTURES = 16
BANDS = 4  # parts of the noise schedule, of equal length; a picture is looked at once in each


def due(settings, done):
    """Whether it is time to look after `done` optimizer steps: at every regular save, and every --validation_steps."""
    every = settings.checkpointing_steps, settings.validation_steps or settings.checkpointing_steps
    return done == settings.max_train_steps or any(done % steps == 0 for steps in every)


class Validation:
    """What a run's LoRA changes of the loss, measured while it trains, and which save has the lowest.

    settings: flags.Train. timesteps: T, the length of the noise schedule.
    prepare(batches) -> a function, batch -> squared errors (B,) of its pictures, for the UNet as it is then; batches:
    one of every shape, the largest first. best: {"step", "difference"} of the best save, None before there is one.
    most: pictures to measure at most. Where there are none, nothing is measured.
    """

    def __init__(self, settings, cache, timesteps, adapters, prepare, best, most):
        self.settings, self.cache, self.batch_size, self.best = settings, cache, settings.train_batch_size, best
        self.edges = np.linspace(0, timesteps, BANDS + 1).astype(int).tolist()  # of the bands
        self.last = None  # what `best` is, of the last measurement
        held_out = cache.index["held_out"]
        rows = first_by_content(cache.index, held_out, most)
        self.pictures = len(rows)
        self.sets = [rows, first_by_content(cache.index, ~held_out, (len(rows) + 1) // 2)]
        if not self.pictures:
            return
        first_of_bucket = {int(cache.index["bucket"][row]): row for row in np.concatenate(self.sets)}
        samples = [self._draw([(row, 0)] * self.batch_size) for row in first_of_bucket.values()]
        samples.sort(key=lambda batch: batch["x0"].numel(), reverse=True)
        adapters.set_scale(0)
        without = prepare(samples)
        self.base = [self._errors(without, rows) for rows in self.sets]
        del without  # a captured graph, whose memory the next one takes
        adapters.set_scale(1)
        self.forward = prepare(samples)

    def measure(self, done, stop):
        """-> {"held_out": its numbers} where it is time to look after `done` steps, else {}.

        stop: safe.Signals. After a signal nothing is measured, because the run is to end within seconds.
        """
        if not self.pictures or not due(self.settings, done):
            return {}
        began, errors = time.perf_counter(), []
        for rows in self.sets:
            errors.append(self._errors(self.forward, rows, stop))
            if stop.received:
                return {}
        held_out, trained = (with_lora - base for with_lora, base in zip(errors, self.base))
        bands = [mean_difference(of_band[:, None]) for of_band in held_out.T]
        bands = [{"from": low, "to": high, **band} for low, high, band in zip(self.edges, self.edges[1:], bands)]
        numbers = mean_difference(held_out) | dict(loss=errors[0].mean().item(), base_loss=self.base[0].mean().item())
        numbers |= {f"train_{name}": value for name, value in mean_difference(trained).items()}
        self.last = dict(step=done, difference=numbers["difference"])
        return dict(held_out=numbers | dict(pictures=self.pictures, bands=bands, seconds=time.perf_counter() - began))

    def is_best(self, done):
        """Whether the weights after `done` steps have the lowest loss of all that were saved; `best` remembers it."""
        if self.last is None or self.last["step"] != done or not math.isfinite(self.last["difference"]):
            return False
        if self.best is None or self.last["difference"] < self.best["difference"]:
            self.best = self.last
        return self.best is self.last

    def _errors(self, forward, rows, stop=None):
        """The squared errors (pictures, BANDS), fp64, of the pictures in `rows`; incomplete after a signal."""
        errors, batches = np.zeros((len(rows), BANDS)), in_batches(self.cache.index["bucket"][rows], self.batch_size)

        def draw(places):
            return self._draw([(rows[i], band) for i, band in places])

        with ThreadPoolExecutor(1) as pool:
            computed = behind(
                lambda batch: forward(batch).clone(), torch.Tensor.tolist, ahead(pool, draw, batches, 1), 1
            )
            for places, some in zip(batches, computed):
                if stop and stop.received:
                    break
                errors[tuple(zip(*places))] = some
        return errors

    def _draw(self, places):
        """A batch as train/batches.py describes it, of (row, band) places of one bucket: without chance.

        A picture is its posterior's mean, upright, with its first caption; its noise and timesteps depend on its
        content alone, so that runs of another seed, or with more pictures, are measured alike.
        """
        rows, bands = zip(*places)
        no = np.zeros(len(rows), bool)
        batch = {name: torch.from_numpy(array) for name, array in self.cache.batch(rows, no, no, no, no).items()}
        batch["x0"] = batch.pop("mean").float() * self.cache.manifest["scaling_factor"]
        shape, edges = batch.pop("std").shape[1:], self.edges
        seeds = [int.from_bytes(digest[:8].ljust(8, b"\0")) for digest in self.cache.index["image_digest"][list(rows)]]
        streams = [sampler.generator(seed, "validation", band) for seed, band in zip(seeds, bands)]
        batch["t"] = torch.cat(
            [torch.randint(edges[b], edges[b + 1], (1,), generator=g) for g, b in zip(streams, bands)]
        )
        batch["eps"] = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        return batch


def first_by_content(index, which, most):
    """At most `most` rows of those where `which` (N,) is true: the first in the order of their pictures' digests."""
    rows = np.flatnonzero(which)
    return rows[np.argsort(index["image_digest"][rows], kind="stable")][:most]


def in_batches(buckets, size):
    """Lists of `size` places (i, band) that are of one bucket; a list that would be shorter repeats its last place."""
    batches = []
    for bucket in np.unique(buckets):
        places = [(int(i), band) for i in np.flatnonzero(buckets == bucket) for band in range(BANDS)]
        places += [places[-1]] * (-len(places) % size)
        batches += [places[at : at + size] for at in range(0, len(places), size)]
    return batches


def mean_difference(differences):
    """{"difference", "standard_error"} of (pictures, timesteps): the mean, and how far it may be off by the choice of
    the pictures, whose timesteps are not independent; None where there is one picture."""
    of_each = differences.mean(axis=1)
    error = of_each.std(ddof=1) / math.sqrt(len(of_each)) if len(of_each) > 1 else None
    return dict(difference=of_each.mean().item(), standard_error=error if error is None else error.item())
