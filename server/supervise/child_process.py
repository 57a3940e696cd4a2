"""ChildProcess: runs a program once, writes lines to its standard input and reads lines from its standard output.

`ChildProcess.wait` returns as soon as the program has died, even if a grandchild still holds the program's output open. asyncio's
own `Process.wait` would wait for the grandchild too.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

STDIN = 0
MAX_LINE = 4096  # bytes kept of an output line that has no end yet


class ChildProcess(asyncio.SubprocessProtocol):
    """Holds one running process. `spawn` starts the process and returns this object."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self._exited = asyncio.Event()
        self._closed = False
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], on_line: Callable[[bytes], None], *, fds: tuple[int, ...] = ()) -> ChildProcess:
        """Start `command`, and call `on_line` with each line of its output, without the newline.

        Raises OSError or RuntimeError if the system has no process, descriptor or thread for it. No process is left then.
        """
        child = cls(on_line)
        try:
            await asyncio.get_running_loop().subprocess_exec(
                lambda: child,
                *command,
                stderr=None,  # inherited: the logs of all processes go to one place
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C at a terminal reaches the supervisor alone
            )
        except (OSError, RuntimeError):
            child._abandon()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._started.get_pid()

    def write_line(self, line: bytes) -> None:
        """Write a line to the child's standard input, which stays open for as long as the supervisor runs."""
        stdin = self._started.get_pipe_transport(STDIN)
        if isinstance(stdin, asyncio.WriteTransport):
            stdin.write(line + b"\n")

    async def wait(self) -> int:
        """Wait until the process is dead. Returns its exit code, or the negative number of the signal that killed it."""
        await self._exited.wait()
        code = self._started.get_returncode()
        self._closed = True  # later output comes from grandchildren, and is ignored
        self._started.close()
        return code if code is not None else 1

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it is dead."""
        if self._started.get_returncode() is None:
            self._started.send_signal(number)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.SubprocessTransport):
            self._transport = transport
            if self._closed:
                transport.close()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self._closed:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-MAX_LINE:]
        for line in lines:
            self._on_line(line)

    def process_exited(self) -> None:
        self._exited.set()

    def _abandon(self) -> None:
        """Kill a process that asyncio has started but cannot watch.

        If asyncio has not called `connection_made` yet, that call kills the process.
        """
        self._closed = True
        if self._transport is not None:
            self._transport.close()

    @property
    def _started(self) -> asyncio.SubprocessTransport:
        if self._transport is None:
            raise RuntimeError("the process has not been spawned")
        return self._transport
