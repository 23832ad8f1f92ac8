"""Base against LoRAs: every prompt drawn from the same noise, without and with each of them -> RUN/compare.

A picture is a function of the model, the seed, the prompt, the LoRA and its scale, not of what else is drawn.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from data import check
from data.cache import cache_folder, read_manifest
from data.common.disk import atomic_write
from data.common.errors import NumbersError, UserError, one_line
from data.common.words import many, shortened
from data.encoders import CHUNK, TextEncoders
from data.models.files import Model, load, vae_model
from data.models.identity import check_unchanged, fingerprint, identity
from data.progress import progress
from infer.grid import grid
from infer.memory import Fit, fit
from infer.report import write_report
from infer.sample import make_pipeline, noise, sample, write_png
from infer.streamed import Streamed
from infer.told import PICTURE, without_places
from lora import files
from lora.attention import fuse_projections

UNRELATED = "without the concept: what changes here has leaked"


def compare(settings, run, loras, command):
    """Draw every prompt without and with each LoRA, at each scale: a row of pictures each, grid.png and report.json.

    `settings` is flags.Infer, `run` the run's folder, `loras` what loras.find gave. command: how this was called.
    """
    model, vae_model, resolution, unet_print = models(settings, run)
    check_files_and_base(model, loras, unet_print)
    warn_of_trigger_words(loras, settings.prompt, settings.unrelated_prompt or ())
    check_steps(model, settings.num_inference_steps)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer holes in the GPU's memory
    device = check.device()
    precision, dtype = ("fp16", torch.float16) if device.type == "cuda" else ("no", torch.float32)
    check.precision(precision, device)
    configs = model.unet_config(), vae_model.component("vae").config()
    factor = 2 ** (len(configs[1]["block_out_channels"]) - 1)
    side = (resolution or configs[0]["sample_size"] * factor) // factor
    made_to_fit = Fit()
    if device.type == "cuda":
        contents = [lora.contents for lora in loras]
        room = check.room(settings.vram_gib, device, check.LIBRARIES)
        made_to_fit = fit(*configs, side * factor, dtype, contents, *room)
    elif settings.vram_gib:
        print("--vram_gib is about a GPU's memory; there is none, and all is in RAM")

    prompts = [*settings.prompt, *(settings.unrelated_prompt or ())]
    encoders = TextEncoders(model, precision, max_token_length(run)).load(device)
    for prompt in filter(encoders.truncated, [*prompts, settings.negative_prompt or ""]):
        read = encoders.tokens
        print(f"warning: longer than CLIP reads; what follows {read} tokens is not seen: {one_line(prompt, 60)}")
    embeddings = encode(encoders, model, prompts, settings.negative_prompt)
    del encoders  # their memory is free before the UNet is loaded
    torch.cuda.empty_cache()

    def prepare(unet):
        fuse_projections(unet)
        if made_to_fit.blocks:
            Streamed(unet, made_to_fit.blocks, device)

    unet = load(UNet2DConditionModel, model.component("unet"), dtype, device, prepare)
    for lora in loras:
        files.check(unet, lora.contents)
    pipeline = make_pipeline(model, unet, vae_model, made_to_fit.tiles)
    starts = [noise(settings.seed, prompt, (unet.config.in_channels, side, side)) for prompt in prompts]

    folder = run / "compare"
    remove_what_an_earlier_call_left(folder)
    scales = list(dict.fromkeys(settings.lora_scale or [1.0]))
    row_count = 1 + len(loras) * len(scales)
    pictures = many(row_count * len(prompts), "picture")
    print(f"{many(row_count, 'row')} of {many(len(prompts), 'prompt')}: {pictures}", flush=True)
    with progress("compare", "picture", row_count * len(prompts)) as bar:
        how = settings.num_inference_steps, settings.guidance_scale
        drawing = Drawing(pipeline, list(zip(embeddings, starts)), how, folder, bar)
        rows = [dict(label="base", lora=None, scale=0.0) | drawing.row("baseline") | dict(mean_pixel_change=None)]
        for lora in loras:
            label = lora.label if settings.lora_path else "LoRA"
            rows += rows_of_lora(drawing, lora, label, scales, len(rows))
    groups = [("prompts", settings.prompt), (UNRELATED, settings.unrelated_prompt)]
    paths = [(row["label"], [folder / name for name in row["pictures"]]) for row in rows]
    write_png(grid(paths, groups if settings.unrelated_prompt else [(None, settings.prompt)]), folder / "grid.png")
    report = dict(
        prompts=settings.prompt,
        unrelated_prompts=settings.unrelated_prompt or (),
        negative_prompt=settings.negative_prompt,
        base=model.public_name(),
        seed=settings.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        resolution=[side * factor] * 2,
        command=without_places(command, run),
        rows=rows,
        lora=rows[1]["lora"] | dict(scale=rows[1]["scale"]),  # of the first LoRA, as is the next
        mean_pixel_change=rows[1]["mean_pixel_change"],
        median_s_per_picture=float(np.median(drawing.seconds)),
        peak_gib=torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
    )
    with atomic_write(folder / "report.json", "w") as file:
        json.dump(report, file, indent=1)
    print(table(rows, len(settings.prompt)))
    print(f"{folder / 'grid.png'}: {many(row_count, 'row')}, the base's first")
    print(f"{write_report(run)}: everything on one page, for any browser")


def check_files_and_base(model, loras, unet_print):
    """Look at all of every file now, because after hours of drawing it would be late, and hold it to the base.

    Raises UserError when one is damaged or for another architecture; says it when one was trained on another base.
    unet_print: the UNet's fingerprint, where it is known.
    """
    if not unet_print and model.is_local() and any(lora.contents.fingerprint for lora in loras):
        unet_print = fingerprint(identity(model.component("unet")))
    said = set()
    for contents in (lora.contents for lora in loras):
        files.read(contents.path)
        contents.check_width(model.component("unet").config()["cross_attention_dim"])
        source = contents.base, contents.fingerprint, contents.prediction_type
        if source not in said:  # all saves of a run have one
            warn_of_another_base(contents, model, unet_print)
            contents.warn_of_another_prediction(model.component("scheduler").config()["prediction_type"])
        said.add(source)


@dataclass
class Drawing:
    """How every row is drawn, so that nothing but the UNet's weights differs between two rows.

    inputs: [(embeddings, noise)] of the prompts. how: sampler steps and guidance. seconds: what each picture took.
    """

    pipeline: StableDiffusionXLPipeline
    inputs: list
    how: tuple
    folder: Path
    bar: object
    seconds: list = field(default_factory=list)

    def row(self, name):
        """Draw all prompts with the UNet as it is now: folder/name_i.png. -> what report.json says of them"""
        pictures, changes = [], []
        for i, (embedded, start) in enumerate(self.inputs):
            began = time.perf_counter()
            picture = sample(self.pipeline, embedded, start, *self.how)
            self.seconds.append(time.perf_counter() - began)
            pictures.append(f"{name}_{i}.png")
            write_png(picture, self.folder / pictures[i])
            with Image.open(self.folder / f"baseline_{i}.png") as base:  # read again, because hundreds fill a memory
                changes.append(difference(base, picture))
            self.bar.update()
        return dict(pictures=pictures, mean_pixel_change=changes)


def rows_of_lora(drawing, lora, label, scales, index):
    """Draw one LoRA at each scale, the first as row `index`. -> report.json's rows

    Afterwards the UNet is the base again, and the memory that the LoRA took is free.
    """
    weights = files.read(lora.path)
    adapters = files.load(drawing.pipeline.unet, weights)
    facts = dict(file=lora.path.name, step=lora.step, sha256=weights.sha256, rank=adapters.rank, alpha=adapters.alpha)
    rows = []
    for i, scale in enumerate(scales, index):
        shown = label if scales == [1] else f"{label} × {scale:g}"
        adapters.set_scale(scale)
        try:
            drawn = drawing.row("finetuned" if i == 1 else f"finetuned-{i}")
        except NumbersError as error:
            raise NumbersError(f"{shown}: {error}") from None
        rows.append(dict(label=shown, lora=facts, scale=scale) | drawn)
    adapters.take_out(drawing.pipeline.unet)
    return rows


def remove_what_an_earlier_call_left(folder):
    """Before the first picture, because a report must never lie beside other pictures than those that it tells of."""
    for name in ("report.json", "grid.png", "report.html", "scores.json"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if PICTURE.fullmatch(path.name):
            path.unlink()


def table(rows, count):
    """What each LoRA changed, in lines for a terminal; the first `count` pictures of a row are of the prompts."""
    unrelated = len(rows[0]["pictures"]) > count
    lines = ["mean change of a pixel against the base, 0 to 255", "  prompts  unrelated" if unrelated else "  prompts"]
    for row in rows[1:]:
        parts = [row["mean_pixel_change"][:count], row["mean_pixel_change"][count:]][: 1 + unrelated]
        means = [f"{np.mean(part):{width}.2f}" for part, width in zip(parts, (9, 11))]
        lines.append(f"{''.join(means)}  {one_line(row['label'])}")
    return "\n".join(lines)


def warn_of_trigger_words(loras, prompts, unrelated):
    """Say it when no prompt has the word that calls for what a LoRA learned, or one that should not have it has it."""
    words = (lora.contents.metadata.get("modelspec.trigger_phrase") for lora in loras)
    for word in dict.fromkeys(filter(None, words)):
        has = [word.lower() in prompt.lower() for prompt in (*prompts, *unrelated)]
        if not any(has[: len(prompts)]):
            print(f"warning: no --prompt has the trigger word {shortened(word)} that the LoRA was trained with")
        if any(has[len(prompts) :]):
            print(f"warning: an --unrelated_prompt has the trigger word {shortened(word)}")


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
