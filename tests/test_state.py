"""What resume reads: the same numbers back, the one before when damaged, and never another run's."""

import hashlib
import json
import re
import struct
from dataclasses import asdict

import pytest
import torch
from conftest import settings
from torch import nn

from data.common.errors import UserError
from lora.inject import inject
from train.same_run import DEFAULTS
from train.state import read_state, restore, save_state

IDENTITY = asdict(settings("train", lr_scheduler="cosine", output_dir="a")) | dict(base="x", cache="y")
PLAN = dict(recomputed=["a.b"], made_for=dict(vram_gib=8.0))
BEST = dict(step=2, difference=-0.25)


class Attention(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class Setup:
    """Adapters, their optimizer and scaler, as the loop makes them."""

    def __init__(self, seed=0, kind=torch.optim.AdamW, fp16=False):
        base = nn.Sequential(Attention())
        self.adapters = inject(base.half() if fp16 else base, 4, 4.0, seed)
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
        save_state(folder, step, self.adapters, self.optimizer, self.scaler, IDENTITY | changes, PLAN, BEST, 1)

    def load(self, folder, **changes):
        return restore(read_state(folder, IDENTITY | changes), self.adapters, self.optimizer, self.scaler)


def adamw8bit(*args, **kwargs):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(*args, **kwargs)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, adamw8bit])
@pytest.mark.parametrize("fp16", [False, True])
def test_going_on_equals_never_having_stopped(kind, fp16, tmp_path):
    """Bit for bit: a moment, quantile map, step count or loss scale that is forgotten shows after the next step."""
    straight = Setup(kind=kind, fp16=fp16)
    for number in range(3):
        straight.step(number)
    straight.save(tmp_path, 3)
    resumed = Setup(seed=9, kind=kind, fp16=fp16)  # another start: everything must come from the file
    assert resumed.load(tmp_path) == (3, PLAN, BEST)
    for part, master in zip(resumed.adapters.parameters, straight.adapters.masters):
        assert torch.equal(part, master.to(part.dtype))  # the model got the numbers
    assert resumed.scaler.get_scale() == straight.scaler.get_scale() == (2.0**15 if fp16 else 1.0)
    for number in range(3, 6):
        straight.step(number), resumed.step(number)
        assert torch.equal(resumed.adapters.vector, straight.adapters.vector)


def test_nothing_saved_is_step_0_and_changes_nothing(tmp_path):
    setup = Setup()
    before = setup.adapters.vector.detach().clone()
    assert setup.load(tmp_path / "state") == (0, None, None)
    assert torch.equal(setup.adapters.vector, before)


def test_the_last_two_are_kept(tmp_path):
    setup = Setup().step(0)
    for step in (1, 2, 30, 999_999, 1_000_000):
        setup.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1000000.state", "999999.state"]
    assert setup.load(tmp_path) == (1_000_000, PLAN, BEST)  # by number: as text it would be the older one


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
    assert resumed.load(tmp_path) == (1, PLAN, BEST)
    assert "000002.state: damaged" in capsys.readouterr().out
    assert torch.equal(resumed.adapters.vector, first)
    damage(tmp_path / "000001.state")
    untouched = Setup(seed=9)
    before = untouched.adapters.vector.detach().clone()
    with pytest.raises(UserError, match="every state is damaged"):
        untouched.load(tmp_path)
    assert torch.equal(untouched.adapters.vector, before)


FREE = {"output_dir", "cache_dir", "restart", "max_train_steps", "num_train_epochs", "checkpointing_steps"}
FREE |= {"vram_gib", "gradient_checkpointing", "no_cuda_graph"}
FREE |= {"validation_steps", "report_to", "push_to_hub", "hub_model_id", "private"}


def test_every_flag_but_those_that_may_change_is_held(tmp_path):
    """Resumed with another seed or cache, a run is a mixture that nobody can repeat. New flags are held as well."""
    Setup().step(0).save(tmp_path, 1)
    assert IDENTITY.keys() > FREE
    for name, value in IDENTITY.items():
        other = {name: 7 if not isinstance(value, str) else "other"}
        if name in FREE:
            assert Setup().load(tmp_path, **other) == (1, PLAN, BEST)
        else:
            words = dict(cache="other rows in the cache", network_weights="begun without a file of weights, and one is")
            said = words.get(name, f"{name} {value} there, {other[name]} here")
            setup = Setup(seed=9)
            before = setup.adapters.vector.detach().clone()
            with pytest.raises(UserError, match=re.escape(said)):
                setup.load(tmp_path, **other)
            assert torch.equal(setup.adapters.vector, before)  # refused before anything was loaded


