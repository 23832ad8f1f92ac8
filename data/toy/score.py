"""python -m data.toy.score RUN: what the LoRA learned, in numbers -> RUN/compare/scores.json.

The pictures there of the toy world's prompts, the base's and those of RUN/lora.safetensors at strength 1, have three
scores: `style` (0 is the base style, 1 is ink, both as the VAE shows them), `colour` and `subject` (the share of
pictures that show what the prompt asks for). `style` is the mean of `lines` and `paper`; `lines_of_each` has the lines
of every prompt.

RUN/lora.safetensors has one: the mean squared error of the noise prediction on ink pictures that were not trained on,
with the LoRA and without it on the same noise. `true` is what the same measures say of true pictures, `chance` what
guessing would get.
"""

import argparse
import json
import sys
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.common import safe
from data.common.imports import lean

with lean():
    safe.quiet()
    from diffusers import AutoencoderKL, UNet2DConditionModel

from data.cache import cache_folder, read_index, read_manifest
from data.common import disk, errors
from data.encoders import VAE, TextEncoders
from data.models.files import Model, load
from data.survey import image_digest
from data.toy.draw import training_scenes
from data.toy.measure import SubjectClassifier, colour_of, lines_of_each, style_scores
from data.toy.world import COLOURS, SIZE, SUBJECTS, caption, parse, random_scene, render
from infer.report import write_report
from lora import files
from train import diffusion

HELD_OUT = 64  # pictures for the held-out loss
HELD_OUT_SEED = 6_000_000
TRUE_SEED = 6_500_000


def held_out_scenes(how_many):
    """-> [(scene, seed)] × how_many: random scenes whose captions are not in the training set."""
    trained = {scene for scene, _ in training_scenes()}
    fresh = ((random_scene(seed), seed) for seed in count(HELD_OUT_SEED))
    return [pair for pair, _ in zip((p for p in fresh if p[0] not in trained), range(how_many))]


