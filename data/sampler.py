"""Randomness and data order as functions of (seed, step, slot), never of history.

slot = micro · world + rank counts the micro-batches of one optimizer step over all ranks. So a resumed run needs no
random state, and N ranks see what one rank with N times the accumulation sees.
"""

import functools

import numpy as np
import torch

STREAMS = ("order", "noise", "timestep", "posterior", "dropout", "flip")


def generator(seed, stream, step, slot=0):
    """A CPU torch.Generator of its own for each (seed, stream, step, slot).

    Separate streams: turning caption dropout on changes no noise.
    """
    state = np.random.SeedSequence([seed, STREAMS.index(stream), step, slot]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@functools.lru_cache(maxsize=2)
def _order(seed, epoch, rows):
    return torch.randperm(rows, generator=generator(seed, "order", epoch)).numpy()


def rows(seed, step, slot, slots, batch, length):
    """The `batch` examples, of `length` in the cache, that micro-batch `slot` of `slots` of optimizer step `step` trains on.

    Every example once per epoch; a micro-batch may take the last ones of one epoch and the first ones of the next.
    """
    first = (step * slots + slot) * batch
    return [int(_order(seed, i // length, length)[i % length]) for i in range(first, first + batch)]
