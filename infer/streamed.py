"""Blocks of a frozen model that stay in RAM and come to the GPU one after the other, where it cannot hold all.

    RAM   block 0 | block 1 | block 2 | block 3 | …          page-locked, so that the GPU fetches by itself
    GPU   0, then 2, then 4, …  |  1, then 3, then 5, …      PLACES, each as large as the largest block

While one block computes, the next one arrives on a stream of its own. A block's weights are views of its place for
ever, so the same kernels compute with the same bytes as without this: the same bits.
"""

from functools import partial

import torch

from data.common.system import need_memory
from infer.memory import PLACES

ALIGNED = 512  # bytes: where the allocator begins a tensor, too, which a kernel's choice may depend on
SLAB = 2**30  # bytes of RAM that are page-locked at once: torch rounds each up to a power of two


class Streamed:
    """Moves the weights of some blocks of a model to RAM, and fetches each when the model's forward comes to it.

    places (PLACES, bytes) on the device, holds: the index of the block that is, or is arriving, in each of them.
    """

    def __init__(self, model, names, device):
        """names: the blocks', in the order of a forward. Call it before the model's other weights go to the device."""
        self.blocks = [model.get_submodule(name) for name in names]
        sizes = [sum(map(_room, block.parameters())) for block in self.blocks]
        need_memory(sum(sizes), "what of the UNet the GPU cannot hold")
        self.places = torch.empty(PLACES, max(sizes), dtype=torch.uint8, device=device)
        self.copies, self.holds, self.ram = Copies(device), [None] * PLACES, []
        slab = torch.empty(0)
        for i, (block, size) in enumerate(zip(self.blocks, sizes)):
            if size > len(slab):  # of what is left of it
                slab = torch.empty(
                    max(size, min(SLAB, sum(sizes[i:]))), dtype=torch.uint8, pin_memory=self.copies.pinned
                )
            source, slab = slab[:size], slab[size:]
            self.ram.append(source)
            self._move(block, source, self.places[i % PLACES])
            block.register_forward_pre_hook(partial(self._before, i))
            block.register_forward_hook(partial(self._after, i))
        for i in range(min(PLACES, len(self.blocks))):
            self._fetch(i)

    @staticmethod
    @torch.no_grad()
    def _move(block, source, place):
        at = 0
        for weight in block.parameters():
            here, there = (
                flat[at : at + weight.nbytes].view(weight.dtype).view(weight.shape) for flat in (source, place)
            )
            here.copy_(weight)
            weight.data = there
            at += _room(weight)

    def _before(self, i, *_):
        if self.holds[i % PLACES] != i:  # the forward came in another order; it is only slower
            self._fetch(i)
        self.copies.wait(i % PLACES)

    def _after(self, i, *_):
        self.copies.free(i % PLACES)
        following = i + PLACES if i + PLACES < len(self.blocks) else i % PLACES
        if following != i:
            self._fetch(following)

    def _fetch(self, i):
        place = i % PLACES
        self.copies.start(place, self.places[place][: len(self.ram[i])], self.ram[i])
        self.holds[place] = i


class Copies:
    """Copies from RAM to places on a GPU, on a stream of their own, in step with the stream that computes."""

    pinned = True

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # which may still use what the places' memory was
        self.arrived, self.used = ([torch.cuda.Event() for _ in range(PLACES)] for _ in range(2))

    def start(self, place, target, source):
        """Copy, once what was there before is used."""
        with torch.cuda.stream(self.stream):
            self.used[place].wait()
            target.copy_(source, non_blocking=True)
            self.arrived[place].record()

    def wait(self, place):
        """What computes from here on waits until the place's copy has arrived."""
        self.arrived[place].wait()

    def free(self, place):
        """What computed until here was the last to read the place."""
        self.used[place].record()


def _room(weight):
    return -(-weight.nbytes // ALIGNED) * ALIGNED
