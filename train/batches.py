"""What each micro-step trains on, drawn on the CPU from (seed, step, slot) alone."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from data import sampler
from data.common.ahead import ahead
from train import diffusion


def batches(cache, settings, signal, start):
    """The micro-batches from step `start` on, in order, each drawn while the one before it trains."""
    slots = (
        (step, slot)
        for step in range(start, settings.max_train_steps)
        for slot in range(settings.gradient_accumulation_steps)
    )
    with ThreadPoolExecutor(1) as pool:
        yield from ahead(pool, lambda at: draw(cache, settings, signal, *at), slots, 1)


def draw(cache, settings, signal, step, slot):
    """The micro-batch of one slot, on the CPU: examples, a draw from their posteriors, noise, timesteps, dropped captions.

    -> x0, eps (B, 4, h, w) fp32, t (B,), text (B, 77, 2048), pooled (B, 1280), time_ids (B, 6)
    """
    B = settings.train_batch_size
    of = partial(sampler.generator, settings.seed, step=step, slot=slot)
    examples = chosen(cache, settings, step, slot)
    mirrored = torch.rand(B, generator=of("flip")) < 0.5
    empty = torch.rand(B, generator=of("dropout")) < settings.proportion_empty_prompts
    batch = {
        name: torch.from_numpy(array) for name, array in cache.batch(examples, mirrored.numpy(), empty.numpy()).items()
    }
    mean, std = batch.pop("mean").float(), batch.pop("std").float()
    batch["x0"] = diffusion.sample_posterior(
        mean, std, torch.randn(mean.shape, generator=of("posterior")), cache.manifest["scaling_factor"]
    )
    noise = of("noise")
    eps = torch.randn(mean.shape, generator=noise)
    batch["eps"] = eps + settings.noise_offset * torch.randn(*eps.shape[:2], 1, 1, generator=noise)
    batch["t"] = torch.randint(len(signal), (B,), generator=of("timestep"))
    return batch


def every_shape(cache, settings, signal):
    """A micro-batch of each shape that will be drawn, of random numbers, the largest first."""
    batch = draw(cache, settings, signal, 0, 0)
    shapes = [shape[1:] for shape, members in zip(cache.manifest["moments_shapes"], cache.members) if len(members)]
    shapes.sort(key=math.prod, reverse=True)
    return [
        batch | {name: torch.randn(settings.train_batch_size, *shape) for name in ("x0", "eps")} for shape in shapes
    ]


def chosen(cache, settings, step, slot):
    """The examples of one slot's micro-batch, all of one size."""
    slots, lengths = settings.gradient_accumulation_steps, [len(members) for members in cache.members]
    size, positions = sampler.rows(settings.seed, step, slot, slots, settings.train_batch_size, lengths)
    return cache.members[size][positions].tolist()
