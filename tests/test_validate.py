"""The held-out loss: against a plain loop written out, exactly 0 where nothing changed, and the best save kept."""

import json
import math
import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PIPELINE, TRAIN, command, here, one_line_error, precompute, settings, untitled
from diffusers import DDPMScheduler

from data import sampler
from data.cache import Cache
from lora import files
from train import loop
from train.validate import BANDS, Validation, due, first_by_content, in_batches, mean_difference

GOES_ON = SimpleNamespace(received=None)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory, pictures):
    """A run's folder with a cache of which three of eight pictures are held out; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("held_out") / "run"
    precompute(folder, pictures, "--validation_fraction", 0.4)
    assert Cache(folder / "cache").manifest["held_out"] == 3
    return folder


def train(held_out, folder, *flags):
    if not folder.exists():
        shutil.copytree(held_out / "cache", folder / "cache")
    here("train", "--output_dir", folder, *TRAIN, *flags)
    return folder


def measured(run):
    """{step: its held-out numbers, without the seconds that they took}"""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    for numbers in found.values():
        assert numbers.pop("seconds") > 0
    return found


@pytest.fixture(scope="session")
def trained(held_out, tmp_path_factory):
    """Six steps, measured at 2, 3, 4 and 6 and saved at 2, 4 and 6."""
    return train(held_out, tmp_path_factory.mktemp("trained") / "run", "--validation_steps", 3)


def test_when_it_is_time():
    times = settings("train", checkpointing_steps=4, validation_steps=3, max_train_steps=10)
    assert [step for step in range(1, 11) if due(times, step)] == [3, 4, 6, 8, 9, 10]
    times = settings("train", checkpointing_steps=4, max_train_steps=10)
    assert [step for step in range(1, 11) if due(times, step)] == [4, 8, 10]


def test_the_numbers_equal_a_plain_loop(trained, unet):
    """One picture and one timestep at a time, by diffusers alone, from the weights that were exported (fp16)."""
    cache, scheduler = Cache(trained / "cache"), DDPMScheduler.from_pretrained(PIPELINE / "scheduler")
    adapters = files.load(unet, files.read(trained / "lora-000004.safetensors"))
    index = cache.index

    @torch.no_grad()
    def errors(rows, scale):
        adapters.set_scale(scale)
        table = []
        for row in rows:
            table.append([])
            for band in range(BANDS):
                g = sampler.generator(int.from_bytes(index["image_digest"][row][:8]), "validation", band)
                no = np.zeros(1, bool)
                b = {name: torch.from_numpy(a).float() for name, a in cache.batch([row], no, no, no, no).items()}
                t = torch.randint(250 * band, 250 * (band + 1), (1,), generator=g)
                eps = torch.randn(b["mean"].shape[1:], generator=g)[None]
                noisy = scheduler.add_noise(b["mean"] * cache.manifest["scaling_factor"], eps, t)
                told = dict(text_embeds=b["pooled"], time_ids=b["time_ids"])
                predicted = unet(noisy, t, b["text"], added_cond_kwargs=told).sample
                table[-1].append(torch.nn.functional.mse_loss(predicted, eps).item())
        return np.array(table)

    out = sorted(np.flatnonzero(index["held_out"]), key=lambda row: index["image_digest"][row])
    others = sorted(np.flatnonzero(~index["held_out"]), key=lambda row: index["image_digest"][row])[:2]
    numbers, close = measured(trained)[4], dict(rel=1e-3, abs=2e-5)
    for rows, prefix in ((out, ""), (others, "train_")):
        with_lora, base = errors(rows, 1), errors(rows, 0)
        of_each = (with_lora - base).mean(axis=1)
        assert numbers[f"{prefix}difference"] == pytest.approx(of_each.mean(), **close)
        assert numbers[f"{prefix}standard_error"] == pytest.approx(
            statistics.stdev(of_each) / len(rows) ** 0.5, rel=0.01
        )
        if not prefix:
            assert numbers["loss"] == pytest.approx(with_lora.mean(), rel=1e-3)
            assert numbers["base_loss"] == pytest.approx(base.mean(), rel=1e-5)
            for band, differences in zip(numbers["bands"], (with_lora - base).T):
                assert band["difference"] == pytest.approx(differences.mean(), **close)
    assert abs(numbers["difference"]) > 0.002 and numbers["pictures"] == 3  # there was something to compare
    assert [(band["from"], band["to"]) for band in numbers["bands"]] == [(0, 250), (250, 500), (500, 750), (750, 1000)]


def a_run(held_out, folder, **values):
    """A run that is set up and not begun, with B not zero."""
    shutil.copytree(held_out / "cache", folder / "cache")
    values = dict(rank=4, train_batch_size=2, mixed_precision="no", checkpointing_steps=2) | values
    run = loop.setup(settings("train", output_dir=str(folder), **values), folder)
    with torch.no_grad():
        run.adapters.vector.add_(0.02 * torch.randn(run.adapters.vector.shape, generator=torch.manual_seed(5)))
    run.adapters.refresh()
    return run


@pytest.mark.slow
def test_twice_gives_the_same_and_scale_0_exactly_nothing(held_out, tmp_path):
    run = a_run(held_out, tmp_path / "a")
    first, again = (run.validation.measure(2, GOES_ON)["held_out"] for _ in range(2))
    for numbers in (first, again):
        del numbers["seconds"]
    assert first == again and first["difference"] != 0
    run.adapters.set_scale(0)
    nothing = run.validation.measure(2, GOES_ON)["held_out"]
    assert nothing["difference"] == nothing["train_difference"] == nothing["standard_error"] == 0
    assert all(band["difference"] == 0 for band in nothing["bands"])


@pytest.mark.slow
def test_another_seed_batch_and_weighting_measure_the_same(held_out, tmp_path):
    """Else two runs could not be compared by it."""
    one = a_run(held_out, tmp_path / "a")
    two = a_run(held_out, tmp_path / "b", seed=7, train_batch_size=3, snr_gamma=5.0)
    two.adapters.vector.data.copy_(one.adapters.vector)
    two.adapters.refresh()
    first, second = (run.validation.measure(2, GOES_ON)["held_out"] for run in (one, two))
    for name in ("difference", "standard_error", "loss", "base_loss", "train_difference"):
        assert first[name] == pytest.approx(second[name], rel=1e-4), name


@pytest.mark.slow
def test_nothing_is_measured_after_a_signal_or_between_times(held_out, tmp_path):
    run = a_run(held_out, tmp_path / "a")
    assert run.validation.measure(2, SimpleNamespace(received=15)) == {}
    assert run.validation.measure(3, GOES_ON) == {}
    assert not run.validation.is_best(2)


@pytest.mark.slow
def test_the_same_weights_as_without(held_out, trained, tmp_path):
    """A draw from the loop's randomness, a scale or a gradient that is left behind would change what is trained."""
    plain = train(held_out, tmp_path / "plain", "--checkpointing_steps", 6)
    saved = [read_vector(run, 6) for run in (plain, trained)]
    assert torch.equal(*saved)


