"""Defines HttpLimits: what the HTTP clients of one API worker may take."""

from __future__ import annotations

import msgspec

from server.service.connections import connection_limits
from server.settings import Settings


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, seconds and connections that the HTTP clients of one worker may take."""

    head_bytes: int  # largest size of the request line and all headers together
    body_bytes: int  # largest body that the app accepts
    head_seconds: float  # longest time from the first byte of a request to the blank line after its headers
    body_seconds: float  # longest time from the blank line after the headers to the body's last byte
    idle_seconds: float  # how long a connection may stay open without a request
    write_seconds: float  # how long the client may leave a full write buffer unread
    max_connections: int  # largest number of connections that are open at once

    @classmethod
    def from_settings(cls, settings: Settings) -> HttpLimits:
        """Take the limits from `settings`. Raises ConfigError if this process may not open max_connections sockets."""
        return cls(
            head_bytes=settings.max_header_bytes,
            body_bytes=settings.max_body_bytes,
            head_seconds=settings.header_timeout_s,
            body_seconds=settings.body_timeout_s,
            idle_seconds=settings.idle_timeout_s,
            write_seconds=settings.send_timeout_s,
            max_connections=connection_limits(settings).http,
        )

    @property
    def wire_bytes(self) -> int:
        """Return the bytes that a body may take on the wire, chunk headers included. A longer body is refused, and its connection
        closed."""
        return 2 * self.body_bytes + 65536
