"""How far a command is: a bar in a terminal; elsewhere (a log, a notebook) a line every ten seconds at most."""

import sys
import time

from data.common.words import duration, many

SECONDS = 10  # between two lines; data/common/safe.py tells the libraries' bars the same


def progress(name, unit, total, done=0):
    """-> a context manager, tqdm's bar or Lines, of work whose `total` units are `done` in part."""
    if not sys.stderr.isatty():
        return Lines(name, unit, total, done)
    from tqdm import tqdm  # not sooner: what data/common/safe.py tells tqdm is read at its import

    return tqdm(desc=name, unit=unit, total=total, initial=done)


class Lines:
    """What is used of tqdm's bar, in lines such as "train: 120 of 500 steps, loss 0.123, 0.21 s each, 80 seconds left".

    The time is that since the line before. The end has a line, whenever the last one was.
    """

    def __init__(self, name, unit, total, done):
        self.name, self.unit, self.total, self.n, self.facts = name, unit, total, done, {}
        self.said = time.monotonic(), done

    def set_postfix(self, facts, refresh):
        """facts: {name: text} of the next line. refresh is tqdm's; here no line is printed for it."""
        self.facts = facts

    def update(self, n=1):
        self.n += n
        now, (then, before) = time.monotonic(), self.said
        if self.n < self.total and now - then < SECONDS:
            return
        each = (now - then) / max(1, self.n - before)
        words = [f"{self.name}: {self.n:,} of {many(self.total, self.unit)}"]
        words += [f"{name} {text}" for name, text in self.facts.items()]
        words += [f"{each:.2g} s each"] if each < 100 else [f"{duration(each)} each"]
        words += [f"{duration(each * (self.total - self.n))} left"] if self.n < self.total else []
        print(", ".join(words), file=sys.stderr, flush=True)
        self.said = now, self.n

    def write(self, line):
        """Print what is not about the progress, as tqdm does: to stdout."""
        print(line, flush=True)

    def close(self):
        """Nothing stays open."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
