"""What becomes of a caption before it is encoded: a trigger word in front, and its tags in several orders."""

import collections
import hashlib
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from data.common.errors import UserError
from data.common.words import shortened

LONGEST = 256  # characters of a prompt
VARIANTS = 8  # of each caption with --shuffle_caption; each takes 310 KiB of the cache at 75 tokens


@dataclass(frozen=True)
class Wording:
    """What the flags ask for: `prompt` in front of every caption, `variants` orders of each behind `keep` tags."""

    prompt: str | None = None
    variants: int = 1
    keep: int = 0
    seed: int = 0

    def texts(self, captions):
        """The texts that are encoded for a picture with these captions: `variants` of the first, of the second, ..."""
        captions = [prefixed(caption, self.prompt) for caption in captions] if self.prompt else captions
        return tuple(text for caption in captions for text in self._variants(caption))

    def mixed_by(self):
        """What the orders of a caption depend on besides the caption, in words; None where there is its own only."""
        return f"seed {self.seed}, {self.keep} kept" if self.variants > 1 else None

    def _variants(self, caption):
        kept = self.keep + (parts_of(caption, self.prompt) if self.prompt else 0)
        return orders(caption, self.variants, kept, self.seed)


def wording(settings):
    """The Wording that the flags of precompute ask for. Raises UserError for a prompt without a word or without end."""
    prompt = settings.instance_prompt and " ".join(settings.instance_prompt.split()).strip(", ")
    if prompt == "":
        raise UserError(f"--instance_prompt {shortened(settings.instance_prompt)}: no word in it; give one or a few")
    if prompt and len(prompt) > LONGEST:
        raise UserError(f"--instance_prompt: {len(prompt)} characters; give a word or a few, of at most {LONGEST}")
    variants = (settings.caption_variants or VARIANTS) if settings.shuffle_caption else 1
    return Wording(prompt, variants, settings.keep_tokens, settings.seed)


def prefixed(caption, prompt):
    """prompt, caption; the caption alone where the prompt's words are in it, the prompt alone where it is empty."""
    words, of_prompt = _words(caption), _words(prompt)
    places = range(len(words) - len(of_prompt) + 1)
    if any(words[i : i + len(of_prompt)] == of_prompt for i in places):
        return caption
    return f"{prompt}, {caption}" if caption.strip() else prompt


def parts_of(caption, prompt):
    """How many of a caption's parts the prompt takes that it begins with; 0 where it begins with something else."""
    of_prompt, words = _words(prompt), _words(caption)
    if words[: len(of_prompt)] != of_prompt:
        return 0
    counts = itertools.accumulate(len(_words(part + ",")) for part in caption.split(","))
    return 1 + sum(count < len(of_prompt) for count in counts)


def _words(text):
    """Words and single signs, without regard to case."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def orders(caption, count, keep, seed):
    """`count` orders of a caption's parts, which commas separate. The first `keep` stay where they are.

    Order 0 is the caption as it is. Order k is a function of (seed, caption, k): all are different as long as there are
    as many; of a caption with fewer they come again, one after the other.
    """
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    front, rest = parts[:keep], parts[keep:]
    found, wanted = {tuple(rest): caption}, min(count, _different(rest, count))
    for number in itertools.count():
        if len(found) == wanted:
            break
        mixed = tuple(rest[i] for i in _permutation(seed, caption, number, len(rest)))
        found.setdefault(mixed, ", ".join([*front, *mixed]))
    return list(itertools.islice(itertools.cycle(found.values()), count))


def _different(parts, enough):
    """In how many orders the parts can stand, equal ones not told apart; counted until there are `enough`."""
    orders, placed = 1, 0
    for times in collections.Counter(parts).values():
        placed += times
        orders *= math.comb(placed, times)
        if orders >= enough:
            break
    return orders


def _permutation(seed, caption, number, length):
    """The indices 0 … length - 1 in the order of random numbers, which are digests, so that they stay what they are."""
    digest = hashlib.shake_256(f"{seed} {number} {caption}".encode()).digest(8 * length)
    return np.argsort(np.frombuffer(digest, ">u8"), kind="stable")
