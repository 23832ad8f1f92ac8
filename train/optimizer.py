"""AdamW over the adapters' one flat vector, what it keeps, and its learning rate at every step."""

from functools import partial

import torch
from diffusers.optimization import get_scheduler

from data.common.errors import UserError
from data.common.imports import COMPILER, without

CYCLES = 3  # of cosine_with_restarts; with diffusers' own default, one, it would be cosine
POLYNOMIALS_END = 1e-7  # the learning rate that diffusers' polynomial schedule ends at
KEEPS = [  # the names of all that an optimizer keeps, in a state; bitsandbytes' keeps few weights in 32 bits
    [],  # before its first step
    ["step", "exp_avg", "exp_avg_sq"],
    ["step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"],
    ["step", "state1", "state2"],
]


def check_flags(settings):
    """Raise UserError when the optimizer or its schedule cannot do what the flags ask for."""
    if settings.lr_scheduler == "polynomial" and settings.learning_rate <= POLYNOMIALS_END:
        raise UserError(
            f"--learning_rate {settings.learning_rate}: polynomial ends at {POLYNOMIALS_END}; "
            "use a larger one or another --lr_scheduler"
        )
    if settings.lr_warmup_steps >= settings.max_train_steps:
        print(
            f"warning: --lr_warmup_steps {settings.lr_warmup_steps} is not less than --max_train_steps "
            f"{settings.max_train_steps}: the learning rate only warms up and never gets to "
            f"--learning_rate {settings.learning_rate:g}"
        )


def make_optimizer(vector, settings):
    """AdamW over `vector`, its state in 8 bits with --use_8bit_adam."""
    kind = partial(torch.optim.AdamW, fused=vector.is_cuda)  # one kernel, which makes no copies of the vector
    if settings.use_8bit_adam:
        with without(*COMPILER):
            from bitsandbytes.optim import AdamW8bit as kind
    return kind([vector], lr=settings.learning_rate, weight_decay=settings.adam_weight_decay)


def bytes_of_a_weight(settings):
    """What the optimizer keeps of each weight: two moments."""
    return 2 if settings.use_8bit_adam else 8


def learning_rate(optimizer, settings):
    """-> a function of the step alone, so that resuming needs no schedule's state: step -> learning rate."""
    warmup, steps = settings.lr_warmup_steps, settings.max_train_steps
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=settings.lr_num_cycles or CYCLES,
    )
    (factor,) = schedule.lr_lambdas
    return lambda step: settings.learning_rate * factor(step)
