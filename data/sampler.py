"""Randomness and data order as functions of (seed, step, slot), never of history.

A slot is a micro-batch's place in its optimizer step, counted over all ranks, the processes that share it: slot =
micro-step · ranks + rank. So a resumed run needs no random state, and N ranks see together what one rank sees alone.
"""

import functools

import numpy as np
import torch

STREAMS = ("order", "noise", "timestep", "posterior", "dropout", "flip", "caption", "variant", "validation")


def generator(seed, stream, step, slot=0):
    """A CPU torch.Generator of its own for each (seed, stream, step, slot).

    The streams are separate, so that turning caption dropout on changes no noise.
    """
    state = np.random.SeedSequence([seed, STREAMS.index(stream), step, slot]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@functools.lru_cache(maxsize=64)
def _shuffled(seed, epoch, which, length):
    return torch.randperm(length, generator=generator(seed, "order", epoch, which)).numpy()


def rows(seed, step, slot, slots, batch, lengths):
    """What micro-batch `slot` of `slots` of optimizer step `step` trains on: -> (bucket, `batch` indices into it)

    lengths: examples per bucket. A whole step takes its images from one bucket, so that all ranks have the same shapes.
    The examples of each bucket come once per epoch, in an order of that epoch, and those that a bucket has left at an
    epoch's end it carries into the next one. So a bucket of n examples has ⌊(e + 1) n / s⌋ - ⌊e n / s⌋ steps in epoch
    e, where s is images_per_step.
    """
    images_per_step, n = slots * batch, np.asarray(lengths)

    def steps_before(epoch):
        return epoch * n // images_per_step

    low, high = 0, (step + 1) * images_per_step // int(n.max()) + 1
    while high - low > 1:  # find the last epoch that begins at or before this step
        middle = (low + high) // 2
        low, high = (middle, high) if steps_before(middle).sum() <= step else (low, middle)
    first = steps_before(low)
    order = np.repeat(np.arange(len(n)), steps_before(low + 1) - first)
    order = order[_shuffled(seed, low, 0, len(order))]
    here = step - int(first.sum())
    bucket = int(order[here])
    begin = int(first[bucket] + (order[:here] == bucket).sum()) * images_per_step + slot * batch
    length = int(n[bucket])
    return bucket, [
        int(_shuffled(seed, i // length, 1 + bucket, length)[i % length]) for i in range(begin, begin + batch)
    ]