def read_vector(run, step):
    from safetensors.torch import load

    return load((run / "state" / f"{step:06d}.state").read_bytes()[:-32])["vector"]


def test_the_best_save_is_kept(trained):
    found = measured(trained)
    assert list(found) == [2, 3, 4, 6]
    best = min((2, 4, 6), key=lambda step: found[step]["difference"])
    assert (trained / "lora-best.safetensors").read_bytes() == (trained / f"lora-{best:06d}.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_goes_on_knows_the_best_before(held_out, tmp_path):
    """Without it, the first save after a stop would count as the best."""
    rate = ("--learning_rate", 0.2)  # it gets worse
    run = train(held_out, tmp_path / "stopped", *rate, "--max_train_steps", 2)
    best = (run / "lora-best.safetensors").read_bytes()
    assert best == (run / "lora-000002.safetensors").read_bytes()
    train(held_out, run, *rate)
    found = measured(run)
    assert found[2]["difference"] < min(found[4]["difference"], found[6]["difference"])
    assert (run / "lora-best.safetensors").read_bytes() == best


@pytest.mark.slow
def test_a_best_save_that_was_taken_away_is_not_promised(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    here("train", "--output_dir", folder, *TRAIN)
    assert f"{folder}/lora-best.safetensors\n" in capsys.readouterr().out
    (folder / "lora-best.safetensors").unlink()
    here("train", "--output_dir", folder, *TRAIN)
    assert f"{folder}/lora-best.safetensors is gone\n" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_signal_left_out_is_made_up_for(held_out, tmp_path, monkeypatch):
    """Else the best save, and its line of metrics, would depend on when somebody pressed Ctrl-C."""
    straight = train(held_out, tmp_path / "straight")
    measure = Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda self, done, stop: {} if done == 4 else measure(self, done, stop))
    run = train(held_out, tmp_path / "stopped", "--max_train_steps", 4)
    assert 4 not in measured(run)
    monkeypatch.setattr(Validation, "measure", measure)
    train(held_out, run)
    assert measured(run) == measured(straight)
    assert untitled(run / "lora-best.safetensors") == untitled(straight / "lora-best.safetensors")


def test_which_save_is_best():
    validation = object.__new__(Validation)
    validation.best = validation.last = None
    assert not validation.is_best(1)  # nothing was measured
    kept = []
    for step, difference in [(1, -1.0), (2, -2.0), (3, -1.5), (4, math.nan), (5, -2.5)]:
        validation.last = dict(step=step, difference=difference)
        kept += [step] * validation.is_best(step)
    assert kept == [1, 2, 5] and validation.best == dict(step=5, difference=-2.5)
    assert not validation.is_best(6)  # measured at 5


@pytest.mark.slow
def test_learning_by_heart_shows(pictures, tmp_path):
    """Four pictures, 200 times each: those held out get better, then worse; the trained ones better to the end."""
    run = tmp_path / "run"
    precompute(run, pictures, "--validation_fraction", 0.5)
    long = ("--max_train_steps", 200, "--checkpointing_steps", 10, "--rank", 32, "--learning_rate", 2e-3)
    long += ("--lora_alpha", 32)
    batch = ("--train_batch_size", 4, "--gradient_accumulation_steps", 1)
    here("train", "--output_dir", run, *TRAIN, *long, *batch)
    found = measured(run)
    held_out, of_trained = (np.array([n[name] for n in found.values()]) for name in ("difference", "train_difference"))
    lowest = held_out.argmin()
    assert held_out[0] < 0 and 5 < lowest < 16
    assert held_out[-4:].mean() > held_out[lowest - 2 : lowest + 3].mean() + 0.005
    assert of_trained[-1] < of_trained[lowest] - 0.03
    best, last = (run / f"lora-{step:06d}.safetensors" for step in (10 * (lowest + 1), 200))
    assert (run / "lora-best.safetensors").read_bytes() == best.read_bytes() != last.read_bytes()


def test_steps_without_pictures_held_out_are_refused(fresh):
    output = command("train", "--output_dir", fresh, *TRAIN, "--validation_steps", 2, code=2)
    assert "--validation_fraction" in one_line_error(output)
    assert not (fresh / "state").exists()


def test_a_folder_in_the_place_of_the_best_save_is_found_at_the_door(fresh):
    """Found when it is first written, the steps up to then would be lost."""
    (fresh / "lora-best.safetensors").mkdir()
    output = command("train", "--output_dir", fresh, *TRAIN, code=2)
    assert (
        one_line_error(output)
        == f"error: {fresh}/lora-best.safetensors: not a file; move it away, or use another folder"
    )


def test_places_fill_batches_of_one_bucket():
    buckets = np.array([1, 0, 1, 1])
    batches = in_batches(buckets, 3)
    assert all(len(batch) == 3 and len({buckets[i] for i, _ in batch}) == 1 for batch in batches)
    assert {place for batch in batches for place in batch} == {(i, band) for i in range(4) for band in range(BANDS)}


def test_the_pictures_are_chosen_by_content():
    index = np.zeros(4, [("image_digest", "S16")])
    index["image_digest"] = [b"d", b"a", b"c", b"b"]
    assert first_by_content(index, np.array([True, True, True, False]), 2).tolist() == [1, 2]


def test_the_standard_error_is_of_pictures():
    """Four timesteps of one picture are not four pictures."""
    found = mean_difference(np.array([[1.0, 3.0], [4.0, 6.0], [0.0, 4.0]]))
    assert found == dict(difference=3.0, standard_error=pytest.approx(statistics.stdev([2, 5, 2]) / 3**0.5))
    assert mean_difference(np.array([[1.0, 3.0]])) == dict(difference=2.0, standard_error=None)


@pytest.mark.gpu
def test_a_captured_measurement_equals_one_started_from_python(held_out, tmp_path):
    """And the captured step goes on right after it, in the memory that both use."""
    runs = [train(held_out, tmp_path / name, *flags) for name, flags in (("a", []), ("b", ["--no_cuda_graph"]))]
    a, b = map(measured, runs)
    for step in a:
        assert a[step]["base_loss"] == pytest.approx(b[step]["base_loss"], rel=1e-4)
        assert a[step]["difference"] == pytest.approx(b[step]["difference"], rel=0.02, abs=1e-4)
