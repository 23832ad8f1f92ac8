"""Which of the processes that torchrun started for one command this is. One that was started without it is alone.

torchrun's words: a rank is one process, with a GPU of its own; the world is all of them, on one host or several. The
first rank holds the folder, writes and speaks.
"""

import os


def index():
    """0 for the first of all."""
    return int(os.environ.get("RANK", 0))


def count():
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_index():
    """0 for the first on this host; also the GPU that it computes on."""
    return int(os.environ.get("LOCAL_RANK", 0))
