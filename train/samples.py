"""Pictures of the validation prompts while training: RUN/samples/000100_0.png, 000100_1.png … after step 100.

They are what python -m infer draws with its own defaults and the weights as they are then. Precompute encoded the
prompts, so no text encoder is needed; the VAE's decoder is in memory only while pictures are drawn. They change nothing
of what is trained, and where there is no memory for them, training goes on without.
"""

import torch

from data.common.errors import MachineError, NumbersError, out_of_memory
from data.common.flags import Infer
from data.common.imports import lean
from data.common.words import shortened
from infer.memory import drawing
from train.validate import due


class Samples:
    """Draws the validation prompts of a run's cache; without prompts it does nothing, and imports nothing.

    memory  bytes of GPU memory that drawing takes, 0 without prompts
    """

    def __init__(self, settings, folder, cache, base, vae, unet, first=True):
        """settings: flags.Train. base, vae: the Models that the noise schedule and the decoder are from. unet: with the
        adapters in it. first: whether this is the first rank, which draws. Raises UserError when a prompt's row in the
        cache is damaged.
        """
        self.settings, self.folder, self.base, self.vae, self.unet = settings, folder / "samples", base, vae, unet
        self.resolution, self.warned = cache.manifest["resolution"], False
        self.prompts = embedded(cache) if first else []
        config = vae.component("vae").config() if self.prompts else None
        self.memory = drawing(unet.config, config, self.resolution, unet.dtype) if self.prompts else 0

    def draw(self, done, stop):
        """The pictures after `done` steps, where it is time for them -> {prompt's index and words: picture (PIL)}

        stop: safe.Signals; a signal ends it after the sampler's step that is under way. Where the memory is too small,
        or a picture's numbers are not finite, the first time is said in one line, and the run goes on.
        """
        pictures = {}
        if not self.prompts or not due(self.settings, done) or stop.received:
            return pictures
        try:
            self._draw(f"{done:06d}", stop, pictures)
        except NumbersError:
            self._warn(
                "a picture's numbers are not finite, it would be black; where the loss is fine, use a VAE that is made "
                "for half precision (precompute's --pretrained_vae_model_name_or_path)"
            )
        except (RuntimeError, MemoryError, MachineError) as error:
            full = "machine" if isinstance(error, MachineError) else out_of_memory(error)
            if not full:
                raise
            way = "a smaller --vram_gib leaves them room" if full == "GPU" else "end other programs"
            self._warn(f"the {full} is out of memory, so no more are drawn until it is started again; {way}")
            self.prompts = []
        torch.cuda.empty_cache()  # here, because the error held the tensors
        return pictures

    def _draw(self, step, stop, pictures):
        with lean():  # transformers' seconds, only where there are prompts
            from infer.sample import make_pipeline, noise, sample, write_png
        pipeline = make_pipeline(self.base, self.unet, self.vae, tiles=True)
        side = self.resolution // pipeline.vae_scale_factor
        steps = min(Infer.num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
        for i, (prompt, embeddings) in enumerate(self.prompts):
            latents = noise(Infer.seed, prompt, (self.unet.config.in_channels, side, side))
            picture = sample(pipeline, embeddings, latents, steps, Infer.guidance_scale, lambda: bool(stop.received))
            if picture is None:
                return
            write_png(picture, self.folder / f"{step}_{i}.png")
            pictures[f"{i} {shortened(prompt)}"] = picture

    def _warn(self, words):
        if not self.warned:
            print(f"warning: pictures while training: {words}; training goes on", flush=True)
        self.warned = True


def embedded(cache):
    """[(validation prompt, [text, pooled, unconditional text, unconditional pooled])] of a cache, each (1, …) fp16."""
    prompts = cache.manifest["validation_prompts"]
    if not prompts:
        return []
    text, pooled = map(torch.from_numpy, cache.texts([*prompts.values(), cache.manifest["unconditional"]]))
    *found, unconditional = zip(text.split(1), pooled.split(1))
    return [(prompt, [*own, *unconditional]) for prompt, own in zip(prompts, found)]
