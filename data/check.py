"""python -m data.check [FOLDER]: is this machine fit for what was asked? Cheap questions, before hours are spent.

`make check` runs it, and then the whole line on two pictures.
"""

import importlib.util
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from data.common import disk, errors, ranks, safe, setup, system

ON_THE_CPU = "or set CUDA_VISIBLE_DEVICES=-1 to compute on the CPU, which is enough for the toy"
# Bytes beside torch's allocator: the most that CUDA and its libraries were seen to hold, and what of it is taken when
# the first kernels run.
CUDA, LIBRARIES = 15 * 2**26, 5 * 2**26
FP16 = (5, 3)  # the first compute capability whose GPUs calculate in it


def device():
    """Where to compute; that it is the CPU is said, because a driver that does not load makes an hour a month.

    Raises MachineError when there is a GPU that this torch cannot compute on, with what to choose instead.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:  # by torch, of a GPU that it cannot use, and at some length
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            _is_in_this_build(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
            return torch.device("cuda")
    for words in (str(warning.message) for warning in said):
        old = re.search(r"driver on your system is too old(?: \(found version (\d+)\))?", words)
        if old and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            knows = f"it knows CUDA {int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}" if old[1] else "it is older"
            raise errors.MachineError(
                f"the NVIDIA driver is too old for this torch ({torch.__version__}): {knows}, torch needs "
                f"{torch.version.cuda}; update the driver, install a torch of its CUDA (pytorch.org), {ON_THE_CPU}"
            )
        if not old:
            warnings.warn(words, stacklevel=2)
    if ranks.local_index() and has_nvidia() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        raise errors.MachineError(f"rank {ranks.index()} has no GPU: start at most as many processes as there are GPUs")
    print("no GPU here: the CPU computes", file=sys.stderr, flush=True)
    return torch.device("cpu")


def _is_in_this_build(capability, built):
    """Raise MachineError when a GPU of this (major, minor) runs nothing that torch was built for: ["sm_75", …].

    Machine code, sm_XY, runs where X is the same and Y not larger; compute_XY is compiled for any that came later.
    """
    import torch

    words = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", word) for word in built]
    kinds = [(word[1], (int(word[2]), int(word[3]))) for word in words if word]  # none where it is AMD's
    fits = any(version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in kinds)
    if kinds and not fits:
        old = capability < min(version for _, version in kinds)
        way = "choose another GPU (on Kaggle: T4 x2 instead of P100)" if old else "install a newer torch (pytorch.org)"
        raise errors.MachineError(
            f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]}) is too {'old' if old else 'new'} for "
            f"this torch ({torch.__version__}), which is built for {', '.join(built)}; "
            f"{way}, {ON_THE_CPU}"
        )


def has_nvidia():
    """Whether there seems to be an NVIDIA GPU, without the seconds that importing torch takes."""
    return shutil.which("nvidia-smi") is not None


def gpu_memory(config, dtype, device, base_precision):
    """Raise MachineError when the GPU cannot even hold a UNet of this config, of which nothing is needed on disk."""
    import torch
    from diffusers import UNet2DConditionModel

    from data.models.packed import bytes_of

    if device.type != "cuda":
        return
    with torch.device("meta"):
        needed = bytes_of(UNet2DConditionModel.from_config(config), dtype, base_precision)
    total = torch.cuda.mem_get_info(device)[1]
    if needed > total:
        dtype = str(dtype).removeprefix("torch.") if base_precision == "plain" else base_precision
        raise errors.MachineError(
            f"{torch.cuda.get_device_name(device)} has {total / 2**30:.1f} GiB, and the UNet's weights alone take "
            f"{needed / 2**30:.1f} in {dtype}; choose a larger GPU, {ON_THE_CPU}"
        )


def room(vram_gib, device, later):
    """-> bytes that the allocator may hold, and bytes beside it: what CUDA and other programs hold, and `later`.

    Together they are --vram_gib; without it, or where less is free, the first is what is free. Other programs that hold
    more than CUDA needs itself take no more than that from --vram_gib, because it is about this one.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device)
    beside = min(total - there, CUDA)
    if vram_gib:
        there = min(there, int(vram_gib * 2**30) - beside)
    return there - later, beside + later


def eight_bit_adam(settings):
    """-> train's settings, without --use_8bit_adam where its package is not installed, which is said.

    A run's state says which of the two it is of, so that none goes on as the other.
    """
    if not settings.use_8bit_adam or importlib.util.find_spec("bitsandbytes"):
        return settings
    print(
        "--use_8bit_adam: the package bitsandbytes is not installed; torch's AdamW keeps the state instead, in 32 bits "
        "and 4 times the memory",
        flush=True,
    )
    return replace(settings, use_8bit_adam=False)


def bitsandbytes(settings):
    """Raise UserError when train's settings ask for what only this package can do, and it is not installed."""
    if importlib.util.find_spec("bitsandbytes"):
        return
    if settings.base_precision == "nf4":
        raise errors.UserError(
            "--base_precision nf4: the package bitsandbytes is not installed; install it, or train in another "
            "--output_dir with --base_precision plain"
        )


def precision(setting, device):
    """Raises UserError when the GPU does not compute in what --mixed_precision asks for."""
    import torch

    if setting == "fp16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP16:
        name = torch.cuda.get_device_name(device)
        raise errors.UserError(f"--mixed_precision fp16: {name} has none; use no, or another GPU, {ON_THE_CPU}")
    if setting == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise errors.UserError(f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} has none; use fp16")


def gpu():
    """What the GPU is and can do, in one line."""
    import torch

    if device().type == "cpu":
        return "GPU: none; the CPU is enough for the toy, not for SDXL"
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
    major, minor = torch.cuda.get_device_capability()
    abilities = [
        "fp16",
        "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16",
        "flash attention" if major >= 8 else "memory-efficient attention",
    ]
    name = torch.cuda.get_device_name()
    return f"GPU: {name} ({major}.{minor}), {free:.1f} of {total:.1f} GiB free; {', '.join(abilities)}"


def main(argv):
    folder = Path(argv[0] if argv else ".").absolute()
    print("packages:", ", ".join(f"{name} {version}" for name, version in setup.fits().items()))
    print(gpu())
    print(f"memory: {system.free_memory() / 2**30:.1f} GiB free")
    print(f"disk: {disk.free_space(folder) / 2**30:.1f} GiB free for {folder}", flush=True)


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
