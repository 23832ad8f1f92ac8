"""The one sampler: text embeddings and noise -> a picture, through diffusers' StableDiffusionXLPipeline.

It takes embeddings instead of a prompt and needs no text encoder, so none is in memory next to the UNet.
"""

import hashlib

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

from data.common.disk import atomic_write
from data.common.errors import NumbersError
from data.models.files import load


def make_pipeline(model, unet, vae_model):
    """A pipeline around `unet`, with the decoder of `vae_model` and the model's own noise schedule (Euler sampler).

    With zero terminal SNR the sampler begins at the last timestep (Lin et al. 2023, section 3.3).
    """
    schedule = model.component("scheduler").config()
    if schedule["rescale_betas_zero_snr"]:
        schedule["timestep_spacing"] = "trailing"
    return StableDiffusionXLPipeline(
        vae=load(AutoencoderKL, vae_model.component("vae"), unet.dtype, unet.device, _decoder_alone),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(schedule),
        add_watermarker=False,
    )


def _decoder_alone(vae):
    vae.encoder = vae.quant_conv = None


def noise(seed, prompt, shape):
    """Standard normal noise (1, *shape). It depends on seed and prompt alone, not on other prompts or the device."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randn((1, *shape), generator=generator)


@torch.inference_mode()
def sample(pipeline, embeddings, latents, steps, guidance, asked_to_stop=lambda: False):
    """Draw one picture (PIL) from the noise `latents` (1, 4, h, w), whose size decides the picture's.

    embeddings: text (1, L, 2048), pooled (1, 1280), then both of the negative prompt. asked_to_stop(): looked at after
    each of the sampler's steps; a picture that is not finished is None.
    """

    def after_step(pipeline, *_):
        pipeline._interrupt = asked_to_stop()  # diffusers' documented way to leave out the steps that remain
        return {}

    pipeline.set_progress_bar_config(disable=True)
    unet, factor = pipeline.unet, pipeline.vae_scale_factor
    text, pooled, negative_text, negative_pooled = (e.to(unet.device, unet.dtype) for e in embeddings)
    pixels = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_text,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=latents.to(unet.device, unet.dtype),
        height=latents.shape[2] * factor,
        width=latents.shape[3] * factor,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
        callback_on_step_end=after_step,
    ).images
    if asked_to_stop():
        return None
    if not np.isfinite(pixels).all():
        raise NumbersError(
            "a picture's numbers are not finite, it would be black; try a smaller --lora_scale, "
            "or another VAE that is made for half precision"
        )
    return pipeline.image_processor.numpy_to_pil(pixels)[0]


def write_png(picture, path):
    with atomic_write(path) as file:
        picture.save(file, "PNG")
