"""Two GPUs of one machine against one of them: python -m tests.bench.ranks OUT

Random weights of SDXL's shapes, 1024², rank 32, fp16, the real commands, with torchrun and without it in turn. Writes
OUT/ranks.json: seconds per step of 8 micro-steps; images and captions per second of precompute, from the difference of
many pictures to few, which leaves out what loading costs; the seconds of a sum of a flat gradient over the GPUs, 186 MB
in fp32 and half as much; and, on paper, from that and the micro-step alone, what more GPUs would give. `--toy` does the
same with the small pipeline and two processes on the CPU, for a machine without GPUs.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.cache import KEY
from tests.bench.full_size import TOY, make_pictures, make_pipeline

SLOTS = 8  # gradient_accumulation_steps
NUMBERS = 1_451_520 * 32  # of a LoRA on SDXL's attention, rank 32
NETWORK = 25e9 / 8  # bytes/s of 25 Gbit/s between hosts


def command(count, module, *flags):
    """Run python -m module on `count` GPUs. -> (what it printed, seconds from its start to its end)"""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count > 1 else []
    argv = [sys.executable, *ranks, "-m", module, *flags]
    began = time.perf_counter()
    printed = subprocess.run(list(map(str, argv)), check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed, flush=True)
    return printed, time.perf_counter() - began


def precompute(work, what, counts, gpus):
    """-> {1: {images_per_s, captions_per_s, seconds}, ...}: of one GPU, then of several; and what they have in common.

    counts: the pictures of each run; the last two are compared, what comes before warms up.
    """
    found, (few, many) = {}, counts[-2:]
    for count in (1, gpus):
        took = {}
        for run, pictures in enumerate(counts):
            folder = work / f"precompute-{count}-{run}"
            printed, whole = command(
                count, "data.precompute", "--output_dir", folder, "--train_data_dir", work / str(pictures), *what
            )
            parts = re.search(r"text in ([\d.]+) s, pictures in ([\d.]+) s", printed)
            took[pictures] = dict(captions=float(parts[1]), images=float(parts[2]), whole=whole)
        found[count] = {
            f"{name}_per_s": (many - few) / max(0.1, took[many][name] - took[few][name])
            for name in ("captions", "images", "whole")
        } | dict(seconds=took)
    found["times"] = {name: found[gpus][name] / found[1][name] for name in ("images_per_s", "whole_per_s")}
    one, several = (work / f"precompute-{count}-{run}" / "cache" for count in (1, gpus))
    found["equal"] = {  # the share of rows; cuDNN may choose another algorithm on another GPU, which rounds otherwise
        path.stem: float(np.mean(np.fromfile(path, KEY) == np.fromfile(several / path.name, KEY)))
        for path in one.glob("*.keys")
    }
    return found


def training(work, cache, how, gpus, steps, turns):
    """-> {1: {s_per_step, all, peak_gib}, ...}: medians of each run's second half; the runs take turns."""
    found = {count: dict(all=[]) for count in (1, gpus)}
    for turn, count in enumerate((1, gpus) * turns):
        run = work / f"train-{count}-{turn}"
        flags = ("--output_dir", run, "--cache_dir", cache, "--gradient_accumulation_steps", SLOTS)
        command(count, "train", *flags, "--max_train_steps", steps, "--checkpointing_steps", steps, *how)
        lines = [json.loads(line) for line in open(run / "metrics.jsonl")]
        found[count]["all"].append([line["s_per_step"] for line in lines[:-1]])  # the last one ends with a save
        found[count]["peak_gib"] = lines[-1]["peak_gib"]
    for facts in found.values():
        facts["s_per_step"] = statistics.median(s for one in facts["all"] for s in one[len(one) // 2 :])
    found["times"] = found[1]["s_per_step"] / found[gpus]["s_per_step"]
    return found


def all_reduce(out):
    """What each rank runs: writes to `out` the seconds of a sum over all ranks, and bytes/s as NCCL's tests count them.

    Those are 2 (N - 1) / N × size / seconds, what goes through each GPU's link.
    """
    index, gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", index) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    found = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        vector, seconds = torch.zeros(NUMBERS if gpu else NUMBERS // 100, dtype=dtype, device=device), []
        for _ in range(30 if gpu else 3):
            dist.barrier()
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            dist.all_reduce(vector)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        median, size, count = statistics.median(seconds[len(seconds) // 3 :]), vector.nbytes, dist.get_world_size()
        found[name] = dict(bytes=size, seconds=median, bytes_per_s=2 * (count - 1) / count * size / median)
    if not index:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def on_paper(micro_step, sums):
    """Share of the ideal speed of N GPUs, when a ring sums the fp32 gradient after the last micro-step.

    micro_step: its seconds. sums: what all_reduce() found. -> {link: {N: {of each step with 1, 2, 4 … micro-steps per
    GPU: the share}, and how many keep 0.9}}
    """
    found = {}
    for link, speed in (("measured", sums["fp32"]["bytes_per_s"]), ("25 Gbit/s", NETWORK)):
        for count in (2, 8, 64, 512):
            wait = 2 * (count - 1) / count * sums["fp32"]["bytes"] / speed
            shares = {n: n * micro_step / (n * micro_step + wait) for n in (1, 2, 4, 8, 16, 32)}
            found.setdefault(link, {})[count] = dict(shares=shares, keep_90_percent=9 * wait / micro_step, wait=wait)
    return found


def bench(args):
    """All of it, written to OUT/ranks.json part by part."""
    if torch.cuda.device_count() < args.gpus and not args.toy:
        print(f"ranks: this machine has {torch.cuda.device_count()} GPUs, {args.gpus} are compared")
        return
    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if args.toy:
        pipeline, counts, side, precision, rank, steps = TOY, (4, 12), 128, "no", 4, 2
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        os.environ["OMP_NUM_THREADS"] = "1"  # torchrun's choice for several, which rounds otherwise than more threads
    else:
        counts = args.pictures[:1] + args.pictures
        pipeline, side, precision, rank, steps = work / "pipeline", 1024, "fp16", 32, 24
        make_pipeline(pipeline, "cuda")
        torch.cuda.empty_cache()
    for count in set(counts):
        make_pictures(work / str(count), count, side)
    os.sync()  # else the disk would still write them when precompute wants it

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = dict(device=device, gpus=args.gpus, torch=torch.__version__)

    def keep(name, value):
        results[name] = value
        (args.out / "ranks.json").write_text(json.dumps(results, indent=1))

    command(args.gpus, "tests.bench.ranks", work / "sums.json", "--all_reduce")
    keep("all_reduce", json.loads((work / "sums.json").read_text()))
    what = ("--pretrained_model_name_or_path", pipeline, "--resolution", side, "--mixed_precision", precision)
    keep("precompute", precompute(work, what, counts, args.gpus))
    how = ("--rank", rank, "--train_batch_size", 1, "--use_8bit_adam", "--mixed_precision", precision)
    cache = work / f"precompute-1-{len(counts) - 1}" / "cache"
    keep("training", training(work, cache, how, args.gpus, steps, 1 if args.toy else 2))
    keep("on_paper", on_paper(results["training"][1]["s_per_step"] / SLOTS, results["all_reduce"]))
    shutil.rmtree(work)
    print(json.dumps(results, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true", help="the small pipeline, few pictures and steps")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--pictures", type=int, nargs=2, default=[64, 1600], help="few and many")
    parser.add_argument("--all_reduce", action="store_true", help="what this program starts for itself")
    args = parser.parse_args()
    if args.all_reduce:
        all_reduce(args.out)
    else:
        bench(args)


if __name__ == "__main__":
    main()
