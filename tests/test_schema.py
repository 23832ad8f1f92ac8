"""Which configs of a model are let in: SDXL's as published, and no other mathematics than its own, by name."""

import json
import os
import shutil

import pytest
from conftest import PIPELINE, PRECOMPUTE, Forked, one_line_error

from data.common.errors import UserError
from data.common.fields import check_fields, loads, number, one_of, read_json, shown, whole
from data.models.files import Model
from data.models.schema import CONFIGS
from tests.bench.full_size import UNET as SDXL

# As published with stabilityai/stable-diffusion-xl-base-1.0 and madebyollin/sdxl-vae-fp16-fix.
SPECIAL = dict(lstrip=False, normalized=True, rstrip=False, single_word=False)
CLIP = dict(attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2, initializer_factor=1.0, pad_token_id=1)
CLIP |= dict(initializer_range=0.02, layer_norm_eps=1e-5, max_position_embeddings=77, model_type="clip_text_model")
CLIP |= dict(torch_dtype="float16", transformers_version="4.32.0.dev0", vocab_size=49408)
END = dict(SPECIAL, __type="AddedToken", content="<|endoftext|>")
TOKENIZER = dict(add_prefix_space=False, bos_token=dict(END, content="<|startoftext|>"), eos_token=END, unk_token=END)
TOKENIZER |= dict(clean_up_tokenization_spaces=True, do_lower_case=True, errors="replace", model_max_length=77)
TOKENIZER |= dict(tokenizer_class="CLIPTokenizer", pad_token="<|endoftext|>")
OFF = """class_embed_type cross_attention_norm encoder_hid_dim encoder_hid_dim_type mid_block_only_cross_attention
    num_attention_heads num_class_embeds time_cond_proj_dim time_embedding_act_fn time_embedding_dim timestep_post_act
    upcast_attention"""
PUBLISHED = {
    "unet": dict(
        {name: list(value) if type(value) is tuple else value for name, value in SDXL.items()},
        _class_name="UNet2DConditionModel",
        _diffusers_version="0.19.0.dev0",
        act_fn="silu",
        addition_embed_type_num_heads=64,
        center_input_sample=False,
        class_embeddings_concat=False,
        conv_in_kernel=3,
        conv_out_kernel=3,
        downsample_padding=1,
        dual_cross_attention=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        in_channels=4,
        layers_per_block=2,
        mid_block_scale_factor=1,
        mid_block_type="UNetMidBlock2DCrossAttn",
        norm_eps=1e-5,
        norm_num_groups=32,
        only_cross_attention=False,
        out_channels=4,
        resnet_out_scale_factor=1.0,
        resnet_skip_time_act=False,
        resnet_time_scale_shift="default",
        time_embedding_type="positional",
        **dict.fromkeys(OFF.split()),
    ),
    "vae": dict(
        _class_name="AutoencoderKL",
        _diffusers_version="0.20.0.dev0",
        _name_or_path="../sdxl-vae/",
        act_fn="silu",
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        force_upcast=False,
        in_channels=3,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=32,
        out_channels=3,
        sample_size=512,
        scaling_factor=0.13025,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ),
    "scheduler": dict(
        _class_name="EulerDiscreteScheduler",
        _diffusers_version="0.19.0.dev0",
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        clip_sample=False,
        interpolation_type="linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        sample_max_value=1.0,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        timestep_spacing="leading",
        trained_betas=None,
        use_karras_sigmas=False,
    ),
    "text_encoder": dict(
        CLIP,
        architectures=["CLIPTextModel"],
        hidden_act="quick_gelu",
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        projection_dim=768,
    ),
    "text_encoder_2": dict(
        CLIP,
        architectures=["CLIPTextModelWithProjection"],
        hidden_act="gelu",
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=20,
        num_hidden_layers=32,
        projection_dim=1280,
    ),
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER | dict(pad_token="!"),
    "model_index": dict(
        _class_name="StableDiffusionXLPipeline",
        _diffusers_version="0.19.0.dev0",
        force_zeros_for_empty_prompt=True,
        add_watermarker=None,
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        text_encoder=["transformers", "CLIPTextModel"],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
    ),
}


@pytest.fixture
def model(tmp_path):
    """A copy of the toy's model to change."""
    shutil.copytree(PIPELINE, tmp_path / "model")
    return tmp_path / "model"


def path_of(model, name):
    return model / ("" if name == "model_index" else name) / CONFIGS[name][0]


