"""What a training says before its first step and after its last one."""

import shlex

from data.common.words import duration, many
from train.state import bytes_to_save


def before(run):
    """What will be trained, how, what that takes on the disk, and where it goes on from."""
    settings, pictures = run.settings, len(run.cache)
    slots, batch, steps = settings.gradient_accumulation_steps, settings.train_batch_size, settings.max_train_steps
    epochs = steps * slots * batch / run.cache.epoch
    repeated = f", repeated to {run.cache.epoch:,} an epoch" if run.cache.epoch > pictures else ""
    shared = f" on {run.ranks.count} GPUs" if run.ranks.count > 1 else ""
    print(
        f"{many(pictures, 'picture')}{repeated}, {int(run.cache.index['held_out'].sum()) or 'none'} held out; "
        f"batch {batch} × {slots} = {slots * batch} a step{shared}; {many(steps, 'step')} = {epochs:,.1f} epochs"
    )
    trained = sum(parameter.numel() for parameter in run.adapters.parameters)
    recomputed = run.memory_plan["recomputed"]
    blocks = "every block" if recomputed is None else many(len(recomputed), "block") if recomputed else "nothing"
    print(
        f"rank {settings.rank} on {len(run.adapters.projections())} projections, {trained / 1e6:,.2f} million weights; "
        f"--mixed_precision {settings.mixed_precision}, --base_precision {settings.base_precision}; {blocks} recomputed"
    )
    state, export, exports = bytes_to_save(
        settings, run.adapters.vector.numel(), run.start, run.validation.pictures > 0
    )
    print(
        f"a save after every {many(settings.checkpointing_steps, 'step')}: 2 states of {mib(state)} and "
        f"{exports} × {mib(export)} of weights; from step {run.start}",
        flush=True,
    )


def stopped(run, done):
    """How to go on after a signal."""
    command = "the same command without --restart" if run.settings.restart else "the same command"
    return f"stopped after step {done}, saved; run {command} to go on"


def after(run, seconds):
    """What is there now, and the next command."""
    weights, folder = run.folder / "lora.safetensors", shlex.quote(str(run.folder))
    if best := run.validation.best:
        path = run.folder / "lora-best.safetensors"
        there = path if path.exists() else f"but {path} is gone"
        print(f"lowest held-out loss of the saves: step {best['step']:.0f}, {there}")
    print(f'{weights} after {duration(seconds)}; next: python -m infer --output_dir {folder} --prompt "…"')


def mib(size):
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else "1 MiB"
