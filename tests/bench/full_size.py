"""The whole line at SDXL's full size with random weights, under the memory of a T4: python -m tests.bench.full_size OUT

Makes a pipeline of SDXL's exact shapes (UNet of 2,567,463,684 parameters, both CLIPs, VAE; fp16) and 16 pictures in
OUT/work. Then it runs the real commands on them, each under a cap on GPU memory, and writes OUT/full_size.json: seconds
per step and per picture, and for each stage the peak GiB of GPU memory (reserved) and of RAM (resident, which includes
pages of mapped files). How fast precompute and the training step are is measured by precompute.py and step.py.
`--toy` does the same with the small pipeline, for a machine without a GPU; `--single` with the model in one file.
`--pictures` trains instead, without and with pictures while training, with room to spare and in a budget that is full:
OUT/pictures.json says what drawing takes, next to what the plan counted on.
`--small` runs precompute and compare as cards of several sizes would: OUT/small.json.
"""

import argparse
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.single_file import configs, single_file

T4_GIB = 14.56  # what a 16 GB T4 has for a program
CARDS = (T4_GIB, 8, 6, 4)  # GiB
BESIDE = 0.9  # GiB of a card that CUDA takes beside torch's allocator
TOY = Path(__file__).parents[2] / "data/toy/pipeline"

UNET = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=1024,
    scaling_factor=0.13025,
    force_upcast=False,  # as the fp16-fix VAE has it
)
CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)

# Runs a command under the cap and leaves its peaks behind. argv: cap in GiB, file for the peaks, module, its flags.
CAPPED = r"""
import atexit, json, os, pathlib, re, runpy, sys
cap, out, module = float(sys.argv[1]), sys.argv[2], sys.argv[3]
if module in ("train", "infer"):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # as they do, too late here
import torch
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)

def leave():
    # of this program alone; getrusage's peak is that of the process that started it, where that was larger
    status = pathlib.Path("/proc/self/status").read_text()
    peaks = dict(resident_gib=int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20)
    if torch.cuda.is_available():
        peaks["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        peaks["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        free, total = torch.cuda.mem_get_info()
        peaks["beside_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    pathlib.Path(out).write_text(json.dumps(peaks))

atexit.register(leave)
sys.argv = sys.argv[3:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def make_pipeline(folder, device, only=("unet", "vae", "text_encoder", "text_encoder_2")):
    """Write a full-size SDXL with random fp16 weights, in diffusers' layout with fp16 variant names.

    Its tokenizers are the toy's. Components that are not in `only` have their config alone.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((TOY / "text_encoder/config.json").read_text())
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    clip = partial(CLIPTextConfig, vocab_size=49408, max_position_embeddings=77, **ids)
    components = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(clip(**CLIP_L)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(clip(**CLIP_G)),
    }
    for name, make in components.items():
        if name not in only:
            with torch.device("meta"):
                (folder / name / "config.json").write_text(json.dumps(_config(make())))
            continue
        with torch.device(device):
            model = make().half()
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count:,} parameters")
        assert name != "unet" or count == 2_567_463_684
        model.save_pretrained(folder / name, variant="fp16")


def _config(model):
    return dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()


