"""python -m infer: flags first, then the seconds it takes to import torch."""

import sys

from data.common import safe
from data.common.flags import parse


def main(argv):
    settings = parse("infer", argv)
    with safe.run_folder(settings.output_dir, writes=["compare"]) as run:
        from infer.compare import compare

        compare(settings, run)


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
