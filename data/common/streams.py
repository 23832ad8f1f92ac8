"""What a command prints, to readers who may be gone: no step of a training is lost for a line that nobody reads."""

import contextlib
import io
import os
import select
import sys
import warnings

from data.common import system
from data.common.errors import one_line

PATIENCE = 10  # seconds that a reader may take nothing, as a pager does, before lines are dropped until he reads again


class Output(io.FileIO):
    """stdout or stderr, whose write never fails: what the other end does not take is dropped.

    That is for a reader who left or who stopped reading, a log on a full disk, a terminal that was closed. Nothing but
    these two streams goes through here, so that no error of a file is lost.
    """

    def __init__(self, descriptor):
        super().__init__(descriptor, "w", closefd=False)
        self.patience, self.within_a_line = PATIENCE, False

    def write(self, data):
        self.within_a_line = bytes(data[-1:]) != b"\n"
        with contextlib.suppress(OSError):
            if os.name != "posix":  # select() is for sockets alone there
                return super().write(data)
            _, ready, _ = select.select([], [self], [], self.patience)
            self.patience = PATIENCE if ready else 0
            if ready:  # for this many bytes at least, so that the write does not wait; the rest is asked for again
                return super().write(data[: select.PIPE_BUF]) or len(data)
        return len(data)

    def say(self, line):
        """Print a line that begins on one of its own, not behind a progress bar.

        In a signal's handler a print() would raise if it interrupted another one.
        """
        self.write(f"{chr(10) if self.within_a_line else ''}{line}\n".encode())


@contextlib.contextmanager
def that_cannot_fail():
    """In here stdout and stderr are Outputs, and a library's warning is one line that is said once. -> stderr's Output

    A descriptor that was closed at the start leads to /dev/null from here on. Otherwise the next file that is opened
    would get its number, and all that is printed with it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
    before, outputs = (sys.stdout, sys.stderr), (Output(1), Output(2))
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(output),
            encoding=system.encoding(stream, output.fileno()),
            errors="backslashreplace",
            line_buffering=True,
        )
        for output, stream in zip(outputs, before)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once")  # not "error", whatever the environment says: a warning ends no training
            for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)  # they are for the libraries' own developers
            warnings.showwarning = _show
            yield outputs[1]
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def unheard():
    """In here nothing that is printed is seen: it is what the first rank prints as well."""
    with open(os.devnull, "w") as nobody, contextlib.redirect_stdout(nobody), contextlib.redirect_stderr(nobody):
        yield


def _show(message, category, filename, lineno, file=None, line=None):
    print(f"warning: {one_line(message)}")
