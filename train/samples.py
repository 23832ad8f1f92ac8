"""Pictures of the validation prompts while training: RUN/samples/000100_0.png, 000100_1.png … after step 100.

They are what python -m infer draws with its own defaults and the weights as they are then. Precompute encoded the
prompts, so no text encoder is needed; the VAE's decoder is in memory only while pictures are drawn. They change nothing
of what is trained, and where there is no memory for them, training goes on without.
"""

import torch
from diffusers import AutoencoderKL

from data.common.errors import MachineError, NumbersError, out_of_memory
from data.common.flags import Infer
from data.common.imports import lean
from data.common.words import shortened
from train.validate import due

TILE = 512  # pixels: the side of the squares that a larger picture is decoded in, a quarter of each over its neighbour
# Tensors of the widest kind that are alive at once, in SDXL's UNet and in its VAE's decoder; memory() counts them.
IN_THE_UNET, IN_THE_DECODER = 24, 6
SPARE = 2**28  # bytes for the libraries' workspaces, and for holes between tensors


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
        self.resolution, self.prompts, self.warned = (
            cache.manifest["resolution"],
            embedded(cache) if first else [],
            False,
        )
        config = vae.component("vae").config() if self.prompts else None
        self.memory = memory(unet.config, config, self.resolution, unet.dtype) if self.prompts else 0

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
        pipeline = make_pipeline(self.base, self.unet, self.vae)
        factor = pipeline.vae_scale_factor
        pipeline.vae.enable_tiling()
        pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = TILE, TILE // factor
        side = self.resolution // factor
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


def memory(unet, vae, resolution, dtype):
    """Bytes of GPU memory that drawing takes besides what training holds, estimated and rather too many.

    unet, vae: configs. resolution: the picture's side, pixels. dtype: the UNet's.

    The UNet computes two latents at once, with the prompt and without it, and keeps nothing for a backward. Counted in
    tensors (2, 320, h, w), as wide as its first level, 13 are alive in its last level, where it needs the most: skip
    connections, the input with one of them, and their norm. The decoder computes one tile, of which 3 tensors (1, 256,
    TILE, TILE) are alive. Copies in another layout and a convolution's workspace may take as many again, so that almost
    twice as many are counted. A VAE that overflows in half precision is decoded in fp32.
    One comes after the other, so the larger of the two counts, and the decoder's weights.
    """
    upcast = vae["force_upcast"] and dtype == torch.float16
    bytes_of_vae = 4 if upcast else dtype.itemsize
    latent = (resolution // 2 ** (len(vae["block_out_channels"]) - 1)) ** 2
    in_unet = IN_THE_UNET * 2 * unet["block_out_channels"][0] * latent * dtype.itemsize
    in_decoder = IN_THE_DECODER * vae["block_out_channels"][1] * min(resolution, TILE) ** 2 * bytes_of_vae
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoencoderKL.from_config(vae).decoder.parameters())
    return weights * bytes_of_vae + max(in_unet, in_decoder) + SPARE
