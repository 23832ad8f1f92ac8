"""The two text encoders and the VAE encoder: run once by precompute, then gone.

Both are described by their files first (shapes, fingerprint) and loaded only when a row is missing.
"""

import torch
from safetensors import SafetensorError

from data.common.ahead import behind
from data.common.safe import UserError, out_of_memory
from data.models import fused
from data.models.files import load

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IN_FLIGHT = 2  # batches
SMALLEST_VOCABULARY = 514  # of a byte-level CLIP tokenizer: 256 bytes, each also at a word's end, start and end of text


class TextEncoders:
    """Both CLIPs as SDXL uses them.

    text    penultimate hidden states of the two side by side, (77, 768 + 1280)
    pooled  projected output of the second, (1280,)
    """

    def __init__(self, model, precision):
        self.name, self.dtype = model.name, DTYPES[precision]
        self.words = [model.part(f"tokenizer{s}") for s in ("", "_2")]
        self.parts = [model.part(f"text_encoder{s}") for s in ("", "_2")]
        configs = [part.config() for part in self.parts]
        self.text_shape = (configs[0]["max_position_embeddings"], sum(c["hidden_size"] for c in configs))
        self.pooled_shape = (configs[1]["projection_dim"],)
        self.fingerprint = "-".join(p.fingerprint() for p in self.words + self.parts) + f"-{precision}"

    def load(self, device):
        """Into memory. Raises UserError when they cannot tell two captions apart."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.tokenizers = [_read(part, CLIPTokenizer) for part in self.words]
        for tokenizer, part in zip(self.tokenizers, self.words):
            if len(tokenizer) < SMALLEST_VOCABULARY:  # without its files transformers gives 2 tokens and no error
                raise UserError(
                    f"{part.folder}: {len(tokenizer)} tokens; its vocabulary is missing, download the model again"
                )
        self.encoders = []
        for kind, part in zip((CLIPTextModel, CLIPTextModelWithProjection), self.parts):
            encoder, told = _read(part, kind, variant=part.variant, dtype=self.dtype, output_loading_info=True)
            if missing := sorted(told["missing_keys"]):  # transformers fills them with random numbers
                raise UserError(
                    f"{part.folder}: its weights lack {missing[0]} and {len(missing) - 1} more; download the model again"
                )
            self.encoders.append(encoder.to(device).eval())
        text, _ = self(["a cat", "two red houses at night"])
        if torch.equal(text[0], text[1]):
            raise UserError(f"{self.name}: its text encoders give the same for every caption; download the model again")
        return self

    def unload(self):
        self.encoders = None
        torch.cuda.empty_cache()

    def __call__(self, captions):
        """B strings -> text (B, 77, 2048), pooled (B, 1280), equal to StableDiffusionXLPipeline.encode_prompt.

        Raises UserError when a number is not finite.
        """
        text, pooled = self._states(captions)
        self._check(text.isfinite().all() and pooled.isfinite().all())
        return text, pooled

    def encode(self, batches):
        """(tag, B strings) pairs -> (tag, fp16 (B, 77 · 2048 + 1280) on the CPU: text, then pooled, flat), some batches behind.

        Raises UserError when a number is not finite.
        """
        return in_flight(self._start, self._finish, batches)

    @torch.inference_mode()
    def _states(self, captions):
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            length = self.text_shape[0]
            ids = tokenizer(
                captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            out = encoder(ids.to(encoder.device, non_blocking=True), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
        return torch.cat(hidden, dim=-1), out.text_embeds

    def _start(self, captions):
        text, pooled = self._states(captions)
        flat = torch.cat([text.flatten(1), pooled], dim=1).half()
        return fetch(flat, flat.isfinite().all())

    def _finish(self, flat, finite, wait):
        wait()
        self._check(finite)
        return flat

    def _check(self, finite):
        if not finite:
            what_to_do = "use another model" if self.dtype == torch.float32 else "try --mixed_precision no"
            raise UserError(f"{self.name}: its text encoders give numbers that are not finite; {what_to_do}")

    def truncated(self, caption):
        """Whether CLIP, which reads 75 tokens, does not see the end of the caption."""
        return len(self.tokenizers[0](caption).input_ids) > self.text_shape[0]


def _read(part, kind, **how):
    """kind.from_pretrained(part). Raises UserError naming the folder."""
    try:
        return kind.from_pretrained(part.folder, **how)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{part.folder}: damaged, or does not fit its config ({type(error).__name__}: {reason})"
        ) from error


class VAE:
    """The encoder half of the VAE: pixels -> mean and standard deviation of the latent posterior."""

    def __init__(self, model, precision):
        self.part = model.part("vae")
        self.config = self.part.config()
        lacks = [
            name for name in ("block_out_channels", "latent_channels", "scaling_factor") if name not in self.config
        ]
        if lacks:
            raise UserError(f"{self.part.folder / 'config.json'}: no {lacks[0]} in it; a VAE of SDXL's kind is needed")
        self.dtype = DTYPES[precision]
        if self.dtype == torch.float16 and self.config.get("force_upcast", True):
            self.dtype = (
                torch.float32
            )  # SDXL's own VAE overflows in fp16 and its config says so; the fp16-fix one's does not
        self.fingerprint = f"{self.part.fingerprint()}-{self.dtype}"

    def shape(self, size):
        """(height, width) in pixels -> shape of the moments, (2, 4, h, w)."""
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        return (2, self.config["latent_channels"], size[0] // factor, size[1] // factor)

    def load(self, device):
        from diffusers import AutoencoderKL

        torch.backends.cudnn.benchmark = True  # one shape, thousands of times
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

        def prepare(vae):
            vae.decoder = None
            vae.encoder.mid_block.attentions[0].set_processor(OneHeadAttention())
            fused.fuse(vae, device)

        self.vae = load(AutoencoderKL, self.part, self.dtype, device, prepare)
        return self

    def stage(self, pixels):
        """A batch of pixels, an array, as a tensor that can go to the device without waiting; for the workers to call."""
        pixels = torch.from_numpy(pixels)
        return pixels.pin_memory() if self.vae.device.type == "cuda" else pixels

    def encode(self, batches):
        """(tag, pixels uint8 (B, H, W, 3)) pairs -> (tag, moments fp16 (B, 2, 4, h, w) on the CPU), some batches behind.

        Moments: mean, std, before the scaling factor. A picture that half precision makes non-finite is encoded again in fp32;
        what still is not finite the caller refuses.
        """
        return in_flight(self._start, self._finish, batches)

    @torch.inference_mode()
    def _start(self, pixels):
        x = pixels.to(self.vae.device, non_blocking=True)
        x = (x.permute(0, 3, 1, 2).float() / 127.5 - 1).to(
            self.vae.dtype, memory_format=self.layout
        )  # (B, 3, H, W) in -1 .. 1
        posterior = self.vae.encode(x).latent_dist
        return pixels, *fetch(torch.stack([posterior.mean, posterior.std], dim=1).to(torch.float16))

    @torch.inference_mode()  # what _start made can be written only so
    def _finish(self, pixels, moments, wait):
        wait()
        bad = [i for i, m in enumerate(moments) if not m.isfinite().all()]
        if bad and self.dtype != torch.float32:
            self.vae.to(torch.float32)
            _, again, wait = self._start(pixels[bad])
            wait()
            moments[bad] = again
            self.vae.to(self.dtype)
        return moments


def in_flight(start, finish, batches):
    """(tag, batch) pairs -> (tag, finish(*start(batch))), on a GPU IN_FLIGHT batches behind: it works on those while this one is
    written."""
    most = IN_FLIGHT if torch.cuda.is_available() else 0
    return behind(lambda pair: (pair[0], start(pair[1])), lambda pair: (pair[0], finish(*pair[1])), batches, most)


def fetch(*tensors):
    """-> the tensors, on their way to the CPU, and a function that waits until they are there"""
    if tensors[0].device.type != "cuda":
        return *tensors, lambda: None
    fetched, arrived = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors], torch.cuda.Event()
    for there, here in zip(tensors, fetched):
        here.copy_(there, non_blocking=True)
    arrived.record()
    return *fetched, arrived.synchronize


class OneHeadAttention:
    """The attention in the VAE's middle, for diffusers' set_processor: one head of 512 channels over (H / 8) (W / 8) pixels.

    Flash attention ends at 256 channels. What PyTorch takes instead is slower than two plain products, a block of queries at
    a time so that the scores stay small: a tenth of the whole encoder's time (tests/bench/NOTES.md).
    """

    QUERIES = 4096

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)  # (B, h w, C)
        q, k, v = attn.to_q(x) * x.shape[-1] ** -0.5, attn.to_k(x).transpose(1, 2), attn.to_v(x)
        mixed = torch.cat([(block @ k).softmax(dim=-1) @ v for block in q.split(self.QUERIES, dim=1)], dim=1)
        return hidden_states + attn.to_out[0](mixed).unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)
