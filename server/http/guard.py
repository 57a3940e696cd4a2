"""uvicorn's httptools protocol with an end to everything a client can make long: the request line, the headers, the time
to send them, the body, its chunks, and the time it leaves an answer unread.

    idle ----first byte----> head ----blank line----> body ----last byte----> idle
         closed silently at      408 at head_seconds,     408 at body_seconds,
         idle_seconds            414/431 at its limits     413/400 at its limits

    any state: write buffer full (or unsent after the last byte) for write_seconds -> connection aborted

The app still counts each body against its own limit and answers 413 itself; the limit here is the backstop behind it.
Everything refused here closes the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import msgspec
import orjson
from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from engine.errors import MalformedRequest, PayloadTooLarge, RequestTimeout
from server.errors import error_object
from server.settings import Settings


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, counts and seconds that one connection may take."""

    url_bytes: int = 8192
    head_bytes: int = 32768  # request line and all headers
    num_headers: int = 100
    body_bytes: int = 4 << 20  # as the app limits it
    head_seconds: float = 10.0  # from the first byte to the blank line
    body_seconds: float = 60.0  # from the blank line to the body's last byte
    idle_seconds: float = 75.0  # a connection with no request on it
    write_seconds: float = 30.0  # a full write buffer that does not drain

    @classmethod
    def from_settings(cls, settings: Settings) -> HttpLimits:
        return cls(
            head_bytes=settings.max_header_bytes,
            body_bytes=settings.max_body_bytes,
            head_seconds=settings.header_timeout_s,
            body_seconds=settings.body_timeout_s,
            idle_seconds=settings.idle_timeout_s,
            write_seconds=settings.send_timeout_s,
        )

    @property
    def wire_bytes(self) -> int:
        """A body as it travels, with chunk headers; past it the connection goes, whatever the app thinks."""
        return 2 * self.body_bytes + 65536


Phase = Literal["idle", "head", "body"]
_SMALLEST_MEAN_CHUNK = 64  # bytes, past the first chunks: one byte a chunk costs six on the wire and a call each
_FREE_CHUNKS = 1024
_DISCARDED_BYTES = 64 << 20  # of a body nobody wants any more: read on for a while, so that the answer gets read


class _Refused(Exception):
    """Raised inside a parser callback, to stop the parser."""


class GuardedProtocol(HttpToolsProtocol):
    """Use a subclass made by `guarded`, which carries the limits."""

    limits = HttpLimits()
    count: Callable[[int], None]  # is told the status of each request that is refused here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.limits.idle_seconds  # type: ignore[assignment]  # a call_later takes either
        self.phase: Phase = "idle"
        self.head_bytes = 0  # as received; `header_bytes` as parsed, for heads that arrive in one piece with more
        self.header_bytes = 0
        self.num_headers = 0
        self.body_wire_bytes = 0
        self.body_bytes = 0  # without the chunks' headers
        self.num_chunks = 0
        self.running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the newest one parsed, not the one that runs
        self.phase_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.refusal: tuple[int, str, str] | None = None

    # -- connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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
        if self.refusal is not None or self.transport.is_closing():
            return
        if self.phase == "body":
            self.body_wire_bytes += len(data)
            self._check_body()
        else:
            self.head_bytes += len(data)
            if self.phase == "idle":
                self._enter("head", self.limits.head_seconds)
        if self.refusal is None:
            self._parse(data)
        if self.refusal is None and self.phase == "head" and self.head_bytes > self.limits.head_bytes:
            self._refuse(431, PayloadTooLarge.code, "the request's headers are too large")

    def _parse(self, data: bytes) -> None:
        """uvicorn's data_received, less the line that it logs for each malformed request: a stranger could fill the log."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserError:
            self.send_400_response("")
        except HttpParserUpgrade:
            pass  # an Upgrade header is the client's affair: it gets its answer by HTTP/1.1

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
        super().shutdown()
        if self.transport.is_closing():
            self._set_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_write_timer()

    # -- parser callbacks ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.header_bytes = self.num_headers = 0
        if self.phase == "idle":
            self._enter("head", self.limits.head_seconds)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.url_bytes:
            self._stop(414, PayloadTooLarge.code, "the request's URL is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of trailers too, after the body; those count, and are dropped."""
        self.num_headers += 1
        self.header_bytes += len(name) + len(value) + 4
        if self.num_headers > self.limits.num_headers:
            self._stop(431, PayloadTooLarge.code, f"the request has more than {self.limits.num_headers} headers")
        if self.header_bytes + len(self.url) > self.limits.head_bytes:
            self._stop(431, PayloadTooLarge.code, "the request's headers are too large")
        if self.phase == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        num_hosts = sum(1 for name, _ in self.headers if name == b"host")
        if num_hosts > 1 or (num_hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._stop(400, MalformedRequest.code, "the request must have one Host header")
        self.head_bytes = self.body_wire_bytes = self.body_bytes = self.num_chunks = 0
        self._enter("body", self.limits.body_seconds)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self.num_chunks += 1
        if self.num_chunks > _FREE_CHUNKS + self.body_bytes // _SMALLEST_MEAN_CHUNK:
            self._stop(400, MalformedRequest.code, "the body comes in too many small chunks")

    def on_message_complete(self) -> None:
        self.phase = "idle"
        self._cancel_phase_timer()
        super().on_message_complete()

    # -- uvicorn's own hooks ---------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def send_400_response(self, msg: str) -> None:
        """For when the parser stops, be it by its own judgement or by ours."""
        self._refuse(*(self.refusal or (400, MalformedRequest.code, "this is not a valid HTTP/1.1 request")))

    # -- refusing --------------------------------------------------------------------------------------------------

    def _stop(self, status: int, code: str, message: str) -> NoReturn:
        self.refusal = (status, code, message)
        raise _Refused

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer where no answer is under way, and close."""
        self.refusal = (status, code, message)
        self._cancel_phase_timer()
        if self.transport.is_closing():
            return
        self.count(status)
        running = self._answering
        if running is not None:
            if running is not self.cycle or running.response_started:
                self.transport.abort()
                return
            running.disconnected = True
            running.message_event.set()
        body = orjson.dumps(error_object("timeout_error" if status == 408 else "invalid_request_error", code, message))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._set_write_timer()

    @property
    def _answering(self) -> RequestResponseCycle | None:
        """The request whose answer is not complete."""
        return self.running if self.running is not None and not self.running.response_complete else None

    def _check_body(self) -> None:
        discarding = self.cycle is None or self.cycle.response_complete
        if self.body_wire_bytes > (_DISCARDED_BYTES if discarding else self.limits.wire_bytes):
            self._refuse(413, PayloadTooLarge.code, f"the body is larger than {self.limits.body_bytes} bytes")

    # -- timers ----------------------------------------------------------------------------------------------------

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
        answering = self._answering is not None
        if self.flow.read_paused or (self.phase == "head" and answering):
            self._set_phase_timer(seconds)  # it waits for us: a pipelined request, or a body the app has yet to take
        elif self.phase == "idle":
            self.transport.close()
        elif self.phase == "body" and not answering:
            self.transport.abort()  # answered long ago, and still sending
        else:
            self._refuse(408, RequestTimeout.code, f"the request's {self.phase} took longer than {seconds:g} s")

    def _set_write_timer(self) -> None:
        if self.write_timer is None and self.transport.get_write_buffer_size() > 0:
            self.write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)


def guarded(limits: HttpLimits, count: Callable[[int], None] = lambda status: None) -> type[GuardedProtocol]:
    """The protocol class to give to uvicorn as `http=`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits, "count": staticmethod(count)})
