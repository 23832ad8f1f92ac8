"""python -m train: flags first, then the seconds it takes to import torch."""

import sys

from data.common import safe
from data.common.flags import parse


def main(argv):
    settings = parse("train", argv)
    with safe.run_folder(settings.output_dir, writes=["state", "metrics.jsonl", "lora.safetensors"]) as run:
        from train.loop import train

        train(settings, run)


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
