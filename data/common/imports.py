"""Imports that take no more than what is asked for."""

import contextlib
import functools
import sys

# What diffusers and transformers import wherever it is installed, and what no model here computes with. On a weak host
# these are half of the seconds before anything begins.
UNUSED = ("accelerate", "bitsandbytes", "flash_attn", "gguf", "peft", "sageattention", "scipy", "sentencepiece")
UNUSED += ("sklearn", "soundfile", "soxr", "torch_xla", "torchao", "torchaudio", "torchvision", "xformers")
# What bitsandbytes compiles as it is imported, for a CPU: seconds. Without these it takes the functions as they are.
COMPILER = ("torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx")


def lean(*more):
    """A context in which diffusers and transformers are imported without the packages UNUSED and `more`.

    Where one of the two was imported before any of this, it has seen them and is left as it is.
    """
    return without(*UNUSED, *more) if _in_time() else contextlib.nullcontext()


@functools.cache
def _in_time():
    return not {"diffusers", "transformers"} & sys.modules.keys()


@contextlib.contextmanager
def without(*packages):
    """In here the packages look as if they were not installed, except those that are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # where None stands, an import fails and find_spec finds nothing
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