def edit(model, name, **changes):
    path = path_of(model, name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check(model):
    Model(str(model)).check()
    Model(str(model)).component("vae").config()


def refusal(model):
    with pytest.raises(UserError) as refused:
        check(model)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400 + len(str(model))
    return str(refused.value)


def test_sdxls_own_configs_are_let_in(model):
    """As they are published; a bound that is too narrow would turn everybody away."""
    for name, config in PUBLISHED.items():
        path_of(model, name).write_text(json.dumps(config))
    check(model)


OTHER_MATHEMATICS = [  # what models that people have say, and what the line names
    ("unet", dict(in_channels=9), "in_channels is 9 instead of 4"),  # inpainting
    ("unet", dict(in_channels=8), "in_channels is 8"),  # editing pictures
    ("unet", dict(layers_per_block=1), "layers_per_block is 1"),  # Koala: the exported names would be wrong
    ("unet", dict(time_cond_proj_dim=256), "time_cond_proj_dim is 256"),  # LCM
    ("unet", dict(addition_embed_type=None), "addition_embed_type is null"),  # Stable Diffusion 1 and 2
    ("unet", dict(cross_attention_dim=2048), "wants text of width 2048, its text encoders give 128"),
    ("unet", dict(projection_class_embeddings_input_dim=2560), "wants pooled text of width"),  # a refiner
    ("unet", dict(quantization_config=dict(bits=4)), '"quantization_config" is an object of 1 fields: not known here'),
    ("unet", dict(center_input_sample=True), "center_input_sample is true"),
    ("vae", dict(latent_channels=16, shift_factor=0.1159), "latent_channels is 16 instead of 4"),  # SD 3's, Flux's
    ("vae", dict(shift_factor=0.1159), "shift_factor is 0.1159"),
    ("vae", dict(latents_mean=[-1.6574, 1.886, -1.383, 2.5155]), "latents_mean is"),  # Playground 2.5
    ("vae", dict(latents_std=[8.4927, 5.9022, 6.5498, 5.2299]), "latents_std is"),
    ("vae", dict(block_out_channels=[32, 48, 80]), "block_out_channels is"),
    ("scheduler", dict(_class_name="EDMDPMSolverMultistepScheduler"), "_class_name is"),  # Playground 2.5
    ("scheduler", dict(_class_name="FlowMatchEulerDiscreteScheduler"), "_class_name is"),
    ("scheduler", dict(beta_schedule="squaredcos_cap_v2"), 'beta_schedule is "squaredcos_cap_v2"'),
    ("scheduler", dict(trained_betas=[0.1]), "trained_betas is"),
    ("scheduler", dict(prediction_type="sample"), "prediction_type is"),
    ("scheduler", dict(use_flow_sigmas=True), "use_flow_sigmas is true"),
    ("text_encoder", dict(max_position_embeddings=248), "max_position_embeddings is 248"),  # LongCLIP
    ("text_encoder_2", dict(model_type="t5"), "model_type is"),
    ("tokenizer", dict(padding_side="left"), "padding_side is"),
    ("model_index", dict(requires_aesthetics_score=True), "requires_aesthetics_score is true"),  # a refiner
    ("model_index", dict(_class_name="StableDiffusion3Pipeline"), "_class_name is"),
    ("model_index", dict(vae=["diffusers", "AutoencoderTiny"]), "vae is"),
    ("model_index", dict(controlnet=["diffusers", "ControlNetModel"]), '"controlnet" is'),
]


@pytest.mark.parametrize("name, changes, words", OTHER_MATHEMATICS)
def test_other_mathematics_is_refused_by_name(name, changes, words, model):
    edit(model, name, **changes)
    line = refusal(model)
    assert words in line and ("its UNet wants" in line or str(path_of(model, name)) in line)


@pytest.mark.parametrize("name, changes", [("unet", dict(in_channels=9)), ("vae", dict(latents_mean=[1.0] * 4))])
def test_it_is_refused_before_a_row_is_encoded(name, changes, model, pictures, tmp_path):
    """Through the command: it was hours of encoding, and then a traceback in training (or latents off by 5)."""
    edit(model, name, **changes)
    flags = ["--output_dir", tmp_path / "run", "--train_data_dir", pictures, *PRECOMPUTE]
    flags += ["--pretrained_model_name_or_path", model]
    process = Forked("data.precompute", flags, tmp_path / "log")
    assert process.wait() == 2
    line = one_line_error(process.output)
    assert str(path_of(model, name)) in line and next(iter(changes)) in line
    assert not list((tmp_path / "run").rglob("*.rows"))


def test_what_changes_nothing_is_passed_over(model):
    """Other libraries and later versions write fields of their own; off is off."""
    edit(
        model, "unet", _name_or_path="somewhere", dropout=0.1, new_in_2027=False, newer=None, mid_block_scale_factor=1.0
    )
    edit(model, "scheduler", solver_order=2, algorithm_type="dpmsolver++", _class_name="DPMSolverMultistepScheduler")
    edit(model, "text_encoder", torch_dtype="bfloat16", id2label={"0": "LABEL_0"})
    check(model)


ODD = [None, True, -1, 0, 2**63, 10**400, 1e-300, 1e308, "", "x", "x" * 10**6, [], [None], {}, {"a": 1}, [[1]]]
NEEDED = [("unet", "in_channels"), ("unet", "block_out_channels"), ("unet", "attention_head_dim"), ("unet", "norm_eps")]
NEEDED += [
    ("vae", "scaling_factor"),
    ("vae", "down_block_types"),
    ("vae", "use_quant_conv"),
    ("vae", "norm_num_groups"),
]
NEEDED += [("scheduler", "beta_start"), ("scheduler", "num_train_timesteps"), ("text_encoder", "hidden_size")]
NEEDED += [("text_encoder_2", "vocab_size"), ("tokenizer", "pad_token"), ("model_index", "text_encoder")]


LET_IN = {"use_quant_conv": [True], "pad_token": ["x"]}


@pytest.mark.parametrize("name, field", NEEDED)
def test_odd_values_are_refused_with_file_and_field(name, field, model):
    for value in ODD:
        edit(model, name, **{field: value})
        if any(value is fine for fine in LET_IN.get(field, [])):
            check(model)
        else:
            line = refusal(model)
            assert str(path_of(model, name)) in line and f"{field} is" in line, value


NOT_PLAIN = {
    "nested": "[" * 100_000 + "]" * 100_000,
    "nested, and legal": '{"a": ' + "[" * 40 + "]" * 40 + "}",
    "twice": '{"in_channels": 4, "in_channels": 9}',
    "NaN": '{"norm_eps": NaN}',
    "infinite": '{"norm_eps": 1e999}',
    "4,301 digits": '{"in_channels": ' + "4" * 4301 + "}",
    "cut": '{"in_channels": 4',
    "empty": "",
    "a list": "[]",
    "text": '"in_channels"',
    "huge": '{"a": "' + "x" * 2**20 + '"}',
}


@pytest.mark.parametrize("case", NOT_PLAIN)
@pytest.mark.parametrize("name", ["unet", "tokenizer_2", "model_index"])
def test_json_that_is_not_plain_is_refused_by_name(name, case, model):
    path_of(model, name).write_text(NOT_PLAIN[case])
    assert str(path_of(model, name)) in refusal(model)


def test_a_config_that_is_no_file_is_refused_by_name(model):
    """A pipe would be waited for without end."""
    path = path_of(model, "scheduler")
    path.unlink()
    assert f"{path}: not there or damaged" in refusal(model)
    os.mkfifo(path)
    assert f"{path}: not there or damaged" in refusal(model)
    path.unlink()
    path.mkdir()
    assert f"{path}: not there or damaged" in refusal(model)


# ---- The rules themselves, which the manifest and the state use as well


TABLE = {"steps": whole(1, 10), "rate": number(0, 1, missing=0.5), "kind": one_of("a", None), "comment": None}


def test_fields_are_checked_and_filled_in():
    found = check_fields(TABLE, dict(steps=3, kind=None, comment=[1]), "x", "do y")
    assert found == dict(steps=3, rate=0.5, kind=None)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(steps=True, kind="a"), "x: steps is true instead of a whole number from 1 to 10; do y"),
        (dict(steps=1.0, kind="a"), "x: steps is 1.0 instead of a whole"),
        (dict(kind="a"), "x: no steps in it, which must be a whole"),
        (dict(steps=1, kind="b"), 'x: kind is "b" instead of "a" or null'),
        (dict(steps=1, kind="a", rate=2), "x: rate is 2 instead of a number from 0 to 1"),
        (dict(steps=1, kind="a", more=1), 'x: "more" is 1: not known here'),
        ([], "x: holds [] instead of named fields"),
    ],
)
def test_a_broken_rule_is_named(values, words):
    with pytest.raises(UserError) as refused:
        check_fields(TABLE, values, "x", "do y")
    assert str(refused.value).startswith(words)


def test_an_object_inside_has_a_table_of_its_own():
    assert check_fields({"inside": TABLE}, {"inside": dict(steps=1, kind="a")}, "x", "y")["inside"]["rate"] == 0.5
    for odd, words in (
        (None, "x: inside: holds null instead"),
        (dict(steps=0, kind="a"), "x: inside: steps is 0 instead"),
    ):
        with pytest.raises(UserError) as refused:
            check_fields({"inside": TABLE}, {"inside": odd}, "x", "y")
        assert str(refused.value).startswith(words)


def test_values_are_shown_on_one_short_line():
    for value in (*ODD, "a\nb", {"x": [[0] * 10] * 10}, list(range(10**6))):
        assert len(shown(value)) <= 60 and "\n" not in shown(value)


def test_loads_equals_jsons_on_what_is_plain():
    for name in CONFIGS:
        blob = path_of(PIPELINE, name).read_bytes()
        assert loads(blob) == json.loads(blob) == read_json(path_of(PIPELINE, name), "")
