"""python -m data.check [FOLDER]: is this machine fit for what was asked? Cheap questions, before hours are spent.

`make check` runs it, and then the whole line on two pictures.
"""

import sys
from pathlib import Path

from data.common import disk, errors, safe, setup, system


def device():
    """Where to compute; that it is the CPU is said, because a driver that does not load makes an hour a month."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    print("no GPU here: the CPU computes", file=sys.stderr, flush=True)
    return torch.device("cpu")


def precision(setting, device):
    """Raises UserError when the GPU does not compute in what --mixed_precision asks for."""
    import torch

    if setting == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise errors.UserError(f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} has none; use fp16")


def gpu():
    """What the GPU is and can do, in one line."""
    import torch

    if not torch.cuda.is_available():
        return "GPU: none; the CPU is enough for the toy, not for SDXL"
    device = torch.device("cuda")
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
    major, minor = torch.cuda.get_device_capability(device)
    abilities = [
        "fp16",
        "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16",
        "flash attention" if major >= 8 else "memory-efficient attention",
    ]
    name = torch.cuda.get_device_name(device)
    return f"GPU: {name} ({major}.{minor}), {free:.1f} of {total:.1f} GiB free; {', '.join(abilities)}"


def main(argv):
    folder = Path(argv[0] if argv else ".").absolute()
    print("packages:", ", ".join(f"{name} {version}" for name, version in setup.fits().items()))
    print(gpu())
    print(f"memory: {system.free_memory() / 2**30:.1f} GiB free")
    print(f"disk: {disk.free_space(folder) / 2**30:.1f} GiB free for {folder}", flush=True)


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
