"""Raises this process's limit of open files and sockets as far as allowed, and checks that the server can run with it."""

from __future__ import annotations

import logging
import resource

from engine.errors import ConfigError

log = logging.getLogger("tidegate.supervisor")

# An idle worker has about 40 descriptors open, and reserves 8 for the admin port. A further connection takes one. An engine on a
# CPU has 12 open.
PROCESS_DESCRIPTORS = 64
# Descriptors that the supervisor has open, without CHILD_DESCRIPTORS for each child: three pipe ends and the child's pidfd.
SUPERVISOR_DESCRIPTORS = 16
CHILD_DESCRIPTORS = 4


def raise_limit(api_workers: int) -> None:
    """Raise the soft limit of open files to the hard limit; child processes inherit it. Raises ConfigError if it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # the hard limit exceeds what the kernel allows now
        log.warning("the limit of open files stays at %d: %s", soft, error)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(PROCESS_DESCRIPTORS, SUPERVISOR_DESCRIPTORS + CHILD_DESCRIPTORS * (1 + api_workers))
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ConfigError(
            f"each process may have {limit} files and sockets open, and a server with api_workers={api_workers} needs at least "
            f"{needed}: raise the hard limit (ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile= in Docker)"
        )
