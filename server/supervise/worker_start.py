"""What the supervisor writes to a worker. It is a module of its own, so that the supervisor does not import the whole server."""

from __future__ import annotations

import msgspec


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's first line on standard input, as JSON."""

    settings: str  # Settings as JSON
    endpoint: str  # of the engine
    http_fd: int  # a bound socket
    admin_fd: int  # likewise
    index: int = 0
    listen_at_once: bool = True  # False: other workers serve, so this one opens its ports only once all workers are ready
