"""How fast precompute is, against one picture at a time and against the VAE alone: python -m tests.bench.precompute OUT

On a GPU it runs at SDXL's size with random weights, else with the toy's small pipeline (`--toy`). Writes
OUT/precompute.json.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data.encoders import VAE, TextEncoders
from data.loaded import fastest_convolutions
from data.models.files import Model, load, torch_dtype
from data.precompute import main as precompute
from tests.bench.full_size import TOY, make_pictures, make_pipeline


def seconds(work, least, device):
    """Median seconds of work() in the second half of `least` seconds, because a busy GPU soon slows down."""
    work()
    times, ends = [], time.perf_counter() + least
    while time.perf_counter() < ends or len(times) < 3:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times[len(times) // 2 :]))


def one_at_a_time(model, precision, pictures, resolution, device):
    """Images/s of the plain way: decode and resize a picture, run diffusers' VAE and both text encoders, wait."""
    vae, texts = plain_vae(model, precision, device), TextEncoders(model, precision).load(device)

    def encode(data):
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
        with torch.inference_mode():
            x = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
            vae.encode(x.to(vae.dtype)).latent_dist.sample().cpu()
        [part.cpu() for part in texts(["a picture with a red house in the forest"])]

    for data in pictures[:2]:
        encode(data)
    began = time.perf_counter()
    for data in pictures[2:]:
        encode(data)
    return (len(pictures) - 2) / (time.perf_counter() - began)


def plain_vae(model, precision, device):
    """diffusers' own VAE."""
    return load(AutoencoderKL, model.component("vae"), torch_dtype(VAE(model, precision).precision), device)


def vae_alone(model, precision, resolution, device, least):
    """{arrangement: images/s} of the VAE encoder on pixels that are on the device already."""
    rates = {}
    for name in ("ours", "diffusers"):
        if name == "ours":
            ours = VAE(model, precision).load(device)
            vae, layout, convolutions = ours.vae, ours.layout, fastest_convolutions
        else:
            vae, layout = plain_vae(model, precision, device), torch.contiguous_format
            convolutions = contextlib.nullcontext
        for batch in (1, 2, 4, 8):
            x = torch.rand(batch, 3, resolution, resolution, device=device) * 2 - 1
            x = x.to(vae.dtype, memory_format=layout)
            with torch.inference_mode(), convolutions():
                took = seconds(lambda: vae.encode(x).latent_dist.mean, least, device)
            rates[f"{name}, batch {batch}"] = batch / took
            print(f"{name}, batch {batch}: {batch / took:.1f} images/s", flush=True)
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--work", type=Path, help="where pipeline and runs go; default OUT/work")
    args = parser.parse_args()
    work, device = args.work or args.out / "work", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    args.toy |= device.type == "cpu"
    if args.toy:
        name, resolution, precision, counts = TOY, 128, "no", (8, 16)
    else:
        name, resolution, precision, counts = work / "pipeline", 1024, "fp16", (64, 1088)
        make_pipeline(name, device)
    model = Model(str(name), None, None if args.toy else "fp16")
    for count in counts:
        make_pictures(work / str(count), count, resolution * 5 // 4)
    os.sync()  # else the disk would still write them when precompute wants it
    results = dict(device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch=torch.__version__)

    pictures = [path.read_bytes() for path in sorted((work / str(counts[0])).glob("*.jpg"))][:14]
    results["one_at_a_time"] = one_at_a_time(model, precision, pictures, resolution, device)
    results["vae_alone"] = vae_alone(model, precision, resolution, device, 0 if args.toy else 3)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Few pictures and many, whose difference leaves out what loading costs. The few come twice: once to warm up.
    took = {}
    for run, count in enumerate((counts[0], *counts)):
        flags = ["--output_dir", work / f"run{run}", "--train_data_dir", work / str(count), "--resolution", resolution]
        flags += ["--pretrained_model_name_or_path", name, "--mixed_precision", precision]
        began = time.perf_counter()
        precompute([str(word) for word in flags])
        took[count] = time.perf_counter() - began
    results["precompute"] = (counts[1] - counts[0]) / (took[counts[1]] - took[counts[0]])
    results["precompute_seconds"] = took
    if device.type == "cuda":
        results["precompute_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    results["times_one_at_a_time"] = results["precompute"] / results["one_at_a_time"]
    results["share_of_vae_alone"] = results["precompute"] / max(results["vae_alone"].values())
    (args.out / "precompute.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
