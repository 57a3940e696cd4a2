"""Tells a client that has only closed its sending side, and waits for its answer, from a client that has left.

To the server both look alike: the connection's input ends. Only a write shows the difference, since the system of a client that
has left answers it with a reset. So a probe is written that changes nothing: `100 Continue` before the answer (HTTP/1.1 clients
skip it: RFC 9110, 15.2), or a comment between two events of a stream.

    input ends with the request, before the answer    the client most probably waits: probe after PROBE_SECONDS
    input ends later                                  the client has most probably left: probe at once
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

AT_ONCE_SECONDS = 0.1  # the input ended with the request if it ended at most this long after the request's last byte
PROBE_SECONDS = 0.5
CHECK_SECONDS = 0.1  # time between two looks at the state of the connection
COMMENT = "tidegate.comment"  # key in the ASGI scope of a stream: a function that returns a comment, or b"" within an event
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfClosed:
    """Watches a connection whose input has ended, and aborts it once the client has surely left."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, probe: Callable[[], bool], *, seconds: float
    ) -> None:
        """`probe` writes a probe, if one may be written now, and returns whether it did. It is first called after `seconds`."""
        self._loop = loop
        self._transport = transport
        self._probe = probe
        self._has_probed = False
        self._timer = loop.call_later(seconds, self._check)

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self._transport.is_closing():
            return
        self._has_probed = self._has_probed or self._probe()
        if self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(CHECK_SECONDS, self._check)