def make_pictures(folder, count, side):
    """Write `count` smooth random pictures with captions.

    They are copies of eight; the index behind each file's end makes them differ.
    """
    folder.mkdir(parents=True)
    rng, files = np.random.default_rng(0), []
    for _ in range(min(8, count)):
        small, file = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)), io.BytesIO()
        small.resize((side * 5 // 4, side), Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i in range(count):
            (folder / f"{i}.jpg").write_bytes(files[i % 8] + i.to_bytes(4, "big"))
            text = f"a picture of kind {i} with a red house in the forest"
            metadata.write(json.dumps({"file_name": f"{i}.jpg", "text": text}) + "\n")


def command(work, module, *flags, cap=T4_GIB):
    """Run python -m module under the cap, GiB. -> (what it printed, {seconds_with_imports, peaks})"""
    peaks, others = work / "peaks.json", held()
    began = time.perf_counter()
    argv = [sys.executable, "-c", CAPPED, cap, peaks, module, *flags]
    printed = subprocess.run(list(map(str, argv)), check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed)
    facts = dict(seconds_with_imports=time.perf_counter() - began) | json.loads(peaks.read_text())
    if torch.cuda.is_available():
        facts["beside_gib"] -= others
    return printed, facts


def held():
    """GiB of the GPU's memory that programs hold now, this one among them."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()  # what making the models left
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def while_training(work, precompute, precision):
    """-> [facts of a training], without and with pictures, at batch 1 and at one that fills the budget.

    precompute: its flags.
    """
    found = []
    for prompts in ((), ("--validation_prompt", "a red house in the forest", "an old man at the sea")):
        command(work, "data.precompute", "--output_dir", work / "run", *precompute, *prompts)
        for batch in (1, 4):
            run = work / f"batch-{batch}{'-pictures' * bool(prompts)}"
            how = ("--output_dir", run, "--cache_dir", work / "run" / "cache", "--mixed_precision", precision)
            how += ("--train_batch_size", batch, "--gradient_accumulation_steps", 1, "--use_8bit_adam")
            how += ("--vram_gib", T4_GIB, "--max_train_steps", 8, "--checkpointing_steps", 2)
            printed, facts = command(work, "train", *how)
            seconds = [json.loads(line)["s_per_step"] for line in open(run / "metrics.jsonl")]
            pictures = len(list(run.glob("samples/*.png")))
            said = [line for line in printed.splitlines() if line.startswith(("memory: ", "warning: "))]
            facts |= dict(batch=batch, pictures=pictures, said=said, seconds_of_steps=seconds)
            found.append(facts)
    return found


def on_small_cards(work, precompute, precision):
    """{what and on which card: facts} of precompute on the smallest and of compare on each. precompute: its flags.

    Of each compare also how many pixels differ from those of the card before.
    """
    run, found, before = work / "run", {}, {}
    _, facts = command(work, "data.precompute", "--output_dir", run, *precompute, cap=CARDS[-1] - BESIDE)
    found[f"precompute, {CARDS[-1]} GiB"] = facts
    how = ("--max_train_steps", 1, "--rank", 32, "--use_8bit_adam", "--mixed_precision", precision)
    command(work, "train", "--output_dir", run, *how)
    for gib in CARDS:
        prompt = ("--prompt", "a red house in the forest")
        printed, facts = command(work, "infer", "--output_dir", run, *prompt, "--vram_gib", gib, cap=gib - BESIDE)
        report = json.loads((run / "compare" / "report.json").read_text())
        pixels = {path.name: np.asarray(Image.open(path)) for path in (run / "compare").glob("*_0.png")}
        differs = {name: int((pixels[name] != before[name]).sum()) for name in before}
        facts |= dict(said=[line for line in printed.splitlines() if line.startswith("memory: ")])
        facts |= dict(s_per_picture=report["median_s_per_picture"], other_pixels_than_before=differs)
        found[f"compare, {gib} GiB"], before = facts, pixels
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true", help="the small pipeline, few steps")
    parser.add_argument("--single", action="store_true", help="the model in one .safetensors file")
    parser.add_argument("--pictures", action="store_true", help="pictures while training, and nothing else")
    parser.add_argument("--small", action="store_true", help="precompute and compare on small cards, and nothing else")
    parser.add_argument("--work", type=Path, help="where pipeline and runs go; default OUT/work")
    args = parser.parse_args()
    work = args.work or args.out / "work"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline, resolution, steps, precision = (TOY, 128, 3, "no") if args.toy else (work / "pipeline", 1024, 20, "fp16")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results = dict(device=name, torch=torch.__version__, cap_gib=T4_GIB)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not args.toy:
        make_pipeline(pipeline, device)
    make_pictures(work / "pictures", 16, resolution * 5 // 4)
    what = ("--pretrained_model_name_or_path", pipeline, "--train_data_dir", work / "pictures")
    if args.single:
        configs(pipeline, work / "configs")
        what += ("--pretrained_model_name_or_path", single_file(pipeline, work / "model.safetensors"))
        what += ("--model_config", work / "configs")
    results["seconds_to_make"] = time.perf_counter() - began

    run, common = work / "run", ("--output_dir", work / "run")
    how = ("--resolution", resolution, "--mixed_precision", precision)
    if args.pictures:
        results["trainings"] = while_training(work, (*what, *how), precision)
        (args.out / "pictures.json").write_text(json.dumps(results, indent=1))
        print(json.dumps(results, indent=1))
        return
    if args.small:
        results["small"] = on_small_cards(work, (*what, *how), precision)
        (args.out / "small.json").write_text(json.dumps(results, indent=1))
        print(json.dumps(results, indent=1))
        return
    printed, facts = command(work, "data.precompute", *common, *what, *how)
    results["precompute"] = facts | dict(seconds_of_pictures=float(re.search(r"pictures in ([\d.]+) s", printed)[1]))
    how = ("--max_train_steps", steps, "--rank", 32, "--use_8bit_adam", "--mixed_precision", precision)
    _, facts = command(work, "train", *common, *how)
    lines = [json.loads(line) for line in open(run / "metrics.jsonl")]
    per_step = statistics.median(line["s_per_step"] for line in lines[len(lines) // 2 :])
    results["train"] = facts | dict(s_per_step=per_step, micro_batches_per_step=4, loss=lines[-1]["loss"])
    drawn = ("--num_inference_steps", 2) if args.toy else ()
    _, facts = command(work, "infer", *common, "--prompt", "a red house in the forest", *drawn)
    report = json.loads((run / "compare" / "report.json").read_text())
    results["compare"] = facts | dict(s_per_picture=report["median_s_per_picture"])
    (args.out / "full_size.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
