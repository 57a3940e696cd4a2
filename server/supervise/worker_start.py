"""WorkerStart: what the supervisor writes to a worker. With its own module, the supervisor need not import the whole server."""

from __future__ import annotations

import msgspec


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of an API worker. The supervisor writes them to the worker's standard input as one line of JSON."""

    settings: str  # Settings as JSON
    endpoint: str  # ZeroMQ address of the engine
    http_fd: int  # descriptor of the socket bound to the HTTP port
    admin_fd: int  # descriptor of the socket bound to the admin port
    index: int = 0
    listen_at_once: bool = True  # False: other workers serve, so this one opens its ports only once all workers are ready
