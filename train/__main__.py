"""python -m train: what can be refused without torch first, then the seconds that importing it takes."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from data import check
from data.common import door, ranks, safe
from data.common.errors import UserError
from data.common.flags import parse
from data.common.imports import lean
from train import trackers

WRITES = ("state/", "samples/", "metrics.jsonl", "lora.safetensors", "lora-best.safetensors", "run.json", "rows.npz")


def main(argv):
    settings = check.eight_bit_adam(parse("train", argv))
    shared_out(settings.gradient_accumulation_steps)
    trackers.check_installed(settings.report_to)
    first = not ranks.index()
    held = door.hold(settings.output_dir, "--output_dir", WRITES) if first else nullcontext(Path(settings.output_dir))
    with held as run:
        from data.cache import cache_folder, read_manifest
        from infer.publish import ask, publish
        from train import same_run
        from train.epochs import in_steps

        cache = cache_folder(run, settings.cache_dir)
        with door.reading(cache):
            manifest = read_manifest(cache)
            try:
                settings = same_run.with_the_weights_facts(run, settings, argv, manifest["text_shape"][1])
                settings = same_run.with_its_base(run, settings)
                check.bitsandbytes(settings)
                if settings.restart:
                    settings = replace(settings, cache_dir=str(cache))  # which only run.json may know, and it will move
                else:
                    same_run.check_at_the_door(run, settings, manifest)
                something_to_look_at(settings, manifest)
                settings = in_steps(settings, cache, argv)
                publishes = settings.push_to_hub and first
                repository = ask(settings.hub_model_id, settings.private) if publishes else None
                # transformers takes seconds, and only diffusers' pipeline needs it, which draws validation prompts
                with lean(*([] if manifest["validation_prompts"] else ["transformers"])):
                    from train.loop import train

                train(settings, run)
            except same_run.AnotherRun as error:
                print(error.ways_on(argv))
                raise
        if repository:
            safe.end_at_once()
            publish(repository, run)


def shared_out(slots):
    """Raise UserError when the ranks cannot share a step's micro-steps evenly."""
    if slots % ranks.count():
        fit = [n * ranks.count() for n in (1, 2, 3)]
        raise UserError(
            f"--gradient_accumulation_steps {slots}: these are a step's micro-steps on all GPUs together, and "
            f"{ranks.count()} GPUs must share them evenly: choose {', '.join(map(str, fit))} …"
        )


def something_to_look_at(settings, manifest):
    """Raise UserError for --validation_steps where the cache, whose manifest it is, has nothing for them."""
    if settings.validation_steps and not manifest["held_out"] and not manifest["validation_prompts"]:
        raise UserError(
            "--validation_steps: the cache has no picture held out and no prompt to draw; "
            "run precompute with a --validation_fraction or a --validation_prompt first"
        )


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
