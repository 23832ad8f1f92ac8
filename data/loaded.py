"""The two text encoders and the VAE's encoder on their device: precompute runs them once per row, and training never
loads them.
"""

import contextlib
import itertools

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from data.common.ahead import behind
from data.common.errors import UserError, out_of_memory
from data.common.words import first_of
from data.encoders import CHUNK
from data.models import fused
from data.models.files import load, torch_dtype

IN_FLIGHT = 2  # batches that a GPU works on while an earlier one is written
SMALLEST_VOCABULARY = 514  # byte-level CLIP: 256 bytes, each also as the end of a word, and the start and end of a text


class LoadedTextEncoders:
    """Both CLIPs as SDXL uses them.

    text    the penultimate hidden states of both, side by side, (L, 768 + 1280); L = 77, with more chunks 152 or 227
    pooled  the projected output of the second one, (1280,)
    """

    def __init__(self, described, device):
        """described: TextEncoders (data/encoders.py)"""
        self.name, self.chunks = described.model.name, described.chunks
        self.tokens = described.chunks * CHUNK  # of a caption that are read
        self.dtype = torch_dtype(described.precision)
        disable_progress_bar()
        tokenizers, encoders = described.tokenizer_components, described.encoder_components
        self.tokenizers = [_read(CLIPTokenizer, component.folder, component) for component in tokenizers]
        for tokenizer, component, encoder in zip(self.tokenizers, tokenizers, encoders):
            if len(tokenizer) < SMALLEST_VOCABULARY:  # without its files transformers gives 2 tokens and no error
                raise UserError(
                    f"{component.folder}: {len(tokenizer)} tokens; its vocabulary is missing, download the model again"
                )
            if max(tokenizer.get_vocab().values()) >= encoder.config()["vocab_size"]:
                raise UserError(
                    f"{component.folder}: it has tokens that {encoder.folder} does not know; download the model again"
                )
        self.encoders = []
        for kind, component in zip((CLIPTextModel, CLIPTextModelWithProjection), encoders):
            config, how = CLIPTextConfig(**component.config()), dict(dtype=self.dtype, output_loading_info=True)
            encoder, report = _read(kind, None, component, config=config, state_dict=component.weights(), **how)
            if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
                raise UserError(f"{component}: its weights lack {first_of(missing)}; download the model again")
            self.encoders.append(encoder.to(device).eval())
        text, _ = self(["a cat", "two red houses at night"])
        if torch.equal(text[0], text[1]):
            raise UserError(f"{self.name}: its text encoders give the same for every caption; download the model again")

    def unload(self):
        self.encoders = None
        torch.cuda.empty_cache()

    def __call__(self, captions):
        """B strings -> text (B, L, 2048), pooled (B, 1280).

        With one chunk they are equal to StableDiffusionXLPipeline.encode_prompt, with more to kohya's sd-scripts
        (library/strategy_sdxl.py, SdxlTextEncodingStrategy), whose LoRAs and tools read long captions so.
        Raises UserError when a number is not finite.
        """
        text, pooled = self._states(captions)
        self._refuse_unless(text.isfinite().all() and pooled.isfinite().all())
        return text, pooled

    def encode(self, batches):
        """Encode the captions of each (tag, B strings), and yield (tag, rows fp16 (B, L · 2048 + 1280) on the CPU).

        A row is text, flat, and pooled behind it. Raises UserError when a number is not finite.
        """
        return in_flight(self._start, self._finish, batches)

    @torch.inference_mode()
    def _states(self, captions):
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            ids = in_chunks(tokenizer, captions, self.chunks)
            out = encoder(ids.to(encoder.device, non_blocking=True), output_hidden_states=True)
            hidden.append(joined(out.hidden_states[-2], self.chunks))
        return torch.cat(hidden, dim=-1), out.text_embeds[:: self.chunks]  # pooled of each caption's first chunk

    def _start(self, captions):
        text, pooled = self._states(captions)
        flat = torch.cat([text.flatten(1), pooled], dim=1).half()
        return Fetch(flat, flat.isfinite().all())

    def _finish(self, captions, fetch):
        flat, finite = fetch.wait()
        self._refuse_unless(finite)
        return flat

    def _refuse_unless(self, finite):
        if not finite:
            what_to_do = "use another model" if self.dtype == torch.float32 else "try --mixed_precision no"
            raise UserError(f"{self.name}: its text encoders give numbers that are not finite; {what_to_do}")

    def truncated(self, caption):
        """Whether the caption is longer than the tokens that are read of it."""
        return len(self.tokenizers[0](caption, add_special_tokens=False, verbose=False).input_ids) > self.tokens


def in_chunks(tokenizer, captions, chunks):
    """B strings -> token ids (B · chunks, 77): each caption's `chunks` chunks, one after the other.

    Each is a text of its own for CLIP: the start, up to 75 of the caption's tokens, the end, and padding.
    """
    texts = tokenizer(captions, add_special_tokens=False, truncation=True, max_length=chunks * CHUNK).input_ids
    ids = torch.full((len(texts) * chunks, CHUNK + 2), tokenizer.pad_token_id)
    for row, (text, i) in zip(ids, itertools.product(texts, range(0, chunks * CHUNK, CHUNK))):
        chunk = [tokenizer.bos_token_id, *text[i : i + CHUNK], tokenizer.eos_token_id]
        row[: len(chunk)] = torch.tensor(chunk)
    return ids


