"""What resume reads: the same numbers back, the one before when damaged, and never another run's."""

import pytest
import torch
from torch import nn

from data.safe import UserError
from lora.inject import inject
from train.state import load_state, save_state

IDENTITY = dict(seed=42, rank=4, learning_rate=1e-4, lr_scheduler="cosine", use_8bit_adam=False, base="x", cache="y")
IDENTITY |= dict(max_train_steps=10, output_dir="a", checkpointing_steps=5)


class Attention(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class Setup:
    """Adapters, their optimizer and scaler, as the loop makes them."""

    def __init__(self, seed=0, kind=torch.optim.AdamW, fp16=False):
        self.adapters = inject(nn.Sequential(Attention()), 4, 4.0, seed)
        self.optimizer = kind([self.adapters.vector], lr=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16)

    def step(self, number):
        """A step whose gradient depends on its number alone."""
        g = torch.Generator().manual_seed(number)
        self.scaler.scale(torch.zeros(()))  # creates the scale
        self.adapters.vector.grad.copy_(self.scaler.get_scale() * torch.randn(self.adapters.vector.shape, generator=g))
        if number == 2 and self.scaler.is_enabled():
            self.adapters.vector.grad[0] = torch.inf
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self

    def save(self, folder, step, **changes):
        save_state(folder, step, self.adapters, self.optimizer, self.scaler, IDENTITY | changes)

    def load(self, folder, **changes):
        return load_state(folder, self.adapters, self.optimizer, self.scaler, IDENTITY | changes)


def adamw8bit(*args, **kwargs):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(*args, **kwargs)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, adamw8bit])
@pytest.mark.parametrize("fp16", [False, True])
def test_going_on_equals_never_having_stopped(kind, fp16, tmp_path):
    """Bit for bit: a moment, a quantile map, a step count or the loss scale forgotten would show after the next step."""
    straight = Setup(kind=kind, fp16=fp16)
    for number in range(3):
        straight.step(number)
    straight.save(tmp_path, 3)
    resumed = Setup(seed=9, kind=kind, fp16=fp16)  # another start: everything must come from the file
    assert resumed.load(tmp_path) == 3
    assert resumed.scaler.get_scale() == straight.scaler.get_scale() == (2.0**15 if fp16 else 1.0)
    for number in range(3, 6):
        straight.step(number), resumed.step(number)
        assert torch.equal(resumed.adapters.vector, straight.adapters.vector)
    layer = next(iter(resumed.adapters.layers.values()))
    assert layer.A.data_ptr() == resumed.adapters.vector.data_ptr()  # still views: the model got the numbers


def test_nothing_saved_is_step_0_and_changes_nothing(tmp_path):
    setup = Setup()
    before = setup.adapters.vector.detach().clone()
    assert setup.load(tmp_path / "state") == 0
    assert torch.equal(setup.adapters.vector, before)


def test_the_last_two_are_kept(tmp_path):
    setup = Setup().step(0)
    for step in (1, 2, 30, 400):
        setup.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000030.state", "000400.state"]


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b"")],
    ids=["bit", "truncated", "empty"],
)
def test_a_damaged_state_is_said_and_passed_over_and_all_damaged_stops(damage, tmp_path, capsys):
    """Silently starting from 0 would overwrite a night's work."""
    setup = Setup().step(0)
    setup.save(tmp_path, 1)
    first = setup.adapters.vector.detach().clone()
    setup.step(1).save(tmp_path, 2)
    damage(tmp_path / "000002.state")
    resumed = Setup(seed=9)
    assert resumed.load(tmp_path) == 1
    assert "000002.state: damaged" in capsys.readouterr().out
    assert torch.equal(resumed.adapters.vector, first)
    damage(tmp_path / "000001.state")
    untouched = Setup(seed=9)
    before = untouched.adapters.vector.detach().clone()
    with pytest.raises(UserError, match="every state is damaged"):
        untouched.load(tmp_path)
    assert torch.equal(untouched.adapters.vector, before)


def test_every_field_but_the_three_that_may_change_is_held(tmp_path):
    """Resumed with another seed or cache, a run is a mixture that nobody can repeat."""
    Setup().step(0).save(tmp_path, 1)
    for name, value in IDENTITY.items():
        other = {name: 7 if not isinstance(value, str) else "other"}
        if name in ("max_train_steps", "output_dir", "checkpointing_steps"):
            assert Setup().load(tmp_path, **other) == 1
        else:
            setup = Setup(seed=9)
            before = setup.adapters.vector.detach().clone()
            with pytest.raises(UserError, match=rf"\b{name} {value} there and {other[name]} here"):
                setup.load(tmp_path, **other)
            assert torch.equal(setup.adapters.vector, before)  # refused before anything was loaded


def test_a_field_that_one_side_lacks_differs(tmp_path):
    """A state from before a flag existed must not pass for a run with it."""
    setup = Setup().step(0)
    setup.save(tmp_path, 1, brand_new=3)
    with pytest.raises(UserError, match="brand_new 3 there and None here"):
        setup.load(tmp_path)
