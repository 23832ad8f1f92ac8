"""Learning rates: what a schedule's name promises."""

import pytest
import torch
from conftest import settings

from train.optimizer import check_flags, learning_rate

STEPS = 24


def rates(**flags):
    chosen = settings("train", max_train_steps=STEPS, learning_rate=1.0, **flags)
    rate = learning_rate(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), chosen)
    return [rate(step) for step in range(STEPS)]


@pytest.mark.parametrize("cycles, warmup", [(None, 0), (2, 0), (4, 0), (2, 4)])
def test_cosine_with_restarts_restarts(cycles, warmup):
    """With one cycle, which is diffusers' default, it would be cosine without a word. Three without the flag."""
    found = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=cycles, lr_warmup_steps=warmup)[warmup:]
    length = len(found) // (cycles or 3)
    assert found[:length] == pytest.approx(found[length : 2 * length]) and found[length] == pytest.approx(1)
    assert found[:length] == sorted(found[:length], reverse=True) and found[length - 1] < 0.2
    assert sum(later > rate for rate, later in zip(found, found[1:])) == (cycles or 3) - 1


def test_a_warm_up_longer_than_the_run_is_said(capsys):
    """500 is diffusers' default, and more than many a first run has."""
    check_flags(settings("train", max_train_steps=10, lr_scheduler="cosine", lr_warmup_steps=10))
    assert "--lr_warmup_steps 10 is not less than --max_train_steps 10: the learning rate" in capsys.readouterr().out
    check_flags(settings("train", max_train_steps=11, lr_scheduler="cosine", lr_warmup_steps=10))
    assert capsys.readouterr().out == ""
