"""What 100,000 rows cost over 1,000: resident memory of precompute and of training, opening the cache, a batch.

    python -m tests.bench.many_rows OUT

The rows are real files (small PNGs, captions of their own) and go through the real precompute. Only the two encoders
are replaced by random numbers of the toy's shapes, because their time on a CPU is not the question. Writes
OUT/many_rows.json.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

TOY = Path(__file__).parents[2] / "data/toy/pipeline"


def resident():
    """The most memory that this process held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def make(folder, count):
    """Write `count` small PNGs, all different, and their captions."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i in range(count):
            image = Image.new("RGB", (64, 64), (i % 256, i // 256 % 256, i // 65536))
            image.save(folder / f"{i}.png", compress_level=1)
            metadata.write(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i}"}) + "\n")


def precompute(folder, run):
    """Run the real precompute with encoders that draw random numbers. Prints MB and seconds as JSON."""
    import torch

    from data import encoders
    from data import precompute as command
    from data.common.flags import parse
    from data.parallel import Alone

    class Texts(encoders.TextEncoders):
        def load(self, device):
            return self

        def unload(self):
            pass

        def _states(self, captions):
            return torch.randn(len(captions), *self.text_shape), torch.randn(len(captions), *self.pooled_shape)

        def truncated(self, caption):
            return False

    class Pictures(encoders.VAE):
        def load(self, device):
            return self

        def stage(self, pixels):
            return torch.from_numpy(pixels)

        def encode(self, batches):
            for tag, pixels in batches:
                yield tag, torch.rand(len(pixels), *self.posterior_shape(pixels.shape[1:3])).half()

    encoders.TextEncoders, encoders.VAE = Texts, Pictures
    flags = ["--output_dir", run, "--train_data_dir", folder, "--pretrained_model_name_or_path", str(TOY)]
    settings = parse("data.precompute", [*flags, "--resolution", "64", "--mixed_precision", "no"])
    cache = Path(run) / "cache"
    cache.mkdir()
    before, began = resident(), time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        command.precompute(settings, cache, Alone(), pool)
    print(json.dumps(dict(mb=resident(), mb_before=before, seconds=time.perf_counter() - began)))


def read(run):
    """Open the cache as training does and draw batches. Prints MB, seconds and milliseconds as JSON."""
    from data.cache import Cache
    from data.common.flags import parse
    from train.batches import Batches

    before, began = resident(), time.perf_counter()
    cache = Cache(Path(run) / "cache")
    opened = time.perf_counter() - began
    settings = parse("train", ["--output_dir", run, "--train_batch_size", "8"])
    times, batches = [], Batches(cache, settings, 1000)
    for step in range(200):
        began = time.perf_counter()
        batches.draw(step, 0)
        times.append(time.perf_counter() - began)
    print(json.dumps(dict(mb=resident(), mb_before=before, open_s=opened, batch_ms=1000 * float(np.median(times[1:])))))


def apart(what, *given):
    """Call precompute or read in a process of its own, which has held no memory before. -> the JSON that it prints"""
    code = f"from tests.bench import many_rows; many_rows.{what}({', '.join(map(repr, map(str, given)))})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs=2, default=(1000, 100_000))
    args = parser.parse_args()
    results = {}
    for count in args.rows:
        folder, run = args.out / f"pictures{count}", args.out / f"run{count}"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        if not folder.exists():
            make(folder, count)
        results[count] = dict(precompute=apart("precompute", folder, run), read=apart("read", run))
        print(count, results[count], flush=True)
    (args.out / "many_rows.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
