"""What each micro-step trains on, drawn on the CPU from (seed, step, slot) alone."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from data import sampler
from data.cache import Cache
from data.common.ahead import ahead
from data.common.flags import Train
from train import diffusion


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run, each found by its step and its slot."""

    cache: Cache
    settings: Train
    timesteps: int  # T, the length of the noise schedule

    def ahead(self, start, rank=0, ranks=1):
        """This rank's micro-batches from step `start` on, in order, each drawn while the one before it trains."""
        slots = range(rank, self.settings.gradient_accumulation_steps, ranks)
        places = ((step, slot) for step in range(start, self.settings.max_train_steps) for slot in slots)
        with ThreadPoolExecutor(1) as pool:
            yield from ahead(pool, lambda place: self.draw(*place), places, 1)

    def draw(self, step, slot):
        """One micro-batch, on the CPU: pictures, a draw from their posteriors, noise, timesteps, dropped captions.

        -> x0, eps (B, 4, h, w) fp32, t (B,), text (B, L, 2048), pooled (B, 1280), time_ids (B, 6)
        """
        settings, B = self.settings, self.settings.train_batch_size
        stream = partial(sampler.generator, settings.seed, step=step, slot=slot)
        mirrored = torch.rand(B, generator=stream("flip")) < 0.5
        empty = torch.rand(B, generator=stream("dropout")) < settings.proportion_empty_prompts
        which = torch.rand(B, generator=stream("caption"))  # of an example's captions
        variant = torch.rand(B, generator=stream("variant"))  # of that caption's
        draws = (draw.numpy() for draw in (mirrored, empty, which, variant))
        arrays = self.cache.batch(self.rows(step, slot), *draws)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        mean, std = batch.pop("mean").float(), batch.pop("std").float()
        noise = torch.randn(mean.shape, generator=stream("posterior"))
        batch["x0"] = diffusion.sample_posterior(mean, std, noise, self.cache.manifest["scaling_factor"])
        noise = stream("noise")
        eps = torch.randn(mean.shape, generator=noise)
        batch["eps"] = eps + settings.noise_offset * torch.randn(*eps.shape[:2], 1, 1, generator=noise)
        batch["t"] = torch.randint(self.timesteps, (B,), generator=stream("timestep"))
        return batch

    def rows(self, step, slot):
        """The indices of one micro-batch's rows in the cache, all of one bucket."""
        settings, lengths = self.settings, [len(members) for members in self.cache.members]
        bucket, positions = sampler.rows(
            settings.seed, step, slot, settings.gradient_accumulation_steps, settings.train_batch_size, lengths
        )
        return self.cache.members[bucket][positions].tolist()

    def one_of_each_bucket(self):
        """A micro-batch of random numbers in every shape that will be drawn, the largest shape first."""
        batch = self.draw(0, 0)
        shapes = [
            shape[1:] for shape, rows in zip(self.cache.manifest["posterior_shapes"], self.cache.members) if len(rows)
        ]
        shapes.sort(key=math.prod, reverse=True)
        B = self.settings.train_batch_size
        return [batch | {name: torch.randn(B, *shape) for name in ("x0", "eps")} for shape in shapes]
