"""Flags: what is wrong is named, by one line, before torch is imported."""

import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from conftest import ROOT, one_line_error
from conftest import command as run_command

from data.common.errors import UserError
from data.common.flags import COMMANDS, KOHYA, parse, spelled

NEEDED = {
    "data.precompute": ["--output_dir", "x", "--pretrained_model_name_or_path", "y"],
    "train": ["--output_dir", "x"],
    "train.metrics": ["x"],
    "infer": ["--prompt", "a cat", "--output_dir", "x"],
    "infer.publish": ["x", "--hub_model_id", "fox/ink"],
}
FLAGS = [(command, f) for command, kind in COMMANDS.items() for f in fields(kind) if not f.metadata["positional"]]


def number(f):
    """int or float where the flag takes a number, else None."""
    return next((kind for kind in (int, float) if f.type in (kind, kind | None, tuple[kind, ...] | None)), None)


def bad_values():
    """Every (command, flag, value) out of bounds or of another type, from the flags' own declarations."""
    for command, f in FLAGS:
        bounds = f.metadata
        if number(f):
            yield from ((command, f.name, value) for value in ("ten", "", "1,5"))
        if number(f) is int:
            yield command, f.name, "1.5"
        if number(f) is float:
            yield from ((command, f.name, value) for value in ("nan", "inf", "-inf"))
        if bounds["at_least"] is not None:
            yield command, f.name, str(bounds["at_least"] - 1)
        if bounds["at_most"] is not None:
            yield command, f.name, str(bounds["at_most"] + 1)
        if bounds["above"] is not None:
            yield command, f.name, str(bounds["above"])
        if bounds["choices"]:
            yield command, f.name, "other"
        if f.type is bool:
            yield command, f.name, "=yes"


@pytest.mark.parametrize("command, name, value", list(bad_values()))
def test_a_bad_value_names_its_flag(command, name, value):
    words = [f"--{name}{value}"] if value.startswith("=") else [f"--{name}={value}"]
    with pytest.raises(UserError, match=rf"--{name}\b"):
        parse(command, NEEDED[command] + words)


@pytest.mark.parametrize("command, f", [(c, f) for c, f in FLAGS if number(f) and not f.metadata["choices"]])
def test_numbers_that_make_no_sense_are_refused(command, f):
    """Such as steps, sizes and shares below zero. Each number has a bound, unless every number means something."""
    if f.name == "lora_scale":  # -1 is the update's opposite
        assert parse(command, [*NEEDED[command], "--lora_scale=-1"]).lora_scale == (-1,)
    else:
        with pytest.raises(UserError, match=f"--{f.name} -1"):
            parse(command, [*NEEDED[command], f"--{f.name}=-1"])


@pytest.mark.parametrize("command", COMMANDS)
def test_another_commands_flag_is_answered_with_the_right_one(command):
    own = {f.name for f in fields(COMMANDS[command])}
    for other, f in FLAGS:
        if f.name in own:
            continue
        owner = next(c for c, g in FLAGS if g.name == f.name)
        message = rf"^--{f.name} is a flag of python -m {owner}, not of python -m {command}$"
        with pytest.raises(UserError, match=message):
            parse(command, [*NEEDED[command], f"--{f.name}", "1"])


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_and_missing_flags_are_named(command):
    stray = [] if command == "train.metrics" else [["stray"]]  # there it is one more run
    for words in (["--nonsense"], ["--nonsense=3"], ["--output_di", "x"], ["-q"], *stray):
        with pytest.raises(UserError, match=rf"^{words[0].split('=')[0]}: no such flag"):
            parse(command, [*NEEDED[command], *words])
    for f in fields(COMMANDS[command]):
        if f.default is MISSING and f.metadata["positional"]:
            with pytest.raises(UserError, match=f.name.upper()):
                parse(command, [])
        elif f.default is MISSING:
            at = NEEDED[command].index(f"--{f.name}")
            with pytest.raises(UserError, match=f"--{f.name}"):
                parse(command, NEEDED[command][:at] + NEEDED[command][at + 2 :])


def test_a_token_that_slipped_in_is_not_printed():
    with pytest.raises(UserError, match="^hf_…: no such flag"):
        parse("infer.publish", [*NEEDED["infer.publish"], "hf_secret"])


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_declared_and_settings_are_frozen(command):
    settings = parse(command, NEEDED[command])
    for f in fields(settings):
        if f.default is not MISSING:
            assert getattr(settings, f.name) == f.default
    with pytest.raises(AttributeError):
        setattr(settings, fields(settings)[0].name, "elsewhere")