def joined(states, chunks):
    """Hidden states (B · chunks, 77, width) -> (B, 2 + 75 chunks, width): one start, all that is between, one end."""
    states = states.unflatten(0, (-1, chunks))
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)


def _read(kind, folder, component, **how):
    """kind.from_pretrained(folder, **how). Raises UserError naming where the component is."""
    damage = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)
    try:
        return kind.from_pretrained(folder, **how)
    except Exception as error:
        bare = type(error) is Exception  # the tokenizers package raises nothing more precise
        if out_of_memory(error) or not (bare or isinstance(error, damage)):
            raise
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{component}: damaged, or does not fit its config ({type(error).__name__}: {reason})"
        ) from error


class LoadedVAE:
    """The encoder half of the VAE: pixels -> posteriors, the mean and standard deviation of every latent."""

    def __init__(self, described, device):
        """described: VAE (data/encoders.py)"""
        self.dtype = torch_dtype(described.precision)
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

        def prepare(vae):
            vae.decoder, encoder = None, vae.encoder
            encoder.mid_block.attentions[0].set_processor(OneHeadAttention())
            fused.fuse(vae, device)
            encoder.down_blocks[0] = InSlices(encoder.conv_in, encoder.down_blocks[0])
            encoder.conv_in = nn.Identity()

        self.vae = load(AutoencoderKL, described.component, self.dtype, device, prepare)

    def stage(self, pixels):
        """An array of pixels -> a tensor that can go to the device without waiting. The workers call it."""
        pixels = torch.from_numpy(pixels)
        return pixels.pin_memory() if self.vae.device.type == "cuda" else pixels

    def encode(self, batches):
        """Encode each (tag, pixels uint8 (B, H, W, 3)), and yield (tag, posteriors fp16 (B, 2, 4, h, w) on the CPU).

        A posterior is mean and std, before the scaling factor. A picture that half precision makes non-finite is
        encoded again in fp32; one that is not finite then either is left for the caller to refuse.
        """
        return in_flight(self._start, self._finish, batches)

    @torch.inference_mode()
    def _start(self, pixels):
        x = pixels.to(self.vae.device, non_blocking=True)
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W) in -1 .. 1
        with fastest_convolutions():
            posterior = self.vae.encode(x.to(self.vae.dtype, memory_format=self.layout)).latent_dist
        return Fetch(torch.stack([posterior.mean, posterior.std], dim=1).to(torch.float16))

    @torch.inference_mode()  # because a tensor that _start made can be written in inference mode only
    def _finish(self, pixels, fetch):
        (posteriors,) = fetch.wait()
        bad = [i for i, posterior in enumerate(posteriors) if not posterior.isfinite().all()]
        if bad and self.dtype != torch.float32:
            self.vae.to(torch.float32)
            (again,) = self._start(pixels[bad]).wait()
            posteriors[bad] = again
            self.vae.to(self.dtype)
        return posteriors


def in_flight(start, finish, batches):
    """For each (tag, batch), in order, yield (tag, finish(batch, start(batch))).

    On a GPU IN_FLIGHT more batches are started before one is finished, so that the GPU works while the caller writes.
    """
    most = IN_FLIGHT if torch.cuda.is_available() else 0

    def begin(pair):
        tag, batch = pair
        return tag, batch, start(batch)

    def end(begun):
        tag, batch, result = begun
        return tag, finish(batch, result)

    return behind(begin, end, batches, most)


class Fetch:
    """Tensors on their way from the GPU to the CPU; wait() returns them when they have arrived."""

    def __init__(self, *tensors):
        self.tensors, self.arrived = tensors, None
        if tensors[0].device.type == "cuda":
            self.tensors, self.arrived = [_pinned_like(tensor) for tensor in tensors], torch.cuda.Event()
            for there, here in zip(tensors, self.tensors):
                here.copy_(there, non_blocking=True)
            self.arrived.record()

    def wait(self):
        if self.arrived:
            self.arrived.synchronize()
        return self.tensors


def _pinned_like(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


@contextlib.contextmanager
def fastest_convolutions():
    """In here cuDNN tries its algorithms on each new shape and keeps the fastest; thousands of one shape follow."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class InSlices(nn.Sequential):
    """The first level of the VAE's encoder, with the convolution before it, a few pictures at a time.

    Its tensors are as large as the pictures, twice those of the next level, and take the most memory. How many pictures
    is a function of their shape and the dtype alone, because how a picture is rounded depends on it.
    """

    BYTES = 2**22  # for one channel: two pictures of 1024 × 1024 in half precision

    def forward(self, x):
        """x (B, 3, H, W) -> (B, C, H / 2, W / 2)"""
        at_once = max(1, self.BYTES // (x.shape[2] * x.shape[3] * x.element_size()))
        return torch.cat([super(InSlices, self).forward(some) for some in x.split(at_once)])


class OneHeadAttention:
    """The attention in the VAE's middle, for diffusers' set_processor: one head, 512 channels, (H / 8) (W / 8) pixels.

    Flash attention ends at 256 channels, and what PyTorch takes instead is slower than two plain products: by a tenth
    of the whole encoder's time (tests/bench/NOTES.md). A block of queries at a time keeps the scores small.
    """

    QUERIES = 4096

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)  # (B, h w, C)
        q, k, v = attn.to_q(x) * x.shape[-1] ** -0.5, attn.to_k(x).transpose(1, 2), attn.to_v(x)
        mixed = torch.cat([(block @ k).softmax(dim=-1) @ v for block in q.split(self.QUERIES, dim=1)], dim=1)
        return hidden_states + attn.to_out[0](mixed).unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)
