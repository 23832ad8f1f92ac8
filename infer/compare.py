"""Base against LoRA: every prompt drawn twice from the same noise -> RUN/compare."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from data import check
from data.cache import cache_folder, read_manifest
from data.common.disk import atomic_write
from data.common.errors import UserError, one_line
from data.common.words import many
from data.encoders import CHUNK, TextEncoders
from data.models.files import Model, load, vae_model
from data.models.identity import check_unchanged, fingerprint, identity
from data.progress import progress
from infer.grid import grid
from infer.report import write_report
from infer.sample import make_pipeline, noise, sample
from lora import files


def compare(settings, run):
    """Draw every prompt without and with the LoRA: baseline_i.png, finetuned_i.png, grid.png and report.json.

    `settings` is flags.Infer, `run` the run's folder.
    """
    weights = files.read(settings.lora_path or run / "lora.safetensors")
    model, vae_model, resolution, unet_print = models(settings, run)
    weights.contents.check_width(model.component("unet").config()["cross_attention_dim"])
    warn_of_another_base(weights.contents, model, unet_print)
    weights.contents.warn_of_another_prediction(model.component("scheduler").config()["prediction_type"])
    check_steps(model, settings.num_inference_steps)
    device = check.device()
    precision, dtype = ("fp16", torch.float16) if device.type == "cuda" else ("no", torch.float32)
    check.precision(precision, device)
    check.gpu_memory(model.unet_config(), dtype, device)

    encoders = TextEncoders(model, precision, max_token_length(run)).load(device)
    for prompt in filter(encoders.truncated, [*settings.prompt, settings.negative_prompt or ""]):
        read = encoders.tokens
        print(f"warning: longer than CLIP reads; what follows {read} tokens is not seen: {one_line(prompt, 60)}")
    embeddings = encode(encoders, model, settings.prompt, settings.negative_prompt)
    del encoders  # their memory is free before the UNet is loaded
    torch.cuda.empty_cache()
    unet = load(UNet2DConditionModel, model.component("unet"), dtype, device)
    adapters = files.load(unet, weights)
    pipeline = make_pipeline(model, unet, vae_model)
    side = (resolution or unet.config.sample_size * pipeline.vae_scale_factor) // pipeline.vae_scale_factor
    shape = (unet.config.in_channels, side, side)

    folder = run / "compare"
    # they tell of pictures that are drawn anew now
    for name in ("report.json", "report.html", "grid.png", "scores.json"):
        (folder / name).unlink(missing_ok=True)
    pictures, seconds = {"base": [], "LoRA": []}, []
    with progress("compare", "picture", 2 * len(settings.prompt)) as bar:
        for i, (prompt, embedded) in enumerate(zip(settings.prompt, embeddings)):
            start = noise(settings.seed, prompt, shape)
            for label, name, scale in (("base", "baseline", 0.0), ("LoRA", "finetuned", settings.lora_scale)):
                adapters.set_scale(scale)
                began = time.perf_counter()
                picture = sample(pipeline, embedded, start, settings.num_inference_steps, settings.guidance_scale)
                seconds.append(time.perf_counter() - began)
                pictures[label].append(picture)
                write_png(picture, folder / f"{name}_{i}.png")
                bar.update()
    for name in ("baseline", "finetuned"):  # pictures of an earlier call with more prompts go
        for i in range(len(settings.prompt), 1 + len(list(folder.glob(f"{name}_*.png")))):
            (folder / f"{name}_{i}.png").unlink(missing_ok=True)
    write_png(grid(pictures, settings.prompt), folder / "grid.png")
    report = dict(
        prompts=settings.prompt,
        negative_prompt=settings.negative_prompt,
        base=model.public_name(),
        lora=dict(sha256=weights.sha256, rank=adapters.rank, alpha=adapters.alpha, scale=settings.lora_scale),
        rows=[
            dict(label="base", lora=None, scale=0.0, pictures=_names("baseline", pictures), mean_pixel_change=None),
            dict(
                label="LoRA",
                lora=dict(
                    file=Path(settings.lora_path or "lora.safetensors").name,
                    step=None,
                    sha256=weights.sha256,
                    rank=adapters.rank,
                    alpha=adapters.alpha,
                ),
                scale=settings.lora_scale,
                pictures=_names("finetuned", pictures),
                mean_pixel_change=[difference(*pair) for pair in zip(*pictures.values())],
            ),
        ],
        resolution=[side * pipeline.vae_scale_factor] * 2,
        seed=settings.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        mean_pixel_change=[difference(*pair) for pair in zip(*pictures.values())],
        median_s_per_picture=float(np.median(seconds)),
        peak_gib=torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
    )
    with atomic_write(folder / "report.json", "w") as file:
        json.dump(report, file, indent=1)
    print(f"{write_report(run)}: everything on one page, for any browser")
    print(f"{folder / 'grid.png'}: {many(len(settings.prompt), 'prompt')}, base above, LoRA below")


def models(settings, run):
    """-> (base, the model whose VAE is used, resolution, the UNet's fingerprint): what the run's cache names, unless a
    flag names another.

    Where there is no cache, the resolution is None: the model's own. The fingerprint is None where it is not known yet.
    """
    cache, found = cache_folder(run), {}
    if settings.base_model and not (cache / "manifest.json").exists():
        model, vae, resolution = None, None, None
    else:
        manifest = read_manifest(cache)
        model, vae, resolution = Model(**manifest["model"]), Model(**manifest["vae"]), manifest["resolution"]
        if not settings.base_model:
            found = check_unchanged(manifest["components"], model, vae, "put it back, or name another --base_model")
    if settings.base_model:
        told = settings.model_config, settings.prediction_type, settings.rescale_betas_zero_snr
        model = vae = Model(settings.base_model, None, "fp16", *told)
    if settings.pretrained_vae_model_name_or_path:
        configs = settings.model_config or model.configs()
        vae = vae_model(settings.pretrained_vae_model_name_or_path, "fp16", configs)
    return model, vae, resolution, found.get("unet")


def warn_of_another_base(contents, model, unet_print):
    """Say it when a LoRA was trained on another base than `model`; where one of the two is not known, say nothing.

    unet_print: the UNet's fingerprint, where it is known. Folders are compared by it, models of the hub by their ids.
    """
    made_for, there, here = contents.base, contents.fingerprint, unet_print
    if there and not here and model.is_local():
        here = fingerprint(identity(model.component("unet")))
    on_hub = made_for and not there and not model.is_local() and "/" in made_for
    if there and here and there != here or on_hub and made_for != model.name:
        of = f" (its UNet has the fingerprint {here}, not {there})" if there else ""
        print(f"warning: {contents.path} was trained on {made_for}, the base here is {model.public_name()}{of}")


def max_token_length(run):
    """How many tokens of a prompt are read: as many as of the captions of the run's cache; 75 where there is none."""
    cache = cache_folder(run)
    return read_manifest(cache)["text_shape"][0] - 2 if (cache / "manifest.json").exists() else CHUNK


def check_steps(model, steps):
    """Raise UserError when the sampler is asked for more steps than the noise schedule has: some would do nothing."""
    most = model.component("scheduler").config()["num_train_timesteps"]
    if steps > most:
        raise UserError(f"--num_inference_steps {steps}: the schedule of {model.name} has {most} steps")


def encode(encoders, model, prompts, negative_prompt):
    """-> [text, pooled, negative text, negative pooled] for each prompt, with a batch axis of 1, on the CPU.

    Without a negative prompt, the negative embeddings are the model's own unconditional ones.
    """
    if negative_prompt is None and model.index()["force_zeros_for_empty_prompt"]:
        text, pooled = (torch.zeros_like(e) for e in encoders([""]))
    else:
        text, pooled = encoders([negative_prompt or ""])
    return [[e.cpu() for e in (*encoders([prompt]), text, pooled)] for prompt in prompts]


def difference(a, b):
    """Mean absolute difference of two pictures, 0 to 255."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


def _names(name, pictures):
    return [f"{name}_{i}.png" for i in range(len(pictures["base"]))]


def write_png(picture, path):
    with atomic_write(path) as file:
        picture.save(file, "PNG")