def test_values_arrive_with_their_types():
    words = ["--output_dir", "x", "--rank", "8", "--lora_alpha", "4", "--snr_gamma=5", "--learning_rate", "1e-4"]
    train = parse("train", [*words, "--use_8bit_adam"])
    assert (train.rank, train.lora_alpha, train.snr_gamma) == (8, 4.0, 5.0)
    assert train.use_8bit_adam is True and train.learning_rate == 1e-4
    infer = parse("infer", ["--output_dir", "x", "--prompt", "a cat", "two", "--seed", "3", "--prompt", "dogs"])
    assert infer.prompt == ("a cat", "two", "dogs")
    several = ["--lora_path", "a", "b", "--lora_scale", "0.5", "1", "--lora_path", "c", "--unrelated_prompt", "a car"]
    infer = parse("infer", [*NEEDED["infer"], *several])
    assert (infer.lora_path, infer.lora_scale) == (("a", "b", "c"), (0.5, 1.0))
    assert infer.unrelated_prompt == ("a car",)


STEPS, EPOCHS = ("--max_train_steps", "7"), ("--num_train_epochs=3",)


@pytest.mark.parametrize(
    "words, steps, epochs",
    [((), 500, None), (STEPS, 7, None), (EPOCHS, None, 3), (STEPS + EPOCHS, None, 3), (EPOCHS + STEPS, 7, None)]
    + [(STEPS + EPOCHS + ("--max_train_steps", "9"), 9, None), (EPOCHS + STEPS + ("--num_train_epochs", "2"), None, 2)],
)
def test_of_steps_and_epochs_the_last_one_counts(words, steps, epochs):
    """Presets have steps, and what a user adds comes behind them."""
    train = parse("train", ["--output_dir", "x", *words])
    assert (train.max_train_steps, train.num_train_epochs) == (steps, epochs)


def test_one_name_has_one_meaning():
    """--seed in two commands is fine; the same name with another type would not be."""
    for name in {f.name for _, f in FLAGS}:
        assert len({f.type for _, f in FLAGS if f.name == name}) == 1, name


