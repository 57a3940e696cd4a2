"""Defines TolerantProtocol: uvicorn's HTTP protocol for clients that it would answer wrongly or not at all.

These are clients of HTTP/1.0, clients that ask for another protocol (Upgrade), and clients that close their sending side and then
wait for their answer. Requests whose version or framing it does not know are refused.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.http.framing import Refusal, fault_of, head_without_upgrade, until_close
from server.http.half_close import AT_ONCE_SECONDS, COMMENT, CONTINUE, PROBE_SECONDS, HalfClosed


class _Refused(Exception):
    """A parser callback raises this exception to stop the parser when it refuses a request."""


class TolerantProtocol(HttpToolsProtocol):
    """Handles one HTTP connection. A subclass calls `parse`, and answers a refused request in `send_400_response`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running: RequestResponseCycle | None = None  # the request being answered. uvicorn's `cycle` is the newest one
        self.refusal: Refusal | None = None
        self.head_again: bytes | None = None  # the head of a request with an Upgrade header, to be parsed again without it
        self._is_complete = True  # no part of a request has arrived without its end
        self._ended_at = 0.0  # when the last byte of the newest complete request arrived
        self._half_closed: HalfClosed | None = None  # set if the client has closed its sending side

    @property
    def answering(self) -> RequestResponseCycle | None:
        """Return the request whose answer is not complete yet, or None."""
        return self.running if self.running is not None and not self.running.response_complete else None

    def parse(self, data: bytes) -> None:
        """Feed `data` to the parser, as uvicorn's data_received does. Unlike uvicorn, this does not log a malformed request,
        since any client could fill the log."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while rest and self.refusal is None:
            rest = self._feed(rest)

    def stop(self, refusal: Refusal) -> NoReturn:
        """Stop the parser, from one of its callbacks, since the request is refused."""
        self.refusal = refusal
        raise _Refused

    def _feed(self, data: memoryview) -> memoryview:
        """Feed `data` to the parser. If the data has a head with an Upgrade header, that head is parsed again without the header:
        the client gets its answer by HTTP/1.1. Returns the data behind that head."""
        nothing = data[:0]
        try:
            self.parser.feed_data(data)
        except HttpParserError:
            self.send_400_response("")
        except HttpParserUpgrade as stop:
            if self.head_again is not None:
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's protocol does
                head, self.head_again = self.head_again, None
                self._feed(memoryview(head))
                return data[stop.args[0] :]
        return nothing

    # -- asyncio calls these methods for events of the connection --------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        if self._half_closed is not None:
            self._half_closed.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed its sending side. Returns True if the connection stays open, since a client waits for its answer.

        An HTTP/1.0 client has left if it closes later than with its request, since it cannot be asked before its answer begins.
        """
        running, at_once = self.answering, self.loop.time() - self._ended_at <= AT_ONCE_SECONDS
        if not self._is_complete or running is None or self.transport.is_closing():
            return False
        if not (at_once or running.response_started or running.scope["http_version"] == "1.1"):
            return False
        self.cycle.keep_alive = False
        if self._half_closed is None:
            seconds = PROBE_SECONDS if at_once and not running.response_started else 0.0
            self._half_closed = HalfClosed(self.loop, self.transport, self._probe_client, seconds=seconds)
        return True

    def _probe_client(self) -> bool:
        """Write what a waiting client skips, if it may be written now. Returns whether it was written."""
        running = self.answering
        if running is None:
            return False
        if not running.response_started:
            probe = CONTINUE if running.scope["http_version"] == "1.1" else b""
        else:
            probe = cast(dict[str, Any], running.scope).get(COMMENT, bytes)()
            probe = b"%x\r\n%b\r\n" % (len(probe), probe) if probe and running.chunked_encoding else probe
        self.transport.write(probe)
        return bool(probe)

    # -- the parser calls these methods for each part of a request -------------------------------------------------

    def on_message_begin(self) -> None:
        self._is_complete = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        version, method = self.parser.get_http_version(), self.parser.get_method()
        fault = fault_of(version, self.headers)
        if fault is not None:
            self.stop(fault)
        if self.parser.should_upgrade() and method != b"CONNECT":
            self.head_again = head_without_upgrade(method, self.url, version, self.headers)
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.head_again is None:
            self._is_complete = True
            self._ended_at = self.loop.time()
            super().on_message_complete()

    # -- these methods override those of uvicorn's protocol --------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, until_close(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _should_upgrade_to_ws(self) -> bool:
        return False
