"""Blocks in RAM: the same bits, whatever the forward's order, and never more on the device than was counted."""

import copy

import pytest
import torch
from conftest import NARROW, SDXL, inject_filled, predict, unet_inputs
from diffusers import UNet2DConditionModel

from data.common.errors import MachineError
from infer import memory, streamed
from infer.memory import PLACES
from infer.streamed import Streamed
from lora.attention import fuse_projections

CPU = torch.device("cpu")


class Late:
    """In place of Copies: a copy is made when it is waited for, and until then its place holds garbage."""

    pinned = False

    def __init__(self, device):
        self.coming, self.made, self.started = {}, [], 0

    def start(self, place, target, source):
        target.fill_(0x7F)  # not a number in fp16, a huge one in fp32
        self.coming[place] = target, source
        self.started += 1

    def wait(self, place):
        if place in self.coming:
            target, source = self.coming.pop(place)
            target.copy_(source)
            self.made.append(source.data_ptr())

    def free(self, place):
        assert place not in self.coming


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(streamed, "Copies", Late)


def streaming(unet, names):
    """-> (a copy of `unet` whose blocks of these names are streamed, its Streamed)"""
    unet = copy.deepcopy(unet)
    fuse_projections(unet)
    return unet, Streamed(unet, names, CPU)


@torch.no_grad()
def same(unet, other, seed):
    inputs = unet_inputs(seed=seed)
    return torch.equal(predict(unet, inputs), predict(other, inputs))


@pytest.mark.parametrize("count", [1, 2, 3, 5, None])
def test_the_same_bits_over_several_forwards_with_a_lora_and_without(count, unet, late):
    names = list(memory.blocks(unet))
    chosen = memory._spread(names, count or len(names))
    assert len(set(chosen)) == (count or len(names))
    other, _ = streaming(unet, chosen)
    fuse_projections(unet)
    assert same(unet, other, 0) and same(unet, other, 1)
    adapters = [inject_filled(model) for model in (unet, other)]
    assert same(unet, other, 2)
    for model, some in zip((unet, other), adapters):
        some.take_out(model)
    assert same(unet, other, 3)


@pytest.mark.slow
def test_each_block_is_fetched_once_in_a_forward_and_before_it_is_needed(unet, late):
    names = list(memory.blocks(unet))
    assert len(names) % 2 and len(names) > 5  # an odd number: the last and the first share a place
    other, blocks = streaming(unet, names)
    for seed in range(3):
        same(unet, other, seed)
    assert blocks.copies.made == [source.data_ptr() for source in blocks.ram] * 3
    assert blocks.copies.started == 3 * len(names) + PLACES  # those of the next forward are on their way
    at = [weight.data_ptr() - blocks.places.data_ptr() for block in blocks.blocks for weight in block.parameters()]
    assert min(at) == 0 and max(at) < blocks.places.nbytes and not any(place % 512 for place in at)


def test_another_order_is_slower_and_right(unet, late):
    other, blocks = streaming(unet, list(memory.blocks(unet))[::-1])
    fuse_projections(unet)
    assert same(unet, other, 0) and same(unet, other, 1)
    assert len(blocks.copies.made) >= 2 * len(blocks.ram)


@pytest.mark.parametrize("middle, count", [("UNetMidBlock2DCrossAttn", 87), ("UNetMidBlock2D", 76), (None, 75)])
def test_the_order_is_that_of_a_forward_and_nothing_is_left_out(middle, count):
    unet, seen = UNet2DConditionModel(**SDXL | NARROW | dict(mid_block_type=middle)), []
    names = list(memory.blocks(unet))
    assert len(names) == count == len(set(names))
    for name in names:
        unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    condition = dict(text_embeds=torch.zeros(1, 16), time_ids=torch.zeros(1, 6))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 77, 16), added_cond_kwargs=condition)
    assert seen == names


def test_too_little_ram_is_said(unet, late, monkeypatch):
    monkeypatch.setattr("data.common.system.free_memory", lambda: 2**20)
    with pytest.raises(MachineError, match="what of the UNet the GPU cannot hold needs 0.* GiB of RAM"):
        streaming(unet, list(memory.blocks(unet)))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 7, None])
def test_on_a_gpu_as_well(count, unet):
    device, names = torch.device("cuda"), list(memory.blocks(unet))
    fuse_projections(unet)
    other = copy.deepcopy(unet)
    Streamed(other, memory._spread(names, count or len(names)), device)
    unet, other = unet.to(device), other.to(device)
    inputs = unet_inputs(side=16)
    args, condition = inputs[0], inputs[1]["added_cond_kwargs"]
    inputs = [x.to(device) for x in args], dict(added_cond_kwargs={k: v.to(device) for k, v in condition.items()})
    with torch.inference_mode():
        assert all(torch.equal(predict(unet, inputs), predict(other, inputs)) for _ in range(20))
