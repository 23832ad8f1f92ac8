"""Which blocks to recompute: the arithmetic of it, on blocks of random cost; on a GPU, against what the memory does."""

import gc
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, command, here, one_line_error, settings
from test_loop import TRAIN

from data.common.errors import MachineError, UserError
from train import plan
from train.graph import on_side_stream
from train.plan import Block, choose, peak


def blocks(seed, count=8):
    r = random.Random(seed)
    kinds = [(r.randrange(0, 100), r.randrange(1, 50) / 10) for _ in range(3)]  # SDXL's blocks are of few kinds, too
    return [Block(str(i), *r.choice(kinds), peak=r.randrange(100, 300)) for i in range(count)]


def written_out(made, kept):
    """The peak by its definition: the most over all blocks, each with the activations that those before it keep."""
    held = [a.extra if j in kept else 0 for j, a in enumerate(made)]
    return max(b.peak + sum(held[:i]) for i, b in enumerate(made)) + aside(made)


def aside(made):
    """What the plan sets aside for memory that the allocator holds and does not use."""
    return plan.UNUSED + max(b.extra for b in made) // 2


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_is_that_of_its_definition(seed):
    made, r = blocks(seed), random.Random(seed)
    for _ in range(20):
        kept = {i for i in range(len(made)) if r.random() < 0.5}
        assert peak(made, kept) == written_out(made, kept)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_fits_and_nothing_more_would(seed):
    """Over the budget, the run dies after minutes; under it with room to spare, it is slower for nothing."""
    made = blocks(seed)
    everything = set(range(len(made)))
    for budget in range(peak(made, set()), peak(made, everything) + 20, 20):
        kept = choose(made, budget)
        assert peak(made, kept) <= budget
        assert all(peak(made, kept | {i}) > budget for i in everything - kept)
    assert kept == everything  # with room for all, nothing is recomputed


@pytest.mark.parametrize("seed", range(20))
def test_what_is_recomputed_is_near_the_cheapest_of_all_choices(seed):
    """Against all 256: within one block of the least time. The last of them first would be far from it."""
    made = blocks(seed)
    for budget in range(peak(made, set()), peak(made, set(range(8))), 40):
        saved = sum(made[i].seconds for i in choose(made, budget))
        best = max(
            sum(made[i].seconds for i in some)
            for n in range(9)
            for some in itertools.combinations(range(8), n)
            if peak(made, set(some)) <= budget
        )
        assert saved >= best - max(b.seconds for b in made) - 1e-9


def test_a_budget_that_cannot_be_met_is_refused_with_the_smallest_that_can():
    made = [Block("a", 2**30, 1.0, peak=6 * 2**30), Block("b", 2**30, 1.0, peak=5 * 2**30)]
    needed = rf"at least --vram_gib {math.ceil(100 * (6 + aside(made) / 2**30)) / 100:.2f} is needed.* 4\.00 are there"
    with pytest.raises(MachineError, match=needed) as refused:
        choose(made, 4 * 2**30)
    assert refused.value.code == 3
    smallest = float(str(refused.value).split("--vram_gib ")[1].split()[0])
    assert choose(made, smallest * 2**30) is not None  # what it names is enough


