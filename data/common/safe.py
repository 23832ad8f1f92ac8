"""What every command needs around its work: its errors as one line, its signals, its streams.

Standard library only, as all of data/common, so that a mistyped flag is answered before torch is imported.
"""

import contextlib
import logging
import os
import signal
import sys
from functools import partial

from data.common import ranks, streams, system
from data.common.disk import in_words
from data.common.errors import MachineError, UserError, one_line, out_of_memory

LIBRARIES = ("TRANSFORMERS", "DIFFUSERS", "DATASETS", "HF_HUB")
OUT_OF_MEMORY = {
    "GPU": "training needs less with a smaller --vram_gib, --train_batch_size or --rank, the other commands with "
    "a smaller --resolution of the cache",
    "machine": "end other programs; training needs less with a smaller --train_batch_size or --rank",
}


def run(main, argv):
    """Run a command's `main(argv)` and end the process with the exit code of its outcome."""
    quiet()
    ranks.see_own_gpu()
    system.share_the_cores()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with streams.that_cannot_fail() as stderr:
        if not sys.stderr.isatty():  # the libraries' own bars, such as the hub's of a download
            os.environ.setdefault("TQDM_MININTERVAL", "10")
        before = {signum: signal.signal(signum, partial(_leave, stderr)) for signum in stopping()}
        try:
            system.find_a_place_for_downloads()
            with streams.unheard() if ranks.index() else contextlib.nullcontext():
                main(argv)
        except UserError as error:
            sys.exit(_report(stderr, error, error.code))
        except KeyboardInterrupt:
            sys.exit(_report(stderr, "interrupted; run the same command to go on", 130))
        except (RuntimeError, MemoryError) as error:
            full = out_of_memory(error)
            if not full:
                raise
            reason = str(error).split("\n")[0]
            sys.exit(_report(stderr, f"the {full} is out of memory: {OUT_OF_MEMORY[full]} ({reason})", 3))
        except OSError as error:
            known = in_words(error)
            if not known:
                raise
            sys.exit(_report(stderr, known, known.code))
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def quiet():
    """Let libraries that are not imported yet report errors only.

    What else they report is of what nothing here uses, or is said here in a line.
    """
    for library in LIBRARIES:
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _report(stderr, message, code):
    sys.stdout.flush(), sys.stderr.flush()
    # what is wrong with the command or the numbers is so on every rank, and the first on each host says it
    if code == MachineError.code or not ranks.local_index():
        stderr.say(f"{f'rank {ranks.index()}: ' if ranks.index() else ''}error: {one_line(message)}")
    return code


def stopping():
    """The signals that stop a command. What a terminal sends when it closes is one, unless nohup ignores it."""
    asked = [signum for signum in signal.Signals if signum.name in ("SIGINT", "SIGTERM")]
    hangups = [signum for signum in signal.Signals if signum.name in system.HANGUPS]
    return asked + [signum for signum in hangups if signal.getsignal(signum) is not signal.SIG_IGN]


def _leave(stderr, signum, _frame):
    """End at once, which is right until there is something to save (Signals).

    An exception instead would make C++ code that is being imported call abort().
    """
    if not ranks.local_index():
        stderr.say("error: interrupted; run the same command to go on")
    os._exit(128 + _as_sigterm(signum))


def _as_sigterm(signum):
    return signal.SIGTERM if signal.Signals(signum).name in system.HANGUPS else signum


def end_at_once():
    """From here on a signal ends the process at once again, because what Signals waited to save is saved."""
    for signum in stopping():
        signal.signal(signum, partial(_leave, streams.Output(2)))


class Signals:
    """Ask a loop to stop: `received` is the first signal, SIGINT or SIGTERM; a second one ends the process at once.

    SIGHUP counts as SIGTERM, but never as the second one, because a terminal that closes may send it twice.
    """

    def __init__(self):
        self.received = None
        for signum in stopping():
            signal.signal(signum, self._handle)

    def _handle(self, signum, _frame):
        again, self.received = self.received, self.received or _as_sigterm(signum)
        if signum == _as_sigterm(signum):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not again and not ranks.local_index():
            name = signal.Signals(signum).name
            streams.Output(2).say(f"\n{name}: finishing this step and saving; once more ends at once")