def test_help_lists_every_flag_with_its_default(capsys):
    for command, settings in COMMANDS.items():
        with pytest.raises(SystemExit) as left:
            parse(command, ["--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0 and all(spelled(f) in text for f in fields(settings))


def test_the_real_commands_refuse_in_one_line_before_importing_torch(tmp_path):
    """6 to 9 seconds of imports before "no such flag" is what users of training scripts are used to."""
    code = (
        "import runpy, sys\n"
        "run = sys.argv[1]\n"
        f"for command in {list(COMMANDS)}:\n"
        "    sys.argv = [command, *(['--output_dir'] if command != 'infer.publish' else []), run, '--nonsense']\n"
        "    try: runpy.run_module(command, run_name='__main__')\n"
        "    except SystemExit as left: print(left.code)\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'datasets') if m in sys.modules])\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n" * len(COMMANDS) + "[]\n", done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(COMMANDS) and all(line.startswith("error: ") for line in lines), done.stderr
    assert not (tmp_path / "run").exists()  # refused at the door: no folder is left behind


MAY_BE_EMPTY = ("prompt", "unrelated_prompt", "negative_prompt", "validation_prompt")
TEXTS = (str, str | None, tuple[str, ...], tuple[str, ...] | None)
WORDS = [(c, f.name) for c, f in FLAGS if f.type in TEXTS and f.name not in MAY_BE_EMPTY]


@pytest.mark.parametrize("command, name", WORDS)
def test_an_empty_word_is_refused(command, name):
    """It comes from a shell's variable that is not set. As a path it would be the folder that one stands in."""
    with pytest.raises(UserError, match=f"--{name}"):
        parse(command, [*NEEDED[command], f"--{name}", ""])


def test_an_empty_prompt_is_a_prompt():
    settings = parse("infer", ["--output_dir", "x", "--prompt", "", "a cat", "--negative_prompt", ""])
    assert settings.prompt == ("", "a cat") and settings.negative_prompt == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_data_dir", "dataset_name", "pretrained_model_name_or_path"])
def test_a_name_longer_than_a_disk_takes_is_one_line(name, pictures, tmp_path):
    words = [*NEEDED["data.precompute"], "--output_dir", tmp_path / "run", f"--{name}", "x" * 300]
    words += ["--train_data_dir", pictures] if name == "pretrained_model_name_or_path" else []
    assert "xxx" in one_line_error(run_command("data.precompute", *words, code=2))


# ---- What people type


@pytest.mark.parametrize("word", ["—rank", "–rank", "−−rank", "–-rank", "―rank=8", "—max-train-steps"])
def test_a_typographic_dash_is_named(word):
    """From a chat, a web page or an editor. Elsewhere it would be one more prompt, drawn for minutes."""
    right = "max_train_steps" if "max" in word else "rank"
    with pytest.raises(UserError, match=rf"^{word}: begins with a typographic dash; write --{right}$"):
        parse("train", ["--output_dir", "x", word, "8"])
    with pytest.raises(UserError, match="typographic dash; write --seed"):
        parse("infer", ["--output_dir", "x", "--prompt", "a cat", "—seed", "3"])
    assert parse("infer", ["--output_dir", "x", "--prompt", "– a cat – at night"]).prompt == ("– a cat – at night",)


TYPED = [
    ("train", "--learning-rate", "--learning_rate"),
    ("train", "--learnig_rate", "--learning_rate"),
    ("train", "-rank", "--rank"),
    ("train", "--batch_size", "--train_batch_size"),
    ("data.precompute", "--resoluton", "--resolution"),
    ("infer", "--prompts", "--prompt"),
    ("train", "--network_dim", "--rank"),  # as kohya's users call it, which no spelling is near to
    ("infer", "--resoluton", "--resolution"),  # the nearest is another command's, which the next try says
]


def test_what_kohyas_users_type_means_flags_that_are_there():
    ours = {f.name for kind in COMMANDS.values() for f in fields(kind)}
    assert set(KOHYA.values()) <= ours and not KOHYA.keys() & ours


@pytest.mark.parametrize("command, typed, meant", TYPED)
def test_a_mistyped_flag_gets_the_nearest_right_one(command, typed, meant):
    with pytest.raises(UserError, match=rf"^{typed}: no such flag of python -m {command}; did you mean {meant}\?$"):
        parse(command, [*NEEDED[command], typed, "1"])
    with pytest.raises(UserError, match="^--xyzzy: no such flag .*; see --help$"):
        parse(command, [*NEEDED[command], "--xyzzy"])


@pytest.mark.parametrize("command, f", [(c, f) for c, f in FLAGS if number(f)])
def test_no_number_is_without_end(command, f):
    """A key that was held down: nothing hangs, nothing overflows on its way to the GPU."""
    far = ["1e300", "-1e300", "1e-300"] if number(f) is float else ["1" + "0" * 20, "1" + "0" * 400, "9" * 5000]
    for value in far:
        with pytest.raises(UserError, match=f"--{f.name}"):
            parse(command, [*NEEDED[command], f"--{f.name}={value}"])


USELESS_FLAGS = [
    ("train", "--lr_warmup_steps 10", "constant_with_warmup"),
    ("train", "--lr_num_cycles 4 --lr_scheduler cosine", "cosine_with_restarts"),
    ("train", "--vram_gib 10 --gradient_checkpointing", "--gradient_checkpointing"),
    ("infer", "--negative_prompt ugly --guidance_scale 1", "--guidance_scale"),
    ("infer", "--lora_scale 1 0", "row of its own"),
    ("infer", "--prompt fox --unrelated_prompt car fox", "--prompt"),
    ("data.precompute", "--train_data_dir x --image_column photo", "--train_data_dir"),
    ("data.precompute", f"--pretrained_model_name_or_path {ROOT} --revision main", "folder"),
    ("data.precompute", "--keep_tokens 1", "--shuffle_caption"),
    ("data.precompute", "--caption_variants 4", "--shuffle_caption"),
    ("data.precompute", "--seed 3", "--shuffle_caption"),
]


@pytest.mark.parametrize("command, words, because", USELESS_FLAGS)
def test_a_flag_that_does_nothing_is_refused(command, words, because):
    """Who gives it expects something of it."""
    with pytest.raises(UserError, match=f"^--.*: does nothing .*{because}"):
        parse(command, [*NEEDED[command], *words.split()])


def test_a_flag_that_does_something_is_taken():
    train = lambda *words: parse("train", ["--output_dir", "x", *words])
    assert train("--lr_warmup_steps", "10", "--lr_scheduler", "cosine").lr_warmup_steps == 10
    assert train("--lr_num_cycles", "4", "--lr_scheduler", "cosine_with_restarts").lr_num_cycles == 4
    assert parse("infer", [*NEEDED["infer"], "--negative_prompt", "ugly"]).negative_prompt == "ugly"
    assert parse("infer", [*NEEDED["infer"], "--lora_scale", "0"]).lora_scale == (0,)
