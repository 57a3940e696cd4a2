"""What the supervisor tells a worker. A module of its own, so that the supervisor does not import the whole server."""

from __future__ import annotations

import msgspec


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor writes to the process's standard input, as JSON on one line."""

    settings: str  # Settings as JSON
    endpoint: str
    http_fd: int  # a bound socket
    admin_fd: int  # likewise
    index: int = 0
