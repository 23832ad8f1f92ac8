"""python -m infer: what can be refused without torch first, then the seconds that importing it takes."""

import shlex
import sys

from data.common import door, safe
from data.common.flags import parse
from data.common.imports import lean
from infer.loras import find


def main(argv):
    settings = parse("infer", argv)
    run = door.can_be_written(settings.output_dir, "--output_dir")
    loras = find(settings.lora_path or [run / "lora.safetensors"])
    door.look_at(run / "metrics.jsonl", "file")  # now, because the page tells of it after hours of drawing
    if not settings.base_model:
        from data.cache import cache_folder, read_manifest

        read_manifest(cache_folder(run))
    with door.hold(run / "compare", "--output_dir", ("grid.png", "report.json", "report.html")):
        with lean():
            from infer.compare import compare

        compare(settings, run, loras, shlex.join(["python", "-m", "infer", *argv]))


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
