"""A training step against the reference, under budgets of GPU memory: make bench, or python -m tests.bench.step OUT

SDXL's UNet at full size with random weights, 1024², rank 32, fp16, AdamW8bit. The reference is what every known
trainer amounts to: diffusers and peft, autocast, every block recomputed, kernels started from Python. The reference's
lines run in one process, ours in another, some in their own; "buckets" is ours with batches of all shapes
about 1024² in turn. Attention "efficient" is PyTorch's memory-efficient kernel alone, the one that a T4 has. All else
runs on a T4 as well, and so these lines, the reference's and ours, are a T4's. Without a GPU a small UNet runs, which
shows that the benchmark works and nothing else. Writes OUT/step.json.
"""

import argparse
import collections
import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.buckets import make_buckets
from data.cache import INDEX, Rows, posteriors_name, write_index
from data.common.errors import UserError
from data.common.flags import parse
from data.models.files import Model, load
from tests.bench.full_size import TOY, make_pipeline
from train.batches import Batches
from train.loop import setup

TFLOP = 13.6  # for each sample: the forward, and the backward that frozen weights still need
BUDGETS = (24, 14.56, 11, 8, 6.5, 5, 4.5)  # with what CUDA itself takes; the last three on a base in NF4
APART = ("--deterministic", "--vram_gib=4", "--vram_gib=5", "nf4")
SLOTS, STEPS = 4, 8


def apart(function, *args):
    """function(*args) in a process of its own, so that nothing is left in the GPU's memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def make_cache(folder, pipeline, buckets):
    """Write a finished cache of random numbers for the model's UNet: eight rows for each bucket."""
    config, rng, rows = json.loads((Path(pipeline) / "unet/config.json").read_text()), np.random.default_rng(0), 8
    text = (77, config["cross_attention_dim"])
    pooled = (config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],)
    shapes = [(2, 4, height // 8, width // 8) for height, width in buckets]
    folder.mkdir(parents=True)
    for name, shape in [("captions", (text[0] * text[1] + pooled[0],)), *zip(map(posteriors_name, buckets), shapes)]:
        numbers = np.abs(rng.standard_normal((rows, *shape))).astype(np.float16)
        Rows(folder, name, shape).write(rows, [([f"{name} {i}".encode() for i in range(rows)], numbers)])
    index = np.zeros((len(buckets), rows), INDEX)
    index["bucket"] = np.arange(len(buckets))[:, None]
    index["picture"] = index["mirrored"] = index["first_caption"] = range(rows)
    index["captions"] = index["repeats"] = 1
    index["time_ids"] = index["mirrored_time_ids"] = np.array([[(*bucket, 0, 0, *bucket)] for bucket in buckets])
    facts = dict(model=dict(name=str(pipeline), variant="fp16"), content="random", resolution=max(map(max, buckets)))
    facts |= dict(buckets=buckets, posterior_shapes=shapes, text_shape=text, pooled_shape=pooled)
    facts |= dict(scaling_factor=0.13, unconditional=0, vae=facts["model"], components={}, decoder="none", skipped=[])
    facts |= dict(
        identity=dict(text_encoders="random", vae="random"), rows=index.size, held_out=0, validation_prompts={}
    )
    write_index(folder, index.ravel(), np.arange(rows, dtype="<i4"), [str(i) for i in range(index.size)], facts)


def ours(work, cuda, batch, *flags):
    """-> functions for one step and one micro-step of the real trainer, and facts about it"""
    precision, rank = ("fp16", 32) if cuda else ("no", 4)
    flags = ["--output_dir", work, "--train_batch_size", batch, "--use_8bit_adam", "--rank", rank, *flags]
    flags += ["--mixed_precision", precision, "--gradient_accumulation_steps", SLOTS]
    settings = parse("train", [str(word) for word in flags])
    run, losses = setup(settings, work), []
    micro_batches = run.batches.ahead(0)

    def step():
        run.adapters.vector.grad.zero_()
        loss = sum(run.micro_step(next(micro_batches)) / SLOTS for _ in range(SLOTS))
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_([run.adapters.vector], settings.max_grad_norm)
        losses.append(torch.stack([loss, norm]).tolist()[0])
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.adapters.refresh()

    batch = run.batches.draw(0, 0)
    recomputed = run.memory_plan["recomputed"]
    facts = dict(recomputed="all" if recomputed is None else len(recomputed), base=run.settings.base_precision)
    return step, lambda: run.micro_step(batch), facts | dict(losses=losses)


def reference(work, cuda, batch):
    """-> the same functions of diffusers with peft, autocast, every block recomputed, AdamW8bit; no facts"""
    import bitsandbytes
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    from data.cache import Cache
    from train.diffusion import add_noise, noise_schedule

    cache, device = Cache(work / "cache"), torch.device("cuda" if cuda else "cpu")
    model, half = Model(**cache.manifest["model"]), torch.float16 if cuda else torch.float32
    settings = parse("train", ["--output_dir", "unused", "--train_batch_size", str(batch)])
    alpha_bar = noise_schedule(model.component("scheduler").config())
    batches = Batches(cache, settings, len(alpha_bar))
    unet = load(UNet2DConditionModel, model.component("unet"), half, device)
    rank = 32 if cuda else 4
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    unet.train().enable_gradient_checkpointing()
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
    scaler, count = torch.amp.GradScaler(device.type, enabled=cuda), iter(range(10**9))

    def micro_step(batch):
        b = {name: part.to(device) for name, part in batch.items()}
        xt = add_noise(b["x0"], b["eps"], b["t"], alpha_bar.to(device))
        with torch.autocast(device.type, torch.float16, enabled=cuda):
            condition = dict(text_embeds=b["pooled"].to(half), time_ids=b["time_ids"])
            prediction = unet(xt, b["t"], b["text"].to(half), added_cond_kwargs=condition).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), b["eps"])
        scaler.scale(loss / 4).backward()
        return loss.detach()

    def step():
        for slot in range(4):
            loss = micro_step(batches.draw(next(count), slot))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        loss.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    batch = batches.draw(0, 0)
    return step, lambda: micro_step(batch), {}


