"""When numbers stop a run, and when they do not."""

import math

import pytest
import torch
from conftest import inject_filled, unet_inputs
from torch import nn

from data.common.errors import NumbersError
from train.health import MOST_OVERFLOWS, Health, first_not_finite


def health(fp16):
    return Health(torch.amp.GradScaler("cpu", enabled=fp16))


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(loss, fp16):
    """fp16 or not: the scaler skips bad gradients, but a NaN loss comes from weights or data."""
    with pytest.raises(NumbersError, match="the loss is (nan|inf)"):
        health(fp16).check(loss, 1.0)


def test_a_gradient_that_is_not_finite_stops_without_fp16():
    """Nothing would skip that step: NaN would be in the weights."""
    with pytest.raises(NumbersError, match="the gradient is nan; try a lower --learning_rate"):
        health(False).check(0.1, math.nan)


def test_overflows_are_counted_in_a_row_and_without_end_stop():
    watch = health(True)
    for _ in range(MOST_OVERFLOWS - 1):
        watch.check(0.1, math.inf)
    assert watch.overflows == MOST_OVERFLOWS - 1
    watch.check(0.1, 1.0)
    assert watch.overflows == 0
    for _ in range(MOST_OVERFLOWS - 1):
        watch.check(0.1, math.nan)
    with pytest.raises(NumbersError, match=f"{MOST_OVERFLOWS} times in a row"):
        watch.check(0.1, math.inf)


def test_it_stops_long_before_the_scale_reaches_zero():
    assert 2.0**16 / 2**MOST_OVERFLOWS > 2.0**-10


def test_the_first_module_with_an_output_that_is_not_finite_is_named():
    """In the order of the forward, not of the definition; and the hooks are gone afterwards."""
    model = nn.ModuleDict(
        dict(last=nn.Linear(2, 2), first=nn.Linear(2, 2), middle=nn.Sequential(nn.Linear(2, 2), nn.Identity()))
    )

    def run():
        return model["last"](model["middle"](model["first"](torch.ones(1, 2))))

    assert first_not_finite(model, run) is None
    with torch.no_grad():
        model["middle"][0].weight[0, 0] = torch.inf
    assert first_not_finite(model, run) == "middle.0"
    with torch.no_grad():
        model["first"].bias[1] = torch.nan
    assert first_not_finite(model, run) == "first"
    assert not any(module._forward_hooks for module in model.modules())


def test_what_a_layer_makes_of_its_parts_is_the_layers(unet):
    """LoRA's sum is the output of neither the base nor of A and B: the next module would be blamed."""
    adapters, (args, kwargs) = inject_filled(unet), unet_inputs()
    name, layer = list(adapters.layers.items())[5]
    with torch.no_grad():
        layer.B[0, 0] = torch.inf
    assert first_not_finite(unet, lambda: unet(*args, **kwargs)) == name
