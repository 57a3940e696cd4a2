"""Defines HttpServer: uvicorn's server, which stops without a reset for any client.

1. Answers that begin from now on close their connections. What waits to be accepted is accepted, and the port closes.
2. For `idle_seconds`, a request on an idle connection is still answered.
3. Idle connections end (GuardedProtocol.shutdown), and running requests end or are cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from server.http.guard import GuardedProtocol
from server.supervise.listening import accept_rest

CHECK_SECONDS = 0.02


class HttpServer(uvicorn.Server):
    """A uvicorn server that installs no signal handlers, since the worker has its own. `opened` is set once its port listens."""

    def __init__(self, config: uvicorn.Config, *, idle_seconds: float) -> None:
        """After `should_exit` is set, requests on idle connections are answered for `idle_seconds`."""
        super().__init__(config)
        self.opened = asyncio.Event()
        self._idle_seconds = idle_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.opened.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.default_headers.append((b"connection", b"close"))
        for listener in sockets or ():
            await accept_rest(listener)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        await self._await_idle()
        await super().shutdown(sockets)

    async def _await_idle(self) -> None:
        """Wait until no open connection is idle, for `idle_seconds` at most."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._idle_seconds
        while any(each.is_idle for each in self._connections):
            if clock() >= until or self.force_exit:
                return
            await asyncio.sleep(CHECK_SECONDS)

    @property
    def _connections(self) -> list[GuardedProtocol]:
        return [each for each in self.server_state.connections if isinstance(each, GuardedProtocol)]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
