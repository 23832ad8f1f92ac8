"""The two text encoders and the VAE encoder: run once by precompute, then gone.

Both are described by their files first (shapes, fingerprint) and loaded only when a row is missing.
"""

import torch

from data.models import load
from data.safe import UserError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
        self.tokenizers = [CLIPTokenizer.from_pretrained(part.folder) for part in self.words]
        for tokenizer, part in zip(self.tokenizers, self.words):
            if len(tokenizer) < SMALLEST_VOCABULARY:  # without its files transformers gives 2 tokens and no error
                raise UserError(f"{part.folder}: {len(tokenizer)} tokens; its vocabulary is missing, download the model again")
        self.encoders = [
            kind.from_pretrained(part.folder, variant=part.variant, dtype=self.dtype).to(device).eval()
            for kind, part in zip((CLIPTextModel, CLIPTextModelWithProjection), self.parts)
        ]
        text, _ = self(["a cat", "two red houses at night"])
        if torch.equal(text[0], text[1]):
            raise UserError(f"{self.name}: its text encoders give the same for every caption; download the model again")
        return self

    def unload(self):
        self.encoders = None
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def __call__(self, captions):
        """B strings -> text (B, 77, 2048), pooled (B, 1280), equal to StableDiffusionXLPipeline.encode_prompt.

        Raises UserError when a number is not finite.
        """
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            length = self.text_shape[0]
            ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            out = encoder(ids.to(encoder.device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
        text, pooled = torch.cat(hidden, dim=-1), out.text_embeds
        if not (text.isfinite().all() and pooled.isfinite().all()):
            raise UserError(f"{self.name}: its text encoders give numbers that are not finite; try --mixed_precision no")
        return text, pooled

    def truncated(self, caption):
        """Whether CLIP, which reads 75 tokens, does not see the end of the caption."""
        return len(self.tokenizers[0](caption).input_ids) > self.text_shape[0]


class VAE:
    """The encoder half of the VAE: pixels -> mean and standard deviation of the latent posterior."""

    def __init__(self, model, precision):
        self.part = model.part("vae")
        self.config = self.part.config()
        self.dtype = DTYPES[precision]
        if self.dtype == torch.float16 and self.config.get("force_upcast", True):
            self.dtype = torch.float32  # SDXL's own VAE overflows in fp16 and its config says so; the fp16-fix one's does not
        self.fingerprint = f"{self.part.fingerprint()}-{self.dtype}"

    def shape(self, size):
        """(height, width) in pixels -> shape of the moments, (2, 4, h, w)."""
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        return (2, self.config["latent_channels"], size[0] // factor, size[1] // factor)

    def load(self, device):
        from diffusers import AutoencoderKL

        self.vae = load(AutoencoderKL, self.part, self.dtype, device)
        self.vae.decoder = None
        return self

    @torch.inference_mode()
    def __call__(self, pixels):
        """pixels uint8 (B, H, W, 3) -> moments fp16 (B, 2, 4, h, w) on the CPU: mean, std, before the scaling factor.

        A picture that half precision makes non-finite is encoded again in fp32; what still is not finite the caller refuses.
        """
        moments = self._encode(pixels)
        bad = [i for i, m in enumerate(moments) if not m.isfinite().all()]
        if bad and self.dtype != torch.float32:
            self.vae.to(torch.float32)
            moments[bad] = self._encode(pixels[bad])
            self.vae.to(self.dtype)
        return moments

    def _encode(self, pixels):
        x = pixels.to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W) in -1 .. 1
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).to(torch.float16).cpu()
