"""Imports that take no more than what is asked for."""

import contextlib
import sys

# What diffusers and transformers import wherever it is installed, and what no model here computes with. On a weak host
# these are half of the seconds before anything begins.
UNUSED = ("accelerate", "bitsandbytes", "peft", "scipy", "sklearn")


def lean(*more):
    """A context in which diffusers and transformers are imported without the packages UNUSED and `more`.

    Where one of the two was imported before, it has seen them and is left as it is.
    """
    seen = {"diffusers", "transformers"} & sys.modules.keys()
    return contextlib.nullcontext() if seen else without(*UNUSED, *more)


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
