"""Whether the numbers of a step are fit to be used, and where they went wrong when they are not."""

import math
from functools import partial

import torch

from data.common.errors import NumbersError
from train.graph import Eager

SHOWN = 8  # names and timesteps in a message
MOST_OVERFLOWS = 20  # in a row; each halves the loss scale, and after 166 it is 0 and NaN goes into the weights


class Health:
    """Counts fp16 overflows, and stops the run before numbers that are not finite can reach the weights."""

    def __init__(self, scaler):
        self.scaler, self.overflows = scaler, 0

    def check(self, loss, grad_norm):
        """Look at one step's loss and gradient norm, floats, before the optimizer uses them.

        A gradient that overflowed fp16 is what GradScaler is for: it skips the step and halves the scale. Raises
        NumbersError for a loss that is not finite, for a gradient that is not without fp16, and for overflows without
        end.
        """
        if not math.isfinite(loss):
            raise NumbersError(f"the loss is {loss}")
        self.overflows = 0 if math.isfinite(grad_norm) else self.overflows + 1
        if self.overflows and not self.scaler.is_enabled():
            raise NumbersError(f"the gradient is {grad_norm}; try a lower --learning_rate")
        if self.overflows == MOST_OVERFLOWS:
            raise NumbersError(
                f"the gradient overflowed fp16 {MOST_OVERFLOWS} times in a row; "
                "try --mixed_precision bf16 or a lower --learning_rate"
            )


def give_up(run, writer, forward, step, error):
    """-> the error that ends a run whose step has numbers that cannot be used. What was good until there is saved.

    forward: tensors by name -> squared errors.
    """
    if step:
        writer.keep_state(step)
    run.micro_step = run.validation = None  # captured graphs hold the memory that the forwards need now
    torch.cuda.empty_cache()
    where = describe(run.unet, run.adapters, Eager(forward, run.device), run.batches, step)
    kept = f"; {run.folder / 'state'} has step {step}" if step else ""
    return NumbersError(f"{error} ({where}){kept}")


@torch.no_grad()
def describe(unet, adapters, forward, batches, step):
    """What a step trained on and where its numbers went wrong, in words: every forward of it is run again.

    forward(batch) -> loss; batches: the run's Batches.
    """
    names, drawn, timesteps = [], [], []
    for slot in range(batches.settings.gradient_accumulation_steps):
        drawn.append(batches.draw(step, slot))
        names += batches.cache.names(batches.rows(step, slot))
        timesteps += drawn[-1]["t"].tolist()

    def culprit():
        return next(filter(None, (first_not_finite(unet, partial(forward, batch)) for batch in drawn)), None)

    wrong = culprit()
    adapters.set_scale(0)
    if wrong and not culprit():  # the pictures are not to blame
        return f"step {step + 1}: the LoRA's weights are too large, lower --learning_rate"
    where = f"the first output that is not finite is {wrong}'s" if wrong else "every module's output is finite"
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"step {step + 1}, {shown}, timesteps {timesteps[:SHOWN]}; {where}"


def first_not_finite(model, run):
    """Name of the first module of `model`, in the order of run(), whose output is not finite; None where all are.

    run(): the forward that went wrong, once more.
    """
    found = []

    def look(name, output):
        tensor = output[0] if isinstance(output, tuple) else output
        if not found and torch.is_tensor(tensor) and not tensor.isfinite().all():
            found.append(name)

    # All modules, because what LoRA, GEGLU and group norm make is no leaf's output. An inner module is done before
    # the one around it.
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
