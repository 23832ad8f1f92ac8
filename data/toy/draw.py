"""python -m data.toy.draw FOLDER: draw the fine-tuning set, 64 ink pictures and their captions.

The folder is what `datasets` reads as an image folder: 000.png … and a metadata.jsonl with `file_name` and `text`.
The metadata is written last, so a folder that has it is complete, and drawing it again does nothing.
"""

import argparse
import json
import os
import sys
from itertools import count
from pathlib import Path

from data.common import safe

from .world import PROMPTS, caption, parse, random_scene, render

COUNT = 64
FIRST_SEED = 5_000_000  # far from the seeds that the base model was trained on


def training_scenes():
    """-> [(scene, seed)] × COUNT: random scenes, all different, none of them one of PROMPTS."""
    taken = {parse(prompt) for prompt in PROMPTS}
    chosen, seeds = [], count(FIRST_SEED)
    while len(chosen) < COUNT:
        seed = next(seeds)
        scene = random_scene(seed)
        if scene not in taken:
            taken.add(scene)
            chosen.append((scene, seed))
    return chosen


def draw_set(folder):
    """Draw the set into `folder` unless it is there. -> whether anything was drawn."""
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (scene, seed) in enumerate(training_scenes()):
        name = f"{index:03d}.png"
        render(scene, "ink", seed).save(folder / name)
        rows.append({"file_name": name, "text": caption(scene)})
    unfinished = folder / "metadata.jsonl.tmp"
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(unfinished, metadata)
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.toy.draw", description="draw the toy's fine-tuning set")
    parser.add_argument("folder", help="where the pictures and metadata.jsonl go")
    folder = parser.parse_args(argv).folder
    drawn = draw_set(folder)
    print(f"{COUNT} ink pictures {'drawn' if drawn else 'are there already'}: {folder}")


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
