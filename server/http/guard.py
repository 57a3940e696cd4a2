"""Defines GuardedProtocol: uvicorn's HTTP protocol with a limit on everything that a client can make long or many.

It limits the request line, the headers, the time to send the headers, the body, the chunks of the body, the time that an answer
stays unread, and the number of connections.

    idle ----first byte----> head ----blank line----> body ----last byte----> idle
         closed silently at      408 at head_seconds,     408 at body_seconds,
         idle_seconds            414/431 at its limits     413/400 at its limits

    any state: write buffer full (or unsent after the last byte) for write_seconds -> connection aborted
    a new connection while max_connections are open -> 503

The app also counts the bytes of each body, and answers 413 above its limit. The limit of this protocol is larger: it stops bodies
that the app does not read. After a refusal, this protocol closes the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from engine.errors import MalformedRequest, Overloaded, PayloadTooLarge, RequestTimeout
from engine.logs import ThrottledWarning
from server.errors import error_object
from server.http.framing import NO_VERSION, Refusal, has_no_version
from server.http.limits import HttpLimits
from server.http.tolerant import TolerantProtocol
from server.service.call_log import REQUEST_ID, request_id

log = logging.getLogger("tidegate.http")

URL_BYTES = 8192  # largest length of a request's URL
NUM_HEADERS = 100  # largest number of headers of a request
LINGER_SECONDS = 0.25  # time that an idle connection is read after the server has ended it: enough for a request under way


Phase = Literal["idle", "head", "body"]
_SMALLEST_MEAN_CHUNK = 64  # bytes, after _FREE_CHUNKS chunks: a chunk of one byte costs six on the wire and a parser call
_FREE_CHUNKS = 1024
_DISCARDED_BYTES = 64 << 20  # bytes read of a body after its answer: many clients read an answer only after sending all
_ERROR_TYPES = {408: "timeout_error", 503: "service_unavailable_error"}  # other statuses: invalid_request_error


class GuardedProtocol(TolerantProtocol):
    """Handles one HTTP connection, and limits the size and time of everything that the client sends. The function `guarded` makes
    a subclass that holds the limits, since uvicorn takes a class and not an object."""

    limits: HttpLimits
    count: Callable[[int], None]  # called with the status of each refusal
    warn_of_connections: Callable[..., None]  # called for each refused connection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.limits.idle_seconds  # type: ignore[assignment]  # a call_later takes either
        self.phase: Phase = "idle"
        self.is_ending = False  # the server stops, and what the client still sends is read and dropped
        self.head_bytes = 0  # bytes received since the head began. They may include the beginning of a body
        self.header_bytes = 0  # bytes of the headers that the parser has reported. Both counts are limited
        self.num_headers = 0
        self.body_wire_bytes = 0
        self.body_bytes = 0  # bytes of the body so far, without the headers of chunks
        self.num_chunks = 0
        self.phase_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Return whether no request is running and none has begun to arrive."""
        return self.phase == "idle" and self.answering is None

    # -- asyncio calls these methods for events of the connection --------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self.warn_of_connections(limit=self.limits.max_connections)
            self._refuse(503, Overloaded.code, "the server has too many open connections: try again later")
        else:
            self._set_phase_timer(self.limits.idle_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.phase_timer, self.write_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        if self.running is not None and self.running is not self.cycle and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.refusal is not None or self.is_ending or self.transport.is_closing():
            return
        if self.phase == "body":
            self.body_wire_bytes += len(data)
            self._check_body()
        else:
            self.head_bytes += len(data)
            if self.phase == "idle":
                self._enter("head", self.limits.head_seconds)
                self.headers = []  # those of the request before, until the parser sees a new one; a refusal repeats their id
                if has_no_version(data[: URL_BYTES + 32]):
                    self._refuse(*NO_VERSION)
        if self.refusal is None:
            self.parse(data)
        if self.refusal is None and self.phase == "head" and self.head_bytes > self.limits.head_bytes:
            self._refuse(431, PayloadTooLarge.code, "the request's headers are too large")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._set_write_timer()

    def shutdown(self) -> None:
        """End the connection because the server stops. uvicorn calls this method once for each connection.

        A request that is running or has begun is answered first. An idle connection ends in the sending direction and is read for
        LINGER_SECONDS more: a close would answer a request that comes now with a reset, and the client might lose what it was
        sent before.
        """
        if self.answering is not None:
            super().shutdown()
        elif self.phase != "head" and not self.transport.is_closing():
            self.is_ending = True
            self._unset_keepalive_if_required()
            self._enter("idle", LINGER_SECONDS)
            self.transport.write_eof()
            self._set_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_write_timer()

    # -- the parser calls these methods for each part of a request -------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.header_bytes = self.num_headers = 0
        if self.phase == "idle":
            self._enter("head", self.limits.head_seconds)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > URL_BYTES:
            self.stop(Refusal(414, PayloadTooLarge.code, "the request's URL is too long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser calls this method for each header, and for each trailer after the body. Trailers are counted and dropped."""
        self.num_headers += 1
        self.header_bytes += len(name) + len(value) + 4
        if self.num_headers > NUM_HEADERS:
            self.stop(Refusal(431, PayloadTooLarge.code, f"the request has more than {NUM_HEADERS} headers"))
        if self.header_bytes + len(self.url) > self.limits.head_bytes:
            self.stop(Refusal(431, PayloadTooLarge.code, "the request's headers are too large"))
        if self.phase == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.head_again is not None:
            return
        self.head_bytes = self.body_wire_bytes = self.body_bytes = self.num_chunks = 0
        self._enter("body", self.limits.body_seconds)

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self.num_chunks += 1
        if self.num_chunks > _FREE_CHUNKS + self.body_bytes // _SMALLEST_MEAN_CHUNK:
            self.stop(Refusal(400, MalformedRequest.code, "the body comes in too many small chunks"))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.head_again is None:
            self.phase = "idle"
            self._cancel_phase_timer()

    # -- these methods override those of uvicorn's protocol --------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Refuse the request after the parser has stopped, either by its own error (status 400) or by `_Refused`."""
        self._refuse(*(self.refusal or Refusal(400, MalformedRequest.code, "this is not a valid HTTP/1.1 request")))

    # -- these methods refuse a request ----------------------------------------------------------------------------

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Close the connection. The client gets an error answer, unless another answer has been started on the connection."""
        self.refusal = Refusal(status, code, message)
        self._cancel_phase_timer()
        if self.transport.is_closing():
            return
        self.count(status)
        running = self.answering
        if running is not None:
            if running is not self.cycle or running.response_started:
                self.transport.abort()
                return
            running.disconnected = True
            running.message_event.set()
        id = request_id(next((value for name, value in self.headers or () if name == REQUEST_ID), None))
        self.transport.write(_answer(status, code, message, id))
        self.transport.close()
        self._set_write_timer()

    def _check_body(self) -> None:
        discarding = self.cycle is None or self.cycle.response_complete
        if self.body_wire_bytes > (_DISCARDED_BYTES if discarding else self.limits.wire_bytes):
            self._refuse(413, PayloadTooLarge.code, f"the body is larger than {self.limits.body_bytes} bytes")

    # -- these methods limit the time of a phase and of a write ----------------------------------------------------

    def _enter(self, phase: Phase, seconds: float) -> None:
        self.phase = phase
        self._set_phase_timer(seconds)

    def _set_phase_timer(self, seconds: float) -> None:
        self._cancel_phase_timer()
        self.phase_timer = self.loop.call_later(seconds, self._phase_expired, seconds)

    def _cancel_phase_timer(self) -> None:
        if self.phase_timer is not None:
            self.phase_timer.cancel()
            self.phase_timer = None

    def _phase_expired(self, seconds: float) -> None:
        self.phase_timer = None
        if self.transport.is_closing():
            return
        answering = self.answering is not None
        if self.flow.read_paused or (self.phase == "head" and answering):
            self._set_phase_timer(seconds)  # the client waits for the server: it pipelined a request, or the app reads slowly
        elif self.phase == "idle":
            self.transport.close()
        elif self.phase == "body" and not answering:
            self.transport.abort()  # the answer is complete, and the client still sends its body
        else:
            self._refuse(408, RequestTimeout.code, f"the request's {self.phase} took longer than {seconds:g} s")

    def _set_write_timer(self) -> None:
        if self.write_timer is None and self.transport.get_write_buffer_size() > 0:
            self.write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)


def _answer(status: int, code: str, message: str, id: str) -> bytes:
    body = orjson.dumps(error_object(_ERROR_TYPES.get(status, "invalid_request_error"), code, message))
    headers = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
    headers += b"%b: %b\r\n" % (REQUEST_ID, id.encode()) + (b"retry-after: 1\r\n" if status == 503 else b"")
    return STATUS_LINE[status] + headers + b"\r\n" + body


def guarded(limits: HttpLimits, count: Callable[[int], None] = lambda status: None) -> type[GuardedProtocol]:
    """Return a GuardedProtocol class with the given limits, for uvicorn's option `http=`. The class calls `count` with the HTTP
    status of each refusal."""
    warn = ThrottledWarning(log, "HTTP connections are refused: as many are open as this API worker may have")
    attributes = {"limits": limits, "count": staticmethod(count), "warn_of_connections": staticmethod(warn)}
    return type("GuardedProtocol", (GuardedProtocol,), attributes)
