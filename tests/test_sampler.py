"""Randomness and order as functions of the position alone."""

import numpy as np
import torch

from data import sampler
from data.sampler import STREAMS, generator


def draw(*position):
    return tuple(torch.randn(4, generator=generator(*position)).tolist())


def test_every_position_and_stream_draws_its_own_numbers():
    """Two positions that share numbers would train on correlated noise; a sum of seed and step would do that."""
    positions = [
        (seed, stream, step, slot) for seed in (0, 1, 2) for stream in STREAMS for step in range(4) for slot in range(4)
    ]
    assert len({draw(*p) for p in positions}) == len(positions)


def test_a_later_stream_changes_no_earlier_one():
    """A stream's number is in every draw: a new name before the old ones, and runs would go on with other noise."""
    for i, stream in enumerate(("order", "noise", "timestep", "posterior", "dropout", "flip", "caption", "variant")):
        state = np.random.SeedSequence([3, i, 5, 7]).generate_state(1, np.uint64)
        wanted = torch.randn(4, generator=torch.Generator().manual_seed(int(state[0])))
        assert draw(3, stream, 5, 7) == tuple(wanted.tolist())


def test_draws_do_not_depend_on_what_was_drawn_before():
    """This makes a resumed run equal to one that was never stopped."""
    first = draw(1, "noise", 5, 2)
    torch.manual_seed(99)
    np.random.seed(99)
    generator(1, "noise", 4, 0), torch.rand(3)
    assert draw(1, "noise", 5, 2) == first


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    generator(1, "order", 0)
    sampler.rows(1, 0, 0, 1, 4, [10])
    assert torch.equal(torch.rand(3), wanted)


def stream(seed, steps, slots, batch, lengths):
    """[(bucket, position)] in the order of training."""
    micro = [sampler.rows(seed, step, slot, slots, batch, lengths) for step in range(steps) for slot in range(slots)]
    return [(bucket, row) for bucket, rows in micro for row in rows]


def test_every_example_once_per_epoch_in_an_order_of_its_own():
    """Also when the batch does not divide the data, nothing is dropped and nothing comes twice."""
    length = 10
    rows = [row for _, row in stream(0, 20, 1, 3, [length])]
    epochs = [rows[i : i + length] for i in range(0, 60, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert stream(1, 20, 1, 3, [length]) != stream(0, 20, 1, 3, [length])


def test_the_batch_may_be_larger_than_the_data():
    _, rows = sampler.rows(0, 0, 0, 1, 7, [3])
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_slots_split_one_order():
    """Two GPUs with two micro-steps each see, in one optimizer step, what one GPU with four sees."""
    for lengths in ([11], [5, 0, 17, 3]):
        assert stream(0, 6, 4, 2, lengths) == stream(0, 6, 1, 8, lengths)
    assert stream(0, 6, 4, 2, [11]) == stream(0, 12, 2, 2, [11])


def test_a_step_is_of_one_bucket_and_each_bucket_goes_round():
    """All examples of a bucket come once, then again in another order; what an epoch leaves over comes next."""
    lengths, steps, slots, batch = [7, 0, 20, 2], 200, 2, 2
    seen = {bucket: [] for bucket, _ in enumerate(lengths)}
    for step in range(steps):
        buckets = {sampler.rows(3, step, slot, slots, batch, lengths)[0] for slot in range(slots)}
        assert len(buckets) == 1
    for bucket, row in stream(3, steps, slots, batch, lengths):
        seen[bucket].append(row)
    assert not seen[1]
    for bucket, length in enumerate(lengths):
        whole = len(seen[bucket]) // length * length if length else 0
        rounds = [seen[bucket][i : i + length] for i in range(0, whole, length)] if length else []
        assert all(sorted(round) == list(range(length)) for round in rounds)
    epochs = steps * slots * batch / sum(lengths)
    for bucket, length in enumerate(lengths):  # no bucket falls behind by more than the step it waits for
        assert abs(len(seen[bucket]) - epochs * length) <= slots * batch + length
    order = [bucket for bucket, _ in stream(3, 40, 1, 4, [40, 40])]
    assert 20 < sum(a != b for a, b in zip(order[::4], order[4::4])) + 10 < 40  # mixed, not one after the other


def test_buckets_need_no_history():
    lengths = [7, 20, 2]
    late = sampler.rows(3, 1234, 1, 2, 2, lengths)
    stream(3, 10, 2, 2, lengths)
    assert sampler.rows(3, 1234, 1, 2, 2, lengths) == late