def as_pixels(images):
    """[PIL.Image] -> uint8 (n, H, W, 3)."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))


@torch.inference_mode()
def through_vae(vae, images):
    """The pictures as the VAE gives them back, which is the best that any sampler could draw."""
    reconstructed = []
    for pixels in as_pixels(images).split(8):
        output = vae.decode(vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean).sample
        output = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        reconstructed += [Image.fromarray(array) for array in output.numpy()]
    return reconstructed


def picture_scores(images, scenes, style, true, classify):
    """{"style", "lines", "lines_worst", "paper", "colour", "subject"} of pictures that should show `scenes` in `style`.

    true: {"base": …, "ink": …}, true pictures of the same scenes; classify: a SubjectClassifier.
    """
    pairs = list(zip(images, scenes))
    colours = [colour_of(image, scene.subject, scene.place, style) == scene.colour for image, scene in pairs]
    subjects = [classify(image) == scene.subject for image, scene in pairs]
    scores = style_scores(images, true["base"], true["ink"])
    scores |= {"colour": np.mean(colours), "subject": np.mean(subjects)}
    return {name: round(float(value), 3) for name, value in scores.items()}


@torch.inference_mode()
def held_out_loss(run, model, vae_model, scaling_factor):
    """{"base", "lora"}: mean squared error on ink pictures that neither was trained on, the same noise for both."""
    scenes = held_out_scenes(HELD_OUT)
    pixels = as_pixels([render(scene, "ink", seed) for scene, seed in scenes])
    posterior = next(VAE(vae_model, "no").load(torch.device("cpu")).encode([(None, pixels)]))[1].float()
    text, pooled = TextEncoders(model, "no").load(torch.device("cpu"))([caption(scene) for scene, _ in scenes])
    unet = load(UNet2DConditionModel, model.component("unet"), torch.float32, "cpu")
    adapters = files.load(unet, files.read(run / "lora.safetensors"))

    scheduler = model.component("scheduler").config()
    alpha_bar, prediction_type = diffusion.noise_schedule(scheduler), scheduler["prediction_type"]
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    x0 = posterior[:, 0] * scaling_factor  # its mean
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.linspace(0, len(alpha_bar) - 1, HELD_OUT).long()[torch.randperm(HELD_OUT, generator=generator)]
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).expand(HELD_OUT, -1)
    losses = {}
    for name, scale in (("base", 0.0), ("lora", 1.0)):
        adapters.set_scale(scale)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        predicted = unet(diffusion.add_noise(x0, eps, t, alpha_bar), t, text, added_cond_kwargs=conditions).sample
        wanted = diffusion.target(x0, eps, t, alpha_bar, prediction_type)
        losses[name] = round(diffusion.squared_error(predicted, wanted).mean().item(), 5)
    return losses


def drawn(run):
    """[(prompt, the base's picture, the LoRA's)], paths, of what can be scored in RUN/compare."""
    folder = run / "compare"
    if not (folder / "report.json").exists():
        raise errors.UserError(f"{folder / 'report.json'}: not there; run python -m infer --output_dir {run} first")
    report, digest = json.loads((folder / "report.json").read_text()), disk.sha256_file(run / "lora.safetensors")
    base, *others = report["rows"]
    of_the_run = [row["pictures"] for row in others if row["lora"]["sha256"] == digest and row["scale"] == 1]
    if not of_the_run:
        return []
    rows = zip(report["prompts"], base["pictures"], of_the_run[0])  # behind these are those of --unrelated_prompt
    return [(prompt, folder / base, folder / lora) for prompt, base, lora in rows if in_the_world(prompt)]


def in_the_world(prompt):
    """Whether the toy world has what a prompt asks for, so that its picture can be scored."""
    try:
        parse(prompt)
    except ValueError:
        return False
    return True


def score(run, drawn):
    """All scores of a run that was trained and compared. drawn: as above. -> dict, as scores.json holds it."""
    prompts = [prompt for prompt, _, _ in drawn]
    scenes = [parse(prompt) for prompt in prompts]
    manifest = read_manifest(cache_folder(run))
    model, vae_model = Model(**manifest["model"]), Model(**manifest["vae"])

    vae = load(AutoencoderKL, vae_model.component("vae"), torch.float32, "cpu")
    true = {
        style: through_vae(vae, [render(s, style, TRUE_SEED + i) for i, s in enumerate(scenes)])
        for style in ("base", "ink")
    }
    pictures = {
        name: [Image.open(row[column]).convert("RGB") for row in drawn] for name, column in (("base", 1), ("lora", 2))
    }
    classify = SubjectClassifier()
    lines = {name: lines_of_each(images, true["base"], true["ink"]) for name, images in pictures.items()}
    return {
        "base": picture_scores(pictures["base"], scenes, "base", true, classify),
        "lora": picture_scores(pictures["lora"], scenes, "ink", true, classify),
        "heldout_loss": held_out_loss(run, model, vae_model, manifest["scaling_factor"]),
        "chance": {"style": 0.0, "colour": round(1 / len(COLOURS), 3), "subject": round(1 / len(SUBJECTS), 3)},
        "true": {style: picture_scores(true[style], scenes, style, true, classify) for style in ("base", "ink")},
        "prompts": len(prompts),
        "lines_of_each": [
            {"prompt": prompt, "base": round(base, 3), "lora": round(lora, 3)}
            for prompt, base, lora in zip(prompts, lines["base"], lines["lora"])
        ],
    }


def on_the_toys_pictures(run):
    """Whether all that the run's cache holds was drawn into RUN/pictures by data.toy.draw."""
    drawn = {image_digest(path.read_bytes()) for path in (run / "pictures").glob("*.png")}
    index, _ = read_index(cache_folder(run)) or ([], [])
    return bool(len(index)) and set(index["image_digest"].tolist()) <= drawn


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m data.toy.score", description="score a run of the toy preset")
    parser.add_argument("run", type=Path, help="the run's folder, after precompute, train and infer")
    run = parser.parse_args(argv).run
    if not on_the_toys_pictures(run):
        print(f"{run}: not trained on the toy's own pictures, so there is nothing to score")
        return
    to_score = drawn(run)
    if not to_score:
        print(  # pictures of something else are no fault
            f"{run / 'compare'}: no prompt of the toy world is drawn there with this run's LoRA at strength 1, so "
            "there is nothing to score"
        )
        return
    scores = score(run, to_score)
    path = run / "compare" / "scores.json"
    with disk.atomic_write(path, "w") as file:
        json.dump(scores, file, indent=1)
    for each in scores["lines_of_each"]:
        print(f"lines {each['lora']:.2f} {each['prompt']}")
    for name in ("base", "lora"):
        shown = [f"{measure} {scores[name][measure]:.2f}" for measure in ("style", "lines", "colour", "subject")]
        print(name, *shown, f"held-out loss {scores['heldout_loss'][name]:.4f}")
    print(path)
    write_report(run)  # again, with the scores in it


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
