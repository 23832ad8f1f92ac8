"""Which blocks to recompute under a memory budget.

A block (SDXL has 86: 16 resnets, 70 transformer blocks) either keeps its activations for the backward, or keeps its
input alone and computes the rest again. One run in which every block recomputes, which takes the least memory, tells
three things of each: what it would keep (extra), how long computing it again takes (seconds), and the most memory in
use from its start to the next block's, forward or backward (peak). A block that keeps its activations adds its extra
to the peaks of all that come after it.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from data import check
from data.common.errors import MachineError, UserError
from train.graph import on_side_stream, seconds

UNUSED = 5 * 2**26  # bytes that the allocator holds without using them, beside the holes below
GRAPH = 2**26  # bytes that a captured graph takes beside the allocator


@dataclass
class Block:
    """What one block costs; bytes and seconds."""

    name: str
    extra: int
    seconds: float
    peak: int = 0


def recompute(unet, names):
    """Let the blocks of these names compute their activations again in the backward; None means every block."""
    try:
        chosen = None if names is None else {unet.get_submodule(name) for name in names}
    except AttributeError as error:  # the names come from a state
        raise UserError(f"the run's plan is of another UNet ({error}); use another --output_dir or --restart") from None

    def call(block, *args):
        return _checkpoint(block, *args) if chosen is None or block in chosen else block(*args)

    unet.enable_gradient_checkpointing(call)


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random


def peak(blocks, kept):
    """Most bytes held when the blocks at the indices in `kept` keep their activations and the others recompute.

    The allocator holds more than is in use, in holes as large as the tensors that come and go. At SDXL's size 0.16 to
    0.25 GiB were measured at batch 1 and 0.26 to 0.45 at batch 4, where the largest block keeps 0.09 and 0.36; more in
    use does not mean more holes (tests/bench/NOTES.md).
    """
    most = before = 0
    for i, block in enumerate(blocks):
        most = max(most, block.peak + before)
        before += block.extra * (i in kept)
    return most + UNUSED + max(block.extra for block in blocks) // 2


def choose(blocks, budget, beside=0):
    """Indices of the blocks to keep: those that save the most time for their memory, as many as fit.

    budget: the allocator's. Raises MachineError with the smallest --vram_gib that would do, in which the bytes `beside`
    the allocator are counted.
    """
    least = peak(blocks, set())
    if least > budget:
        smallest = math.ceil((least + beside) / 2**30 * 100) / 100
        raise MachineError(
            f"the memory is too small: at least --vram_gib {smallest:.2f} is needed, with every block recomputed, and "
            f"{(budget + beside) / 2**30:.2f} are there; use a smaller --train_batch_size, --rank or --resolution, or "
            "--base_precision nf4 where it is not that already"
        )
    kept = set()
    for i in sorted(range(len(blocks)), key=lambda i: blocks[i].seconds / max(1, blocks[i].extra), reverse=True):
        if peak(blocks, kept | {i}) <= budget:
            kept.add(i)
    return kept


def measure(unet, step):
    """The blocks of `unet` in the order of a forward. step(): one forward and backward on the GPU."""
    names, blocks, kinds = {module: name for name, module in unet.named_modules()}, [], {}
    now = -1  # the block that began last

    def begins(i):
        nonlocal now
        if now >= 0:
            blocks[now].peak = max(blocks[now].peak, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        now = i

    def call(block, *args):
        begins(now)
        kind = type(block), *(part.shape for part in (*args, *block.parameters()) if torch.is_tensor(part))
        if kind not in kinds:
            kinds[kind] = _alone(block, args)
        blocks.append(Block(names[block], *kinds[kind]))
        i = len(blocks) - 1

        def watched(*args):  # called in forward, and again before the block's backward
            begins(i)
            return block(*args)

        torch.cuda.reset_peak_memory_stats()
        return _checkpoint(watched, *args)

    unet.enable_gradient_checkpointing(call)
    step()
    begins(0)
    return blocks


def _alone(block, args):
    """(extra, seconds) of one block, run by itself."""
    args = [arg.detach().requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
    took = seconds(partial(_without_gradient, block, args))
    before = torch.cuda.memory_allocated()
    output = block(*args)
    return torch.cuda.memory_allocated() - before - output.nbytes, took


@torch.no_grad()
def _without_gradient(block, args):
    return block(*args)


def make(vram_gib, gradient_checkpointing, unet, step, device, state_bytes, before, pictures=0, shapes=1):
    """The run's plan, a dict that is kept with its state; what was decided is printed in one line.

    vram_gib, gradient_checkpointing: the flags. step(): one forward and backward of the largest shape, eagerly.
    state_bytes: what the optimizer will hold that is not allocated yet. before: the plan in the run's state; it holds
    as long as it was made for the same flags and device. pictures: bytes that drawing takes next to what a step holds.
    shapes: how many shapes of batches there are, each with a graph of its own.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made_for = dict(vram_gib=vram_gib, gradient_checkpointing=gradient_checkpointing, device=name)
    if pictures:  # else a plan is what it was before there were any
        made_for["pictures"] = pictures
    # On a CPU the last bits of a sum depend on how many threads make it, so that number stays with the run
    threads = (before or {}).get("threads", torch.get_num_threads())
    torch.set_num_threads(threads)
    if before and before["made_for"] == made_for:
        return before
    made = dict(made_for=made_for, threads=threads)
    if vram_gib and device.type != "cuda":
        print("--vram_gib is about a GPU's memory; there is none, and nothing is recomputed")
    if gradient_checkpointing or device.type != "cuda":
        return made | dict(recomputed=None if gradient_checkpointing else [])
    blocks = on_side_stream(partial(measure, unet, step))
    torch.cuda.empty_cache()
    budget, beside = check.room(vram_gib, device, GRAPH * shapes)
    for block in blocks:
        block.peak += state_bytes + pictures
    if pictures:
        print(f"memory: {pictures / 2**30:.2f} GiB are kept for pictures of the validation prompts", flush=True)
    kept = choose(blocks, budget, beside)
    recomputed = [block.name for i, block in enumerate(blocks) if i not in kept]
    predicted = peak(blocks, kept) + beside
    print(
        f"memory: budget {(budget + beside) / 2**30:.2f} GiB, predicted peak {predicted / 2**30:.2f} GiB, "
        f"{beside / 2**30:.2f} of both for CUDA itself and other programs; "
        f"{len(recomputed)} of {len(blocks)} blocks recomputed",
        flush=True,
    )
    return made | dict(recomputed=recomputed)
