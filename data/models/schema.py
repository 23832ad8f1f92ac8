"""What the configs of a model may say: SDXL's own values, and bounds where models of its kind differ.

One table for each file, in diffusers' and transformers' names. A field that this program and the tools which load its
weights do not compute with must have SDXL's value: another one would be ignored somewhere, in silence. What only
concerns a library (versions, dropout, how a pipeline draws) changes nothing and is passed over.
"""

from data.common.errors import UserError
from data.common.fields import Rule, each, either, number, one_of, only, switch, text, whole

LEVELS = 3  # of SDXL's UNet; the names of the weights that training exports assume two blocks in each
VAE_LEVELS = 4  # each but the last halves the picture's sides
LATENT_CHANNELS = 4
TIME_IDS = 6  # the numbers that tell SDXL a picture's size, crop and bucket


def _per_level(rule, missing):
    """One value, or one for each level."""
    return either(rule, each(rule, LEVELS), missing=missing)


def _passed_over(names):
    """What changes nothing here."""
    return dict.fromkeys(names.split())


_width, _layers, _null = whole(8, 8192), whole(0, 64), one_of(None)
_layers_of_a_level = either(_layers, each(_layers, 1, 4))

UNET = {
    "in_channels": only(LATENT_CHANNELS),  # an inpainting UNet has 9, and one that edits pictures 8
    "out_channels": only(LATENT_CHANNELS),
    "sample_size": whole(8, 1024, missing=128, changes=False),  # which size is drawn where nobody names one
    "block_out_channels": each(_width, LEVELS),
    "down_block_types": one_of(["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]),
    "mid_block_type": one_of(
        "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None, missing="UNetMidBlock2DCrossAttn"
    ),  # smaller models made from SDXL have no attention there
    "up_block_types": one_of(["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]),
    "layers_per_block": one_of(2, [2] * LEVELS, missing=2),
    "transformer_layers_per_block": either(_layers, each(_layers_of_a_level, LEVELS), missing=1),
    "reverse_transformer_layers_per_block": either(_null, each(_layers_of_a_level, LEVELS), missing=None),
    "attention_head_dim": _per_level(whole(1, 256), missing=8),  # the number of heads: diffusers kept a wrong name
    "num_attention_heads": only(None),
    "cross_attention_dim": whole(8, 65536),
    "use_linear_projection": one_of(True),
    "upcast_attention": one_of(False, True, None, missing=False),
    "only_cross_attention": only(False),
    "dual_cross_attention": only(False),
    "mid_block_only_cross_attention": one_of(None, False, missing=None),
    "cross_attention_norm": only(None),
    "attention_type": only("default"),
    # What comes in besides the latent and the text: the timestep, the pooled text and the time ids.
    "addition_embed_type": one_of("text_time"),
    "addition_time_embed_dim": whole(2, 4096),
    "projection_class_embeddings_input_dim": whole(8, 65536),
    "flip_sin_to_cos": only(True),
    "freq_shift": only(0),
    "time_embedding_type": only("positional"),
    "time_embedding_dim": only(None),
    "time_embedding_act_fn": only(None),
    "timestep_post_act": only(None),
    "time_cond_proj_dim": only(None),  # a distilled model that takes the guidance scale as an input has 256
    "class_embed_type": only(None),
    "class_embeddings_concat": only(False),
    "num_class_embeds": only(None),
    "encoder_hid_dim": only(None),
    "encoder_hid_dim_type": only(None),
    # The layers.
    "center_input_sample": only(False),
    "act_fn": only("silu"),
    "norm_num_groups": whole(1, 1024, missing=32),
    "norm_eps": number(1e-12, 1, missing=1e-5),
    "downsample_padding": only(1),
    "mid_block_scale_factor": only(1),
    "resnet_time_scale_shift": only("default"),
    "resnet_skip_time_act": only(False),
    "resnet_out_scale_factor": only(1),
    "conv_in_kernel": only(3),
    "conv_out_kernel": only(3),
    **_passed_over("dropout addition_embed_type_num_heads"),
}

VAE = {
    "latent_channels": only(LATENT_CHANNELS),
    "scaling_factor": number(1e-3, 1e3),
    "shift_factor": one_of(None, 0, missing=None),  # SDXL's pipelines do not apply one
    "latents_mean": only(None),
    "latents_std": only(None),
    "in_channels": only(3),
    "out_channels": only(3),
    "block_out_channels": each(_width, VAE_LEVELS),
    "down_block_types": one_of(["DownEncoderBlock2D"] * VAE_LEVELS),
    "up_block_types": one_of(["UpDecoderBlock2D"] * VAE_LEVELS),
    "layers_per_block": whole(1, 8, missing=1),
    "mid_block_add_attention": only(True),
    "act_fn": only("silu"),
    "norm_num_groups": whole(1, 1024, missing=32),
    "use_quant_conv": switch(missing=True),
    "use_post_quant_conv": switch(missing=True),
    "force_upcast": switch(missing=True, changes=False),  # whether it overflows in fp16; the dtype is told apart anyway
    "sample_size": None,
}

# Schedulers that noise as SDXL was trained: xt = √ᾱ_t x0 + √(1 - ᾱ_t) eps. Those of EDM and of flow matching do not.
_SCHEDULERS = ["DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep"]
_SCHEDULERS += ["EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"]
_SCHEDULERS += ["LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"]
_scheduler = Rule(
    "a scheduler that noises as DDPM does, such as EulerDiscreteScheduler",
    [f"{name}Scheduler" for name in _SCHEDULERS].__contains__,
    missing="EulerDiscreteScheduler",
    changes=False,
)

SCHEDULER = {
    "_class_name": _scheduler,
    "beta_schedule": one_of("scaled_linear", "linear"),
    "beta_start": number(1e-6, 0.05),
    "beta_end": number(1e-6, 0.05),
    "num_train_timesteps": whole(10, 2000, missing=1000),
    "trained_betas": only(None),
    "rescale_betas_zero_snr": switch(missing=False),
    "prediction_type": one_of("epsilon", "v_prediction", missing="epsilon"),
    # How pictures are drawn, with the Euler sampler.
    "timestep_spacing": one_of("linspace", "leading", "trailing", missing="linspace", changes=False),
    "steps_offset": whole(0, 100, missing=0, changes=False),
    "use_karras_sigmas": one_of(False, True, None, missing=False, changes=False),
    "use_exponential_sigmas": one_of(False, None, missing=False, changes=False),
    "use_beta_sigmas": one_of(False, None, missing=False, changes=False),
    "use_flow_sigmas": one_of(False, None, missing=False),
    "interpolation_type": one_of("linear", "log_linear", missing="linear", changes=False),
    "timestep_type": only("discrete"),
    "sigma_min": only(None),
    "sigma_max": only(None),
    "final_sigmas_type": one_of("zero", "sigma_min", missing="zero", changes=False),
    **_passed_over(  # of other samplers than Euler
        """algorithm_type clip_sample clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio
        euler_at_final flow_shift lambda_min_clipped lower_order_final noise_sampler_seed original_inference_steps
        predict_x0 predictor_order sample_max_value set_alpha_to_one skip_prk_steps solver_order solver_p solver_type
        tau_func thresholding time_shift_type timestep_scaling use_lu_lambdas variance_type"""
    ),
}

TEXT_ENCODER = {
    "model_type": only("clip_text_model"),
    "vocab_size": whole(2, 2**24, missing=49408),
    "hidden_size": whole(8, 16384),
    "intermediate_size": whole(8, 65536),
    "projection_dim": whole(8, 16384, missing=512),
    "num_hidden_layers": whole(2, 256),  # SDXL reads the last but one
    "num_attention_heads": whole(1, 256),
    "max_position_embeddings": only(77),
    "hidden_act": one_of("quick_gelu", "gelu", missing="quick_gelu"),
    "layer_norm_eps": number(1e-12, 1, missing=1e-5),
    "eos_token_id": whole(0, 2**24, missing=49407),  # where the pooled text is taken
    **_passed_over("""architectures attention_dropout bos_token_id chunk_size_feed_forward dropout dtype id2label
        initializer_factor initializer_range label2id output_hidden_states pad_token_id problem_type return_dict
        tie_word_embeddings torch_dtype transformers_version use_cache"""),
}

_FLAGS_OF_A_TOKEN = {"lstrip", "rstrip", "normalized", "single_word", "special"}


def _is_token(value):
    if type(value) is not dict:
        return type(value) is str and 0 < len(value) <= 256
    flags = {name: flag for name, flag in value.items() if name not in ("content", "__type")}
    plain = flags.keys() <= _FLAGS_OF_A_TOKEN and all(type(flag) is bool for flag in flags.values())
    return plain and type(value.get("content")) is str and 0 < len(value["content"]) <= 256


def _are_tokens(value):
    if type(value) is not dict:
        return False
    ids = all(key.isascii() and key.isdecimal() and len(key) < 9 for key in value)
    return ids and all(type(token) is dict and _is_token(token) for token in value.values())


_token = Rule("a token's text", _is_token)

TOKENIZER = {
    "bos_token": _token,
    "eos_token": _token,
    "unk_token": _token,
    "pad_token": _token,
    "added_tokens_decoder": Rule("tokens by their number", _are_tokens, missing={}),
    "padding_side": only("right"),
    "truncation_side": only("right"),
    "tokenizer_class": one_of("CLIPTokenizer", "CLIPTokenizerFast", None, missing=None, changes=False),
    "errors": text(16, missing="replace", changes=False),
    **_passed_over("""add_prefix_space backend clean_up_tokenization_spaces do_lower_case is_local local_files_only
        model_max_length name_or_path processor_class special_tokens_map_file use_fast"""),
}


def _made_by(library, *kinds):
    """The entry of a pipeline's component: the library and the class that it is made by."""
    return one_of(*([library, kind] for kind in kinds), missing=[library, kinds[0]], changes=False)


_tokenizer = _made_by("transformers", "CLIPTokenizer", "CLIPTokenizerFast")

MODEL_INDEX = {
    "_class_name": Rule(
        "a StableDiffusionXL pipeline", lambda v: type(v) is str and v.startswith("StableDiffusionXL"), changes=False
    ),
    "unet": _made_by("diffusers", "UNet2DConditionModel"),
    "vae": _made_by("diffusers", "AutoencoderKL"),
    "text_encoder": _made_by("transformers", "CLIPTextModel"),
    "text_encoder_2": _made_by("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": _tokenizer,
    "tokenizer_2": _tokenizer,
    "force_zeros_for_empty_prompt": switch(missing=True),
    "requires_aesthetics_score": one_of(False, None, missing=False),  # a refiner has other time ids
    **_passed_over("scheduler add_watermarker feature_extractor image_encoder safety_checker requires_safety_checker"),
}

CONFIGS = {  # of each component: the file and its table
    "unet": ("config.json", UNET),
    "vae": ("config.json", VAE),
    "text_encoder": ("config.json", TEXT_ENCODER),
    "text_encoder_2": ("config.json", TEXT_ENCODER),
    "tokenizer": ("tokenizer_config.json", TOKENIZER),
    "tokenizer_2": ("tokenizer_config.json", TOKENIZER),
    "scheduler": ("scheduler_config.json", SCHEDULER),
    "model_index": ("model_index.json", MODEL_INDEX),
}


def check_together(name, unet, text_encoder, text_encoder_2):
    """Raise UserError when the parts of the model called `name`, given by their configs, do not fit each other."""
    gives = text_encoder["hidden_size"] + text_encoder_2["hidden_size"]
    if unet["cross_attention_dim"] != gives:
        raise UserError(
            f"{name}: its UNet wants text of width {unet['cross_attention_dim']}, its text encoders give {gives}; "
            "an SDXL model is needed"
        )
    wants = unet["projection_class_embeddings_input_dim"] - TIME_IDS * unet["addition_time_embed_dim"]
    if wants != text_encoder_2["projection_dim"]:
        raise UserError(
            f"{name}: its UNet wants pooled text of width {wants}, its second text encoder gives "
            f"{text_encoder_2['projection_dim']}; an SDXL model is needed"
        )
