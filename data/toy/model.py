"""The toy's SDXL before training: every component of the real one, of the same type and wired the same way, but small.

The parts are two CLIP text encoders, whose hidden states are concatenated and the second of which has the pooled
projection; a UNet of DownBlock2D and two CrossAttnDownBlock2D with time ids in its embedding; an 8 x VAE with four
latent channels; and SDXL's noise schedule. `build` returns a diffusers StableDiffusionXLPipeline with random weights.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import palettes
from .world import COLOURS, SIZE, STYLES, SUBJECTS

# One token each, besides the world's own words, so that a user's caption costs few; byte pairs cover every other word.
COMMON_WORDS = (
    "a an the in on at of and with by to is style art photo picture painting drawing portrait anime ink naruto "
    "person man woman boy girl dog hair face wearing standing holding looking background"
)


@dataclass(frozen=True)
class Widths:
    """How wide the networks are. TINY is for tests of the training script."""

    vae: tuple = (32, 48, 80, 80)
    unet: tuple = (64, 64, 80)
    transformer_layers: tuple = (1, 2, 1)  # per UNet level; the first level has no attention
    heads: int = 4
    text: int = 64
    text_layers: int = 3
    norm_groups: int = 8


TINY = Widths(vae=(8, 8, 8, 8), unet=(8, 16, 16), transformer_layers=(1, 1, 1), heads=2, text=16, text_layers=2)


def world_words():
    """Every word of the captions that the base model is trained on."""
    phrases = [
        *SUBJECTS,
        *COLOURS,
        *(where for where, *_ in palettes.PLACES.values()),
        *(style.words for style in STYLES.values()),
    ]
    return [word for phrase in phrases for word in phrase.replace(",", " ,").split()]


def byte_characters():
    """The 256 printable characters as which CLIP's tokenizer writes bytes, the printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer(words, pad_token):
    """A CLIPTokenizer in which each of `words` is one token and every other text falls apart into pairs or bytes."""
    characters = byte_characters()
    tokens = characters + [c + "</w>" for c in characters]
    merges = []
    for word in dict.fromkeys(words):
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # in their order, as the tokenizer will apply them
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == pair:
                    symbols[i : i + 2] = ["".join(pair)]
                i += 1
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = [symbols[0] + symbols[1]]
            tokens.append(symbols[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)


def text_config(tokenizer, widths, activation):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=widths.text,
        intermediate_size=3 * widths.text,
        num_hidden_layers=widths.text_layers,
        num_attention_heads=widths.heads,
        projection_dim=widths.text,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build(widths=Widths(), seed=0):
    """-> StableDiffusionXLPipeline, fp32 on the CPU, random weights from `seed`."""
    torch.manual_seed(seed)
    words = COMMON_WORDS.split() + world_words()
    first, second = tokenizer(words, pad_token="<|endoftext|>"), tokenizer(words, pad_token="!")
    vae = AutoencoderKL(
        block_out_channels=widths.vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=widths.norm_groups,
        sample_size=SIZE,
        scaling_factor=0.13025,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths.unet,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=widths.transformer_layers,
        attention_head_dim=(widths.heads,) * 3,  # diffusers' name for the number of heads, as in SDXL's own config
        cross_attention_dim=2 * widths.text,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + widths.text,
        norm_num_groups=widths.norm_groups,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(first, widths, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(second, widths, "gelu")),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
