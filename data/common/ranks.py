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


def see_own_gpu():
    """Let each of torchrun's processes see a GPU of its own, and no other; of more processes than GPUs some see none.

    Before anything else, because importing some packages asks for the GPUs, and what CUDA saw at its first call it sees
    for ever. A device that is set instead, in one thread, is not set in the next.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count() > 1 and visible not in ("", "-1"):
        each = visible.split(",") if visible else []
        os.environ["CUDA_VISIBLE_DEVICES"] = (each[local_index() :] or [str(local_index() + len(each))])[0]
