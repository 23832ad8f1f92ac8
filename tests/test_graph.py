"""The captured micro-step against the one started from Python: the same numbers for any batch and loss scale."""

import shutil

import pytest
import torch
from conftest import here, metrics
from test_loop import TRAIN

from data.models import fused
from train.graph import Eager


def test_eager_moves_the_batch_by_name():
    out = Eager(lambda a, b: a - b, torch.device("cpu"))(dict(b=torch.ones(2), a=torch.zeros(2)))
    assert torch.equal(out, -torch.ones(2))


@pytest.mark.gpu
def test_a_captured_function_reads_each_batch_and_adds_once_a_call():
    """Baked in, the first batch would train for ever."""
    from train.graph import Captured

    total = torch.zeros(3, device="cuda")

    def add(x, y):
        total.add_((x + y).reshape(-1, 3).sum(0))
        return (x * y).sum()

    shapes, expected = [(2, 3), (3,)], torch.zeros(3)
    samples = [dict(x=torch.randn(shape), y=torch.randn(shape)) for shape in shapes]
    run = Captured(add, torch.device("cuda"), samples)
    total.zero_()  # what capturing added
    for shape in shapes * 2:  # two shapes in turns, one memory
        x, y = torch.randn(shape), torch.randn(shape)
        expected += (x + y).reshape(-1, 3).sum(0)
        assert run(dict(x=x, y=y)).item() == pytest.approx((x * y).sum().item(), rel=1e-5, abs=1e-5)
        torch.testing.assert_close(total.cpu(), expected)
    assert len(run.graphs) == 2


@pytest.mark.gpu
def test_more_shapes_take_no_more_memory():
    """Each with its own, a second bucket would not fit where the plan fills the GPU with the first."""
    from train.graph import Captured

    def work(x):
        kept = [x.sin() for _ in range(8)]  # as activations are, until the end
        return sum((part * part).sum() for part in kept)

    def reserved(*sides):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        run = Captured(work, torch.device("cuda"), [dict(x=torch.randn(4096, side)) for side in sides])
        for side in sides:
            x = torch.randn(4096, side)
            assert run(dict(x=x)).item() == pytest.approx(8 * x.double().sin().square().sum().item(), rel=1e-3)
        return torch.cuda.max_memory_reserved() - before

    inputs = 4 * 4096 * (4000 + 3800 + 3000)
    assert reserved(4096, 4000, 3800, 3000) < 1.15 * reserved(4096) + inputs


def trained(cached, tmp_path, name, *flags):
    shutil.copytree(cached / "cache", tmp_path / name / "cache")
    here("train", "--output_dir", tmp_path / name, *TRAIN, "--max_train_steps", 4, "--learning_rate", 1e-4, *flags)
    return metrics(tmp_path / name)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_graph_eager_recomputed_and_pytorchs_functions_train_the_same(cached, tmp_path, precision, monkeypatch):
    # TF32's rounding differs between two layouts by as much as fp16's
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ways = {"graph": [], "eager": ["--no_cuda_graph"], "recomputed": ["--gradient_checkpointing"]}
    runs = {name: trained(cached, tmp_path, name, "--mixed_precision", precision, *ways[name]) for name in ways}
    fuse = fused.fuse
    monkeypatch.setattr(fused, "_functions", lambda x: fused.Plain)
    monkeypatch.setattr(fused, "fuse", lambda model, device: fuse(model, torch.device("cpu")))  # not channels_last
    runs["plain"] = trained(cached, tmp_path, "plain", "--mixed_precision", precision)
    tolerance = dict(no=1e-4, fp16=5e-3, bf16=5e-2)[precision]
    for name, run in runs.items():
        for fact in ("loss", "grad_norm"):
            off = [abs(m[fact] / e[fact] - 1) for m, e in zip(run, runs["eager"], strict=True)]
            assert max(off) < tolerance, (name, fact, off)


@pytest.mark.gpu
def test_an_overflow_inside_the_graph_is_skipped_and_recovered_from(cached, tmp_path, monkeypatch):
    """The scale that a graph multiplies by must be the tensor that the scaler halves."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, **k, init_scale=2.0**26))
    shutil.copytree(cached / "cache", tmp_path / "run" / "cache")
    flags = ("--max_train_steps", 14, "--learning_rate", 1e-4, "--mixed_precision", "fp16")
    here("train", "--output_dir", tmp_path / "run", *TRAIN, *flags)
    scale, taken = 2.0**26, 0
    for m in metrics(tmp_path / "run"):
        skipped = m["overflows"] > 0
        scale, taken = (scale / 2, taken) if skipped else (scale, taken + 1)
        assert m["loss_scale"] == scale
    assert 1 <= taken < 14
