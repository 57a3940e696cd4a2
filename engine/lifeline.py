"""The line protocol between the supervisor and each of its child processes.

Parent to child, on standard input: one line of JSON that starts the child, then words such as ALL_READY. The pipe ends when the
parent ends, however it ends, and then the child kills itself. Nothing of the start shows in `ps` or in the environment.
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

# Words of a child.
READY = b"ready"  # it can serve; once
ALIVE = b"alive"  # it makes progress; again and again, while it starts too
SERVED = b"served"  # it has done work for a client (an engine: a step, a worker: a request); once
# Words of the parent.
ALL_READY = b"all ready"  # every API worker has an engine; a worker may hear it more than once

PR_SET_PDEATHSIG = 1
STDIN, STDOUT = 0, 1
READ_BYTES = 1 << 16


def read_start(handlers: Mapping[bytes, Callable[[], object]] | None = None) -> bytes:
    """Return the parent's first line. From here on this process does not outlive its parent.

    Each later word of the parent calls its entry in `handlers`, on a thread of its own.
    """
    if sys.platform == "linux":  # this also reaches a child that is stopped or busy in C code
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    line, rest = _first_line()
    if not line:
        raise SystemExit("this program is started by `tidegate serve`, which writes its settings to standard input")
    os.set_blocking(STDOUT, False)  # a parent that is stopped and does not read must not stop its children
    threading.Thread(target=_follow_parent, args=(rest, handlers or {}), name="lifeline", daemon=True).start()
    return line


def tell(word: bytes) -> None:
    """Report READY, ALIVE or SERVED to the parent. The word is dropped where the parent has not read for a very long time."""
    with contextlib.suppress(BrokenPipeError, BlockingIOError):  # the first: the parent has ended, and this process ends too
        os.write(STDOUT, word + b"\n")


def _first_line() -> tuple[bytes, bytes]:
    """The first line of standard input, without its end, and the bytes after it that came along."""
    data = b""
    while b"\n" not in data and (more := os.read(STDIN, READ_BYTES)):
        data += more
    line, _, rest = data.partition(b"\n")
    return line, rest


def _follow_parent(rest: bytes, handlers: Mapping[bytes, Callable[[], object]]) -> None:
    # It reads the descriptor, not sys.stdin: a daemon thread inside a buffered reader's lock breaks the interpreter's shutdown.
    while True:
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line in handlers:
                handlers[line]()
        more = os.read(STDIN, READ_BYTES)
        if not more:
            os.kill(os.getpid(), signal.SIGKILL)
        rest += more