class Counting(torch.nn.Module):
    """Two blocks that count how often they are computed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), []
        for name in ("first", "second"):
            self.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: self.calls.append(name))

    def enable_gradient_checkpointing(self, function):
        self.function = function

    def forward(self, x):
        return self.function(self.second, self.function(self.first, x))


@pytest.mark.parametrize("names, calls", [(None, [2, 2]), ([], [1, 1]), (["second"], [1, 2])])
def test_only_the_named_blocks_are_computed_again(names, calls):
    model = Counting()
    plan.recompute(model, names)
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert [model.calls.count(name) for name in ("first", "second")] == calls


def test_a_plan_holds_for_the_flags_and_the_device_it_was_made_for():
    """A resumed run that planned anew would find other memory free, and differ."""
    cpu = torch.device("cpu")
    made = plan.make(None, True, None, None, cpu, 0, None)
    assert made["recomputed"] is None and made == json.loads(json.dumps(made))
    marked = made | dict(recomputed=["marked"])
    assert plan.make(None, True, None, None, cpu, 0, marked) == marked
    assert plan.make(None, False, None, None, cpu, 0, marked)["recomputed"] == []
    other = marked | dict(made_for=marked["made_for"] | dict(device="another"))
    assert plan.make(None, True, None, None, cpu, 0, other)["recomputed"] is None


def test_pictures_take_their_share_of_the_budget(monkeypatch, capsys):
    """As if the budget were as much smaller; and a plan that was made without them is made anew."""
    gpu, made = torch.device("cuda"), blocks(3)
    for name, answer in dict(
        get_device_name="a GPU", mem_get_info=(2**34, 2**34), memory_reserved=0, empty_cache=None
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(plan, "on_side_stream", lambda function: function())
    monkeypatch.setattr(plan, "measure", lambda *_: blocks(3))
    budget = peak(made, set(range(len(made)))) + plan.GRAPH
    without = plan.make(budget / 2**30, False, None, None, gpu, 0, None)
    assert without["recomputed"] == [] and "pictures" not in capsys.readouterr().out
    kept = choose(made, budget - plan.GRAPH - 150)
    beside = plan.make(budget / 2**30, False, None, None, gpu, 0, without, pictures=150)
    assert beside["recomputed"] == [block.name for i, block in enumerate(made) if i not in kept] != []
    assert "GiB are kept for pictures of the validation prompts" in capsys.readouterr().out
    marked = beside | dict(recomputed=["marked"])
    assert plan.make(budget / 2**30, False, None, None, gpu, 0, marked, pictures=150) == marked
    with pytest.raises(MachineError, match="the memory is too small: at least --vram_gib"):
        plan.make(budget / 2**30, False, None, None, gpu, 0, None, pictures=budget)


def test_without_a_gpu_a_budget_is_answered_with_what_it_means(fresh, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    here("train", "--output_dir", fresh, *TRAIN, "--max_train_steps", 1, "--vram_gib", 8)
    assert "--vram_gib is about a GPU's memory; there is none" in capfd.readouterr().out


@pytest.mark.gpu
def test_the_predicted_peak_is_the_runs(cached, capfd):
    """All, half and no blocks recomputed, on a large batch, in an eager run, in bytes that are in use."""
    from train.loop import setup

    gc.collect()  # what earlier tests left on the GPU would go between the plan and the run
    values = settings("train", output_dir=str(cached), train_batch_size=256, rank=4, no_cuda_graph=True)
    seen = []
    real = plan.measure
    plan.measure = lambda unet, step: seen.append(real(unet, step)) or seen[-1]
    try:
        run = setup(values, cached)
    finally:
        plan.measure = real
    made = seen[0]
    everything = set(range(len(made)))
    batch = run.batches.draw(0, 0) | run.batches.one_of_each_bucket()[0]
    # on the stream that a captured step has, because libraries keep a workspace of 32 MiB for each stream
    micro_step = partial(on_side_stream, partial(run.micro_step, batch))
    for kept in (set(), set(range(0, len(made), 2)), everything):
        plan.recompute(run.unet, [b.name for i, b in enumerate(made) if i not in kept])
        micro_step()
        torch.cuda.reset_peak_memory_stats()
        micro_step()
        assert torch.cuda.max_memory_allocated() == pytest.approx(peak(made, kept) - aside(made), rel=0.05)
    all_kept, none_kept = (peak(made, kept) - aside(made) for kept in (everything, set()))
    assert all_kept > 1.2 * none_kept  # else the agreement would say nothing
    assert "0 of" in capfd.readouterr().out


@pytest.mark.gpu
def test_a_gpu_with_less_memory_than_it_says_exits_3_with_the_knobs(cached, tmp_path):
    """Another program took what the plan counted on."""
    shutil.copytree(cached, tmp_path / "run")
    code = "import sys, torch; torch.cuda.set_per_process_memory_fraction(2**25 / torch.cuda.mem_get_info()[1]); "
    code += "from data.common import safe; from train.__main__ import main; safe.run(main, sys.argv[1:])"
    words = [sys.executable, "-c", code, "--output_dir", str(tmp_path / "run"), *map(str, TRAIN)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 3 and "Traceback" not in ended.stderr, ended.stderr
    assert "the GPU is out of memory: training needs less with a smaller --vram_gib" in one_line_error(ended.stderr)


@pytest.mark.gpu
def test_too_small_a_budget_exits_3_and_names_one_that_does(cached, tmp_path):
    shutil.copytree(cached, tmp_path / "run")
    words = ("train", "--output_dir", tmp_path / "run", *TRAIN, "--vram_gib")
    smallest = command(*words, 0.001, code=3).split("at least --vram_gib ")[1].split()[0]
    assert plan.UNUSED / 2**30 < float(smallest) < 3  # of the toy it is all CUDA's own
    command(*words, smallest)


def test_blocks_of_another_unet_are_refused(unet):
    """The names come from a state, which may be anybody's."""
    with pytest.raises(UserError, match="the run's plan is of another UNet .*nowhere"):
        plan.recompute(unet, ["nowhere.0"])
