"""The whole job, as large as the Naruto one: python -m tests.bench.job OUT

Random weights of SDXL's shapes and 1,221 pictures of 1280 × 1024 go through the real commands: precompute, precompute
again with nothing to do, 500 steps of 4 micro-steps with the held-out loss at each save, three prompts compared. Writes
OUT/job.json: the seconds of each command from its start to its end, and of train to its first step. `--toy` does the
same with the small pipeline, for a machine without a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.bench.full_size import TOY, make_pictures, make_pipeline

PROMPTS = ("a red house in the forest", "a fox in the snow", "an old man at the sea")


def seconds(module, *flags, until=None):
    """(seconds of python -m module, seconds until the file `until` has a line)"""
    began, first = time.perf_counter(), None
    command = subprocess.Popen([sys.executable, "-m", module, *map(str, flags)])
    while command.poll() is None:
        if until and first is None and until.exists() and until.stat().st_size:
            first = time.perf_counter() - began
        time.sleep(0.02)
    if command.returncode:
        raise SystemExit(command.returncode)
    return time.perf_counter() - began, first


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true", help="the small pipeline, few pictures and steps")
    args = parser.parse_args()
    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if args.toy:
        pipeline, count, side, steps, precision = TOY, 12, 128, 5, "no"
    else:
        pipeline, count, side, steps, precision = work / "pipeline", 1221, 1024, 500, "fp16"
        make_pipeline(pipeline, "cuda")
    make_pictures(work / "pictures", count, side)

    results, run = dict(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"), work / "run"
    common = ("--output_dir", run)
    what = ("--pretrained_model_name_or_path", pipeline, "--train_data_dir", work / "pictures", "--resolution", side)
    what += ("--validation_fraction", 0.02)
    for name in ("precompute", "precompute_again"):
        results[name], _ = seconds("data.precompute", *common, *what, "--mixed_precision", precision)
    how = ("--rank", 32, "--max_train_steps", steps, "--use_8bit_adam", "--mixed_precision", precision)
    results["train"], results["to_first_step"] = seconds("train", *common, *how, until=run / "metrics.jsonl")
    drawn = ("--num_inference_steps", 2) if args.toy else ()
    results["compare"], _ = seconds(
        "infer", *common, *drawn, *(word for prompt in PROMPTS for word in ("--prompt", prompt))
    )
    results["job"] = results["precompute"] + results["train"] + results["compare"]
    shutil.rmtree(work)
    (args.out / "job.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
