"""Computes how many connections one API worker can hold. Each takes a descriptor, and the system limits their number."""

from __future__ import annotations

import resource
from typing import NamedTuple

from engine.errors import ConfigError
from server.settings import Settings

OWN_DESCRIPTORS = 48  # of a worker for itself: an idle one has about 36 open, and a scrape or a restarted engine takes a few more
ADMIN_CONNECTIONS = 8  # of the admin port at once: health probes and scrapes, which are few and short
GRPC_SHARE = 4  # gRPC gets one part in four: a gRPC connection carries many calls, an HTTP connection one request at a time
RESERVED_DESCRIPTORS = OWN_DESCRIPTORS + ADMIN_CONNECTIONS
UNLIMITED = 1 << 20


class ConnectionLimits(NamedTuple):
    http: int
    grpc: int


def connection_limits(settings: Settings) -> ConnectionLimits:
    """Divide the descriptors that this process may open, except its own and the admin port's, which are reserved.

    Raises ConfigError if max_connections does not fit.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = UNLIMITED if limit == resource.RLIM_INFINITY else max(limit - RESERVED_DESCRIPTORS, 2)
    for_grpc = max(available // GRPC_SHARE, 1)
    max_http = settings.max_connections
    if max_http is None:
        return ConnectionLimits(available - for_grpc, for_grpc)
    if max_http > available - for_grpc:
        raise ConfigError(
            f"max_connections is {max_http}, but each process may have only {limit} files and sockets open, which is enough for "
            f"{available - for_grpc}: lower it, or raise the hard limit (ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile= "
            "in Docker)",
            param="max_connections",
        )
    return ConnectionLimits(max_http, available - max_http)