def kernels(micro_step):
    """-> milliseconds of one micro-step in which a GPU kernel runs, and the 30 that run longest: (ms, calls, name)"""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            micro_step()
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    took, calls, busy, until = collections.Counter(), collections.Counter(), 0, 0
    for event in sorted(events, key=lambda event: event.time_range.start):
        took[event.name] += event.device_time / 3000
        calls[event.name] += 1 / 3
        busy += max(0, event.time_range.end - max(until, event.time_range.start)) / 3000  # two may run at once
        until = max(until, event.time_range.end)
    return busy, [(round(ms, 3), round(calls[name]), name[:100]) for name, ms in took.most_common(30)]


def measure(work, kind, batch, attention, flags):
    """Measure one line of the table. -> its figures, or the reason why it was refused"""
    cuda, began = torch.cuda.is_available(), time.perf_counter()
    efficient = contextlib.nullcontext()
    if attention == "efficient" and cuda:
        efficient = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    with efficient, contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            if kind == "reference":
                step, micro_step, facts = reference(work, cuda, batch)
            else:
                step, micro_step, facts = ours(work / "buckets" if kind == "buckets" else work, cuda, batch, *flags)
        except UserError as error:
            return dict(refused=str(error))
        times = []
        for _ in range(2 + ((2 if kind == "reference" else STEPS) if cuda else 1)):
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1000 / SLOTS)
            facts.setdefault("seconds_to_first_step", time.perf_counter() - began)
        facts["wall_ms"] = statistics.median(times[2:])
        if cuda:
            facts["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
            facts["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            free, total = torch.cuda.mem_get_info()
            # What is not the allocator's: CUDA itself, its libraries, captured graphs.
            facts["outside_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
            facts["kernel_ms"], facts["kernels"] = kernels(micro_step)
    return facts | dict(plan=printed.getvalue().strip())


def measure_all(work, out, results, lines):
    """Measure `lines` in turn. Memory is given back after each, and `out` is written again."""
    for kind, batch, attention, *flags in lines:
        facts = measure(work, kind, int(batch), attention, flags)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            facts["left_gib"] = torch.cuda.memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        results["lines"].append(dict(kind=kind, batch=int(batch), attention=attention, flags=" ".join(flags)) | facts)
        print({name: fact for name, fact in results["lines"][-1].items() if name != "kernels"}, flush=True)
        out.write_text(json.dumps(results, indent=1))
    return results


def matmul_tflops():
    """TFLOP/s that a plain fp16 matrix product reaches here."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * 8192**3 / statistics.median(times) / 1e12


def machine(work):
    """Make the models and caches that are measured. -> facts about the machine"""
    if not torch.cuda.is_available():
        make_cache(work / "cache", TOY, [(128, 128)])
        make_cache(work / "buckets" / "cache", TOY, make_buckets(128, True))
        return dict(device="cpu", torch=torch.__version__, matmul_tflops=None)
    make_pipeline(work / "pipeline", "cuda", ("unet",))
    make_cache(work / "cache", work / "pipeline", [(1024, 1024)])
    make_cache(work / "buckets" / "cache", work / "pipeline", make_buckets(1024, True))
    return dict(device=torch.cuda.get_device_name(), torch=torch.__version__, matmul_tflops=matmul_tflops())


def gradient_cosines(work):
    """Cosines of one micro-batch's gradients with each other: in fp32, in fp16, and in fp16 with the base in NF4.

    B is not zero, so that A has a gradient too.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gradients = {}
    for name, precision, base in (("fp32", "no", "plain"), ("fp16", "fp16", "plain"), ("nf4", "fp16", "nf4")):
        flags = ["--output_dir", str(work), "--mixed_precision", precision, "--base_precision", base]
        flags += ["--gradient_checkpointing"]
        settings = parse("train", flags)
        run = setup(settings, work)
        for _, B in run.adapters.projections().values():
            B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        run.adapters.refresh()
        run.adapters.vector.grad.zero_()
        run.micro_step(run.batches.draw(0, 0))
        gradients[name] = run.adapters.vector.grad.cpu().double()
        del run
    pairs = itertools.combinations(gradients.items(), 2)
    return {f"{a} {b}": torch.nn.functional.cosine_similarity(x, y, dim=0).item() for (a, x), (b, y) in pairs}


def process(line):
    """What names the process of a line: those of one kind share one, and small budgets have their own, because of what
    earlier lines leave behind."""
    return line if any(word in line for word in APART) else line.split("@")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    example = "kind@batch@attention@flags, e.g. ours@1@default@--vram_gib=24; default: all"
    parser.add_argument("--lines", nargs="+", help=example)
    parser.add_argument(
        "--cosine", action="store_true", help="of the gradient in several precisions, next to --lines; without, always"
    )
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    results = apart(machine, work) | dict(lines=[])
    if results["device"] == "cpu":
        print("no GPU: a small UNet on the CPU, which shows that the benchmark runs and nothing else")
        lines = ["reference@1@default", "ours@1@default", "buckets@1@default"]
    else:
        lines = [f"{line}@default" for line in ("reference@1", "reference@4")] + ["reference@1@efficient"]
        lines += [f"ours@{batch}@default@--vram_gib={budget}" for batch in (1, 4) for budget in BUDGETS]
        lines += ["ours@1@efficient@--vram_gib=14.56"]
        lines += [
            f"ours@1@default@--vram_gib=24@{flag}" for flag in ("--no_cuda_graph", "--no_cuda_graph", "--deterministic")
        ]
        lines += [
            "ours@1@default@--vram_gib=4@--rank=16",
            "ours@1@default@--base_precision=nf4@--gradient_checkpointing",
        ]
        lines += ["buckets@1@default@--vram_gib=14.56"]
    for _, together in itertools.groupby(args.lines or lines, process):
        results = apart(measure_all, work, args.out / "step.json", results, [line.split("@") for line in together])
    if results["device"] != "cpu" and (args.cosine or not args.lines):
        results["gradient_cosines"] = apart(gradient_cosines, work)
        print("cosines of the gradient in several precisions:", results["gradient_cosines"])
        (args.out / "step.json").write_text(json.dumps(results, indent=1))
    print_table(results)
    shutil.rmtree(work)


def print_table(results):
    """Print a table in Markdown. × is how many times less than the reference with the same batch and attention."""
    base = {(line["batch"], line["attention"]): line for line in results["lines"] if line["kind"] == "reference"}
    columns = "| arrangement | batch | attention | wall ms | × | kernel ms | × | peak GiB | TFLOP/s | of a matmul |"
    print(f"\n{columns}\n" + "|---" * (columns.count("|") - 1) + "|")
    for line in results["lines"]:
        name = " ".join(filter(None, [line["kind"], line["flags"]]))
        if "refused" in line:
            print(f"| {name} | {line['batch']} | {line['attention']} | {line['refused']} |")
            continue
        if line.get("recomputed"):
            name += f", {line['recomputed']} blocks recomputed"
        cells, against = [name, line["batch"], line["attention"]], base.get((line["batch"], line["attention"]), {})
        for what in ("wall_ms", "kernel_ms"):
            cells.append(f"{line[what]:.1f}" if what in line else "")
            cells.append(f"{against[what] / line[what]:.2f}" if what in against else "")
        rate = TFLOP * line["batch"] / line["wall_ms"] * 1000
        cells.append(f"{line['peak_gib']:.2f}" if "peak_gib" in line else "")
        cells.append(f"{rate:.0f}" if results["matmul_tflops"] else "")
        cells.append(f"{rate / results['matmul_tflops']:.0%}" if results["matmul_tflops"] else "")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
