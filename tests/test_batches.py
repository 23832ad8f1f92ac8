"""What a micro-step trains on: each number from its own stream, from (seed, step, slot) alone."""

import json

import numpy as np
import pytest
import torch
from conftest import PIPELINE, change_cache, settings

from data.cache import Cache
from train.batches import Batches

TIMESTEPS = json.loads((PIPELINE / "scheduler" / "scheduler_config.json").read_text())["num_train_timesteps"]


def draw(run, step=0, slot=0, **values):
    values = settings("train", **{"train_batch_size": 4, "seed": 1} | values)
    return Batches(Cache(run.folder / "cache"), values, TIMESTEPS).draw(step, slot)


def test_each_switch_changes_its_own_numbers_alone(run):
    """One stream for all, and turning dropout on would change every noise after it: no two runs could be compared."""
    plain = draw(run)
    for name, changed in ((dict(proportion_empty_prompts=1.0), {"text", "pooled"}), (dict(noise_offset=0.3), {"eps"})):
        other = draw(run, **name)
        assert {k for k in plain if not torch.equal(plain[k], other[k])} == changed
    assert not draw(run, proportion_empty_prompts=1.0)["text"].any()


def test_every_slot_and_step_draws_anew_and_the_same_again(run):
    many = [draw(run, step, slot) for step in (0, 1) for slot in (0, 1)]
    for name in ("eps", "x0"):
        assert len({batch[name].sum().item() for batch in many}) == 4
    assert all(torch.equal(a, b) for a, b in zip(many[3].values(), draw(run, 1, 1).values()))


@pytest.mark.parametrize("start, slots", [(0, 2), (2, 3), (4, 1), (5, 2)])
def test_micro_batches_come_in_the_order_of_steps_and_slots(start, slots, run):
    """Drawn ahead of time: one skipped, doubled or begun at step 0 when going on would train on other pictures."""
    cache, values = Cache(run.folder / "cache"), settings("train", max_train_steps=5, gradient_accumulation_steps=slots)
    batches = Batches(cache, values, TIMESTEPS)
    found = list(batches.ahead(start))
    wanted = [batches.draw(step, slot) for step in range(start, 5) for slot in range(slots)]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_noise_offset_is_one_constant_per_channel(run):
    """0.3 times a number that is the same over a channel's pixels, another in each, of deviation 1."""
    shifts = torch.cat([draw(run, step, noise_offset=0.3)["eps"] - draw(run, step)["eps"] for step in range(100)]) / 0.3
    assert shifts.std(dim=(2, 3)).max() < 1e-5
    constants = shifts[:, :, 0, 0].flatten()
    assert (
        len(constants) == 1600 and abs(constants.mean()) < 0.1 and constants.std().item() == pytest.approx(1, rel=0.1)
    )


def test_latents_are_drawn_from_the_cached_posterior(run):
    """mean + std · noise, scaled: over many draws of one picture the cached posterior comes back."""
    cache = Cache(run.folder / "cache")
    found, scale, values = [], cache.manifest["scaling_factor"], settings("train", train_batch_size=4, seed=1)
    for step in range(300):
        rows = Batches(cache, values, TIMESTEPS).rows(step, 0)
        if 2 in rows:
            found.append(draw(run, step)["x0"][rows.index(2)])
    row = cache.posteriors[0][cache.index[2]["picture"]].astype(np.float32)
    x0 = torch.stack(found)
    assert len(found) > 100
    standard = (x0 - scale * torch.from_numpy(row[0])) / (scale * torch.from_numpy(row[1]))
    assert abs(standard.mean()) < 0.02 and standard.std().item() == pytest.approx(1, rel=0.02)


def test_timesteps_and_dropped_captions_have_their_shares(run):
    many = [draw(run, step, train_batch_size=8, proportion_empty_prompts=0.25) for step in range(200)]
    t = torch.cat([b["t"] for b in many])
    assert t.min() < 10 and t.max() > 989 and abs(t.float().mean() - 499.5) < 25
    dropped = torch.cat([~b["text"].flatten(1).any(1) for b in many])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_either_of_picture_and_mirror_image_is_drawn(run, fresh):
    """With the index's two entries apart, both come, about as often, and whether or not the caption is dropped."""

    def apart(index):
        index["picture"], index["mirrored"] = 0, 1
        return index

    change_cache(fresh, apart)
    cache = Cache(fresh / "cache")
    means = [
        torch.from_numpy(cache.posteriors[0][i][0].astype(np.float32)) * cache.manifest["scaling_factor"]
        for i in (0, 1)
    ]
    values = settings("train", train_batch_size=8, seed=1, proportion_empty_prompts=0.5)
    many = [Batches(cache, values, TIMESTEPS).draw(step, 0) for step in range(25)]
    drawn = torch.cat([b["x0"] for b in many])
    dropped = torch.cat([~b["text"].flatten(1).any(1) for b in many])
    distance = torch.stack([(drawn - mean).square().mean(dim=(1, 2, 3)) for mean in means])
    assert (distance.amax(0) > 4 * distance.amin(0)).all()  # each draw is clearly of one of the two
    mirrored = distance[1] < distance[0]
    for share in (mirrored, mirrored == dropped):
        assert 0.35 < share.float().mean() < 0.65


def test_each_of_several_captions_is_drawn_and_nothing_else_changes(run, fresh):
    """Their stream is their own: every other number is what it is with one caption for each picture."""

    def three(index):
        index["captions"], index["first_caption"] = 3, index["first_caption"].clip(max=len(index) - 3)
        return index

    plain = [draw(run, step) for step in range(60)]
    change_cache(fresh, three)
    cache, values = Cache(fresh / "cache"), settings("train", train_batch_size=4, seed=1)
    batches, drawn = Batches(cache, values, TIMESTEPS), []
    for step, one in enumerate(plain):
        batch = batches.draw(step, 0)
        assert all(torch.equal(batch[name], one[name]) for name in one if name not in ("text", "pooled"))
        for row, text in zip(batches.rows(step, 0), batch["text"]):
            first = cache.index["first_caption"][row]
            texts = [cache.captions[cache.caption_rows[first + i]][: text.numel()] for i in range(3)]
            drawn.append([np.array_equal(text.flatten(), one) for one in texts].index(True))
    assert min(np.bincount(drawn, minlength=3)) > 50 and len(drawn) == 240
