"""The line protocol between the supervisor and each of its child processes.

Parent to child, on standard input: one line of JSON that starts the child, then words such as ALL_READY. The pipe ends when the
parent ends, however it ends, and then the child kills itself. The settings in the JSON do not show in `ps` or the environment.
Child to parent, on standard output: one word a line, which reports the child's state.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping

# A child writes these words to the supervisor.
READY = b"ready"  # the child can serve; sent once
ALIVE = b"alive"  # the child makes progress; sent repeatedly, also while the child starts
SERVED = b"served"  # the child has done work for a client (an engine: a step, a worker: a request); sent once
DRAINED = b"drained"  # a worker's requests have ended, and it will close its admin port; sent once
# The supervisor writes these words to a child.
ALL_READY = b"all ready"  # every API worker has an engine; a worker may receive this word more than once
CLOSE = b"close"  # the answer to DRAINED: the worker may close its admin port

PR_SET_PDEATHSIG = 1
STDIN, STDOUT = 0, 1
READ_BYTES = 1 << 16


def read_start(handlers: Mapping[bytes, Callable[[], object]] | None = None) -> bytes:
    """Read and return the parent's first line. From here on, this process is killed when its parent ends.

    A thread reads the parent's later words, and calls the entry of `handlers` for each word that has one.
    """
    if sys.platform == "linux":  # the kernel's signal also kills a child that is stopped or busy in C code
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    line, rest = _first_line()
    if not line:
        raise SystemExit("this program is started by `tidegate serve`, which writes its settings to standard input")
    os.set_blocking(STDOUT, False)  # a parent that is stopped and does not read must not stop its children
    threading.Thread(target=_follow_parent, args=(rest, handlers or {}), name="lifeline", daemon=True).start()
    return line


def tell(word: bytes) -> None:
    """Report a word, such as READY, to the parent. The word is dropped if the pipe is full because the parent does not read."""
    with contextlib.suppress(BrokenPipeError, BlockingIOError):  # BrokenPipeError: the parent has ended, and so will this process
        os.write(STDOUT, word + b"\n")


def _first_line() -> tuple[bytes, bytes]:
    """Read the first line of standard input. Returns the line without its newline, and the bytes already read after it."""
    data = b""
    while b"\n" not in data and (more := os.read(STDIN, READ_BYTES)):
        data += more
    line, _, rest = data.partition(b"\n")
    return line, rest


def _follow_parent(rest: bytes, handlers: Mapping[bytes, Callable[[], object]]) -> None:
    # The thread reads the descriptor, not sys.stdin: a daemon thread that holds a buffered reader's lock breaks Python's exit.
    while True:
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line in handlers:
                handlers[line]()
        more = os.read(STDIN, READ_BYTES)
        if not more:
            os.kill(os.getpid(), signal.SIGKILL)
        rest += more
