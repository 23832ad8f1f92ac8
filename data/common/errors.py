"""What a command ends with: errors that a user can act on, each with its exit code, and the words they are said in."""

import re


class UserError(Exception):
    """Bad input or usage: one line that names the file, row or flag and what to do. Exit code 2."""

    code = 2


class MachineError(UserError):
    """The machine is too small, too full or failing (disk, GPU, memory). Exit code 3."""

    code = 3


class NumbersError(UserError):
    """Something that must be finite is not. Exit code 4."""

    code = 4


class Stopped(UserError):
    """Stopped by a signal after everything was saved. Exit code 128 + signal."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.code = 128 + signum


def out_of_memory(error):
    """Whose memory ran out in this error: "GPU", "machine", or None when it is another error.

    It is told by torch's words, because torch is not imported here.
    """
    words = (": out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words):
        return "GPU"
    words = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")
    return "machine" if isinstance(error, MemoryError) or any(word in str(error) for word in words) else None


LINE = 600  # characters of a message; what is longer holds somebody's caption or file, and its end says what to do


def one_line(text, most=LINE):
    """The text on one line, its middle cut out where it is longer than `most`."""
    text = str(text)
    if len(text) > 4 * most:  # so that a caption of megabytes is not split into words first
        text = f"{text[: 2 * most]} … {text[-2 * most :]}"
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", printable(" ".join(text.split())))  # a terminal would obey them
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-(most // 3) + 3 :]}"


def printable(string):
    """The string with "?" for what UTF-8 cannot hold: half a surrogate pair, or another encoding's bytes in a name."""
    return string.encode("utf-8", "replace").decode()


def is_text(string):
    """Whether all of the string can be written as UTF-8."""
    return printable(string) == string
