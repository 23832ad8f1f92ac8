"""v-prediction and zero terminal SNR: where they are found, who follows them, and that the wrong one does not train."""

import json
import shutil

import pytest
import torch
from conftest import PIPELINE, here, precompute
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from data.cache import Cache, read_manifest
from data.models.files import Model, load
from infer.sample import make_pipeline
from lora import files
from tests.single_file import configs, single_file

V = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")


def schedule(model):
    config = model.component("scheduler").config()
    return config["prediction_type"], config["rescale_betas_zero_snr"]


def test_the_file_the_config_and_the_flags_are_asked_and_said(tmp_path):
    """A wrong setting trains noise, and says nothing of it."""
    folder, config = str(PIPELINE), str(configs(PIPELINE, tmp_path / "configs"))
    plain = str(single_file(PIPELINE, tmp_path / "plain.safetensors"))
    marked = str(single_file(PIPELINE, tmp_path / "marked.safetensors", markers=("v_pred", "ztsnr")))
    half = str(single_file(PIPELINE, tmp_path / "half.safetensors", markers=("v_pred",)))
    found = {
        Model(folder): ("epsilon", False, "scheduler_config.json"),
        Model(folder, None, None, None, "v_prediction"): ("v_prediction", False, "by --prediction_type"),
        Model(folder, None, None, None, None, True): ("epsilon", True, "by --rescale_betas_zero_snr"),
        Model(plain, config=config): ("epsilon", False, "scheduler_config.json"),
        Model(marked, config=config): ("v_prediction", True, "the file's tensor ztsnr"),
        Model(half, config=config): ("v_prediction", False, "the file's tensor v_pred"),
        Model(marked, config=config, prediction_type="epsilon"): ("epsilon", True, "by --prediction_type"),
    }
    for model, (prediction_type, zero_snr, who) in found.items():
        assert schedule(model) == (prediction_type, zero_snr)
        assert prediction_type in model.schedule() and who in model.schedule()
        assert ("zero terminal SNR" in model.schedule()) == zero_snr
    path = tmp_path / "configs" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(prediction_type="v_prediction")))
    assert schedule(Model(plain, config=config)) == ("v_prediction", False)


def test_precompute_stores_it_encodes_nothing_again_and_compare_follows(pictures, tmp_path, done, capfd):
    run = tmp_path / "run"
    precompute(run, pictures)
    assert "the UNet predicts epsilon (by its scheduler_config.json)" in capfd.readouterr().out
    done["captions"].clear(), done["pictures"].clear()
    precompute(run, pictures, *V)
    assert "zero terminal SNR (by --rescale_betas_zero_snr)" in capfd.readouterr().out
    assert done == dict(captions=[], pictures=[])
    model = Model(**read_manifest(run / "cache")["model"])
    assert schedule(model) == ("v_prediction", True)
    unet = load(UNet2DConditionModel, model.component("unet"), torch.float32, torch.device("cpu"))
    scheduler = make_pipeline(model, unet, model, tiles=False).scheduler
    assert isinstance(scheduler, EulerDiscreteScheduler) and scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999 and scheduler.sigmas[0] > 1000  # from pure noise on, which leading would skip


def v_loss(unet, cache, rows, t, generator):
    """Mean squared error of v at zero terminal SNR, by the formulas of the papers. rows, t: one for each sample."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    batch = cache.batch(rows, [False] * len(rows), [False] * len(rows))
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    x0 = batch["mean"].float() * cache.manifest["scaling_factor"]
    eps, a = torch.randn(x0.shape, generator=generator), root[t].float().view(-1, 1, 1, 1)
    b = (1 - a.square()).sqrt()
    condition = dict(text_embeds=batch["pooled"].float(), time_ids=batch["time_ids"])
    out = unet(a * x0 + b * eps, t, batch["text"].float(), added_cond_kwargs=condition).sample
    return (out - (a * eps - b * x0)).square().mean()


@torch.no_grad()
def held_out_loss(model, cache, weights=None):
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    if weights:
        files.load(unet, files.read(weights))
    generator, t = torch.Generator().manual_seed(0), torch.arange(62, 1000, 125)
    rows = [i for i in range(len(cache.index)) if cache.index["held_out"][i]]
    return sum(v_loss(unet, cache, [row] * len(t), t, generator).item() for row in rows) / len(rows)


@pytest.mark.slow
def test_the_right_setting_learns_and_the_wrong_one_unlearns(pictures, tmp_path):
    """From a base that predicts v: the toy's UNet, itself trained for a moment."""
    shutil.copytree(PIPELINE, tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    told = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    base = ("--pretrained_model_name_or_path", tmp_path / "base", "--validation_fraction", 0.25)
    precompute(tmp_path / "right", pictures, *base)
    cache, generator = Cache(tmp_path / "right" / "cache"), torch.Generator().manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(PIPELINE / "unet")
    optimizer = torch.optim.AdamW(unet.parameters(), 3e-4)
    for _ in range(8):
        rows, t = (torch.randint(n, (4,), generator=generator) for n in (len(cache), 1000))
        optimizer.zero_grad()
        v_loss(unet, cache, cache.members[0][rows].tolist(), t, generator).backward()
        optimizer.step()
    unet.save_pretrained(tmp_path / "base" / "unet")

    losses = dict(base=held_out_loss(tmp_path / "base", cache))
    train = ("--rank", 16, "--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 40)
    train += ("--learning_rate", 2e-3, "--mixed_precision", "no")
    for name, flags in (("right", ()), ("wrong", ("--prediction_type", "epsilon"))):
        precompute(tmp_path / name, pictures, *base, *flags)
        here("train", "--output_dir", tmp_path / name, *train)
        losses[name] = held_out_loss(tmp_path / "base", cache, tmp_path / name / "lora.safetensors")
    assert losses["right"] < 0.95 * losses["base"] and losses["wrong"] > 1.05 * losses["base"], losses
