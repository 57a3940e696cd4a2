"""Tells a client that has only closed its sending side, and waits for its answer, from a client that has left.

To the server both look alike: the connection's input ends. Only a write shows the difference, since the system of a client that
has left answers it with a reset. So a probe is written that changes nothing: `100 Continue` before the answer (HTTP/1.1 clients
skip it: RFC 9110, 15.2), or a comment between two events of a stream.

    input ends with the request, before the answer    the client most probably waits: probe after PROBE_SECONDS
    input ends later                                  the client has most probably left: probe at once

A proxy that forwards bytes (an SSH tunnel, a container's port) takes a probe for a client that has left, and may notice only at
the next one that nobody reads. So there are several probes. They are few, since some clients limit such interim answers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

AT_ONCE_SECONDS = 0.1  # the input ended with the request if it ended at most this long after the request's last byte
PROBE_SECONDS = 0.5
MAX_PROBES = 3  # the first two make a proxy leave, and the third is answered with a reset
NEXT_PROBE_SECONDS = 1.0  # time between two probes
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
        self._probes_left = MAX_PROBES
        self._next_probe = 0.0  # when the next probe may be written, by the clock of the event loop
        self._timer = loop.call_later(seconds, self._check)

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self._transport.is_closing():
            return
        now = self._loop.time()
        if self._probes_left and now >= self._next_probe and self._probe():
            self._probes_left -= 1
            self._next_probe = now + NEXT_PROBE_SECONDS
        if self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(CHECK_SECONDS, self._check)
