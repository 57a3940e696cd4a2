"""How a child process starts and ends with its parent: one JSON line on standard input starts it, and the pipe's end,
which comes whenever the parent goes, however it goes, ends it. Nothing of the start shows in `ps` or the environment.
Lines on standard output tell the parent how it gets on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
READY = b"ready"  # to serve; from a worker, once
ALIVE = b"alive"  # and getting on with its work; from an engine, again and again


def read_start() -> bytes:
    """Return the parent's line; from here on this process does not outlive it."""
    if sys.platform == "linux":  # reaches a child that is stopped or busy in C code, too
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    line = sys.stdin.buffer.readline()
    if not line:
        raise SystemExit("this is started by `tidegate serve`, which says on standard input what to do")
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    return line


def tell(word: bytes) -> None:
    """Say READY or ALIVE."""
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and so are we in a moment
        os.write(1, word + b"\n")


def _end_with_parent() -> None:
    # The descriptor, not sys.stdin: a daemon thread inside a buffered reader's lock breaks the interpreter's shutdown.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