def test_a_field_that_no_flag_has_differs(tmp_path):
    """A state of a later version, with a flag that this one does not know, must not pass for a run without it."""
    setup = Setup().step(0)
    setup.save(tmp_path, 1, brand_new=3)
    with pytest.raises(UserError, match="brand_new 3 there, None here"):
        setup.load(tmp_path)


def test_a_flag_that_a_state_lacks_had_its_default(tmp_path, monkeypatch):
    """Every later flag would orphan the runs before it."""
    monkeypatch.setattr("train.same_run.DEFAULTS", DEFAULTS | dict(later=1.5))
    setup = Setup().step(0)
    setup.save(tmp_path, 1)
    assert setup.load(tmp_path, later=1.5) == (1, PLAN, BEST)
    with pytest.raises(UserError, match="later 1.5 there, 2.0 here"):
        setup.load(tmp_path, later=2.0)


def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch):
    """Its vector has another order: read as it is, every layer would start from another one's numbers."""
    monkeypatch.setattr("train.state.VERSION", 1)
    Setup().step(0).save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="written by another version of this program; use another --output_dir"):
        Setup().load(tmp_path)


def test_a_damaged_state_does_not_count_as_one_of_those_that_are_kept(tmp_path):
    """Counted, it would push a good one out, and the next damage would be the end of the run."""
    setup = Setup().step(0)
    for step in (1, 2):
        setup.save(tmp_path, step)
    flip(tmp_path / "000002.state")
    assert setup.load(tmp_path) == (1, PLAN, BEST)
    setup.save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("*.state")) == ["000001.state", "000003.state"]
    assert (tmp_path / "000002.damaged").exists()


ODD = {  # a field of the facts, and what it becomes
    "step": -1,
    "numbers": {"optimizer.step": "x"},
    "scaler": {"scale": float("inf")},
    "identity": [],
    "plan": {"recomputed": "a.b"},
    "new": "field",
}


def forged(path, change):
    """Write the state again with change(header, facts), under a right checksum."""
    blob = path.read_bytes()[:-32]
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["state"])
    change(header, facts)
    header["__metadata__"]["state"] = json.dumps(facts)
    text = json.dumps(header).encode()
    blob = struct.pack("<Q", len(text)) + text + blob[8 + size :]
    path.write_bytes(blob + hashlib.sha256(blob).digest())


def test_a_state_of_before_there_was_a_best_save_goes_on(tmp_path):
    Setup().step(1).save(tmp_path, 1)
    forged(tmp_path / "000001.state", lambda header, facts: facts.pop("best"))
    assert Setup().load(tmp_path) == (1, PLAN, None)


@pytest.mark.parametrize("field", ODD)
def test_facts_that_parse_and_are_odd_are_refused_by_their_field(field, tmp_path):
    """A right checksum says who wrote the bytes last, not that they make sense."""
    Setup().step(1).save(tmp_path, 1)
    forged(tmp_path / "000001.state", lambda header, facts: facts.update({field: ODD[field]}))
    with pytest.raises(UserError, match=f"000001.state: .*{field}|not a state of this program .*finite"):
        Setup().load(tmp_path)


TENSORS = {
    "no vector": lambda header, facts: header.pop("vector"),
    "another dtype": lambda header, facts: header["vector"].update(dtype="I32"),
    "a moment is missing": lambda header, facts: header.pop("optimizer.exp_avg"),
    "another name": lambda header, facts: header.update(x=header.pop("optimizer.exp_avg")),
    "another shape": lambda header, facts: header["vector"].update(shape=[2, header["vector"]["shape"][0] // 2]),
    "no offsets": lambda header, facts: header["vector"].pop("data_offsets"),
    "another scaler": lambda header, facts: facts["scaler"].update(scale=1.0),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_a_states_are_refused(case, tmp_path):
    Setup().step(1).save(tmp_path, 1)
    forged(tmp_path / "000001.state", TENSORS[case])
    with pytest.raises(UserError, match="state.*use another --output_dir or --restart"):
        Setup().load(tmp_path)
