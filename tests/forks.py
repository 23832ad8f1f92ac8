"""Commands of Python as forks of the process that starts them, which has imported torch and diffusers already."""

import _posixsubprocess
import atexit
import contextlib
import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import types

from data.common.imports import lean

with lean():  # before anything is forked, or each would import them again
    import infer.compare  # noqa: F401
    import train.loop  # noqa: F401

_fork_exec = _posixsubprocess.fork_exec


@contextlib.contextmanager
def forks():
    """Here and in all that is started here, python -m and python -c take no seconds of imports.

    Pipes, signals, the environment and exit codes are a process's own. What an import decides from the environment, or
    what must not be imported, can only be seen in a new interpreter.
    """
    _posixsubprocess.fork_exec = subprocess._fork_exec = _fork
    try:
        yield
    finally:
        _posixsubprocess.fork_exec = subprocess._fork_exec = _fork_exec


def _fork(argv, programs, close_fds, keep, cwd, env, *more):
    """subprocess's and multiprocessing's way to start a program, of which a Python is forked instead. -> its pid"""
    words = [os.fsdecode(word) for word in argv]
    if words[0] != sys.executable:
        return _fork_exec(argv, programs, close_fds, keep, cwd, env, *more)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(keep, cwd, env, *more)
        _python(words[1:])
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)


def _become(keep, cwd, env, *more):
    """What exec() and subprocess would have done to this process."""
    stdin, _, _, stdout, _, stderr, _, error_pipe, _, session, group, _, _, _, _, preexec = more[:16]
    for number, standard in ((stdin, 0), (stdout, 1), (stderr, 2)):
        if number not in (-1, standard):
            os.dup2(number, standard)
    gc.freeze()  # no file of the parent's is closed here later, when its number is another file's
    ends = [2, *sorted(number for number in keep if number not in (0, 1, 2, error_pipe)), os.sysconf("SC_OPEN_MAX")]
    for low, high in zip(ends, ends[1:]):
        os.closerange(low + 1, high)
    for standard in range(3):
        os.set_inheritable(standard, True)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if session:
        os.setsid()
    if group >= 0:
        os.setpgid(0, group)
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environb.update(word.split(b"=", 1) for word in env)
    if preexec is not None:
        preexec()
    atexit._clear()
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for handler in logging._handlerList:  # of libraries, which keep the stderr that they found
        if type(handler()) is logging.StreamHandler:
            handler().stream = sys.stderr


def _python(words):
    """Run what `python words` would."""
    while words[0] not in ("-m", "-c"):
        del words[0]  # -u
    kind, what, *rest = words
    sys.argv = [what if kind == "-m" else "-c", *rest]
    if kind == "-m":
        for name in (what, f"{what}.__main__"):
            sys.modules.pop(name, None)  # else runpy warns
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, vars(sys.modules["__main__"]))
