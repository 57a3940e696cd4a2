"""Sends server-sent events as one pure ASGI response.

Nothing is sent before the first event exists, so an error until then still gets its HTTP status. A later error becomes a
last `data: {"error": ...}` event, and the stream ends without [DONE], which stands for a complete answer. `send` waits while the
client's buffer is full. A client that leaves, or that `server.http.guard` disconnects because it reads nothing, cancels the
source of the events at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import Aborted
from server.errors import code_of, error_body, status_of
from server.http.disconnect import while_connected
from server.http.front import call_of
from server.http.half_close import COMMENT
from server.http.json_parts import Parts, joined
from server.service.pacing import Backlog

log = logging.getLogger("tidegate.http")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # without this header, nginx would buffer the events
]
_BACKLOG_BYTES = 64 << 10  # bytes sent per event loop iteration if further events are waiting
_EVENT_BYTES = 512  # added to the size of each event: making an event takes about as long as writing 512 bytes


def event(data: bytes) -> bytes:
    """Return the text of one server-sent event. `data` must have no line break; orjson writes none."""
    return b"data: " + data + b"\n\n"


def event_pieces(parts: Parts) -> Iterator[bytes]:
    """Yield the text of one server-sent event whose JSON is in parts. A large event has several pieces, to be sent in order."""
    return joined([b"data: ", *parts, b"\n\n"])


class EventStream(Response):
    """An HTTP response of server-sent events. Each item of `events` is an event, or a piece of one (see `event_pieces`)."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_HEADERS)
        self.events = events
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(scope, send))
        except Aborted:
            if not self.started:
                raise
            call_of(scope).code = Aborted.code

    async def _run(self, scope: Scope, send: Send) -> None:
        backlog = Backlog(_BACKLOG_BYTES)
        sent = b""  # the last piece that was written. `send` may wait before it writes a piece
        scope[COMMENT] = lambda: b":\n\n" if sent.endswith(b"\n\n") else b""
        async with aclosing(self.events) as events:
            piece = await anext(events)
            self.started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            sent = piece
            try:
                async for piece in events:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    sent = piece
                    if backlog.is_due(len(piece) + _EVENT_BYTES):
                        await asyncio.sleep(0)
            except Exception as error:  # noqa: BLE001 - the status line is sent, so any error must be reported in the stream
                call = call_of(scope)
                call.code = code_of(error)
                await send({"type": "http.response.body", "body": _last_event(error, call.id), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _last_event(error: Exception, id: str) -> bytes:
    """Return the event that reports `error` at the end of a stream. Errors that are the server's fault are logged, with `id`."""
    status = status_of(error).http
    if status == 500:
        log.error("a stream ended with an error: %r", error, exc_info=error, extra={"id": id})
    elif status > 500:
        log.warning("a stream ended with an error: %s", error, extra={"id": id})
    return event(error_body(error))
