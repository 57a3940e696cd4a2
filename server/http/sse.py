"""Server-sent events, as one pure ASGI response.

Nothing is sent before the first event is there, so an error until then still gets its HTTP status; a later one becomes a
last `data: {"error": ...}` and the stream ends without [DONE]. `send` waits while the client's buffer is full, and a client
that goes away (or that `server.http.guard` cuts off because it reads nothing) cancels the events' source at once.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import Aborted
from server.errors import error_body, status_of
from server.http.disconnect import while_connected

log = logging.getLogger("tidegate.http")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]


def event(data: bytes) -> bytes:
    """`data` must hold no line break; JSON as we write it has none."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Sends each item of `events` (finished frames, see `event`) as one piece of the body."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_HEADERS)
        self.events = events
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        except Aborted:
            if not self.started:
                raise

    async def _run(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            first = await anext(events)
            self.started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for frame in events:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            except Exception as error:  # noqa: BLE001 - the status line is out: whatever it is must be told in the stream
                await send({"type": "http.response.body", "body": _last_words(error), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _last_words(error: Exception) -> bytes:
    status = status_of(error).http
    if status == 500:
        log.error("a stream ended by an error: %r", error, exc_info=error)
    elif status > 500:
        log.warning("a stream ended by an error: %s", error)
    return event(error_body(error))
