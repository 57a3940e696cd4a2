"""ChildProcess: one process, which gets its start on standard input and is heard line by line on standard output.

Its death is known at once, whoever else may hold its output by then: asyncio's own `Process.wait` waits for those, too.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

STDIN, STDOUT = 0, 1
MAX_LINE = 4096  # bytes kept of a line that does not end


class ChildProcess(asyncio.SubprocessProtocol):
    """Made by `spawn`. `on_line` gets each line, without its end."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self._exited = asyncio.Event()
        self._closed = False
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def spawn(
        cls, command: Sequence[str], start: bytes, on_line: Callable[[bytes], None], *, fds: tuple[int, ...] = ()
    ) -> ChildProcess:
        """`start` is written to its standard input, which then stays open for as long as we live."""
        transport, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(on_line),
            *command,
            stderr=None,  # ours
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C at a terminal is for us alone
        )
        stdin = transport.get_pipe_transport(STDIN)
        if isinstance(stdin, asyncio.WriteTransport):
            stdin.write(start)
        return child

    @property
    def pid(self) -> int:
        return self._started.get_pid()

    async def wait(self) -> int:
        """Its exit code, once it is dead; negative for a signal."""
        await self._exited.wait()
        code = self._started.get_returncode()
        self._closed = True  # what others may still write is for nobody
        self._started.close()
        return code if code is not None else 1

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens where it is dead."""
        if self._started.get_returncode() is None:
            self._started.send_signal(number)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.SubprocessTransport):
            self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self._closed:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-MAX_LINE:]
        for line in lines:
            self._on_line(line)

    def process_exited(self) -> None:
        self._exited.set()

    @property
    def _started(self) -> asyncio.SubprocessTransport:
        if self._transport is None:
            raise RuntimeError("the process has not been spawned")
        return self._transport
