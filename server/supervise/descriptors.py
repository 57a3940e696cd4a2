"""The limit of open files and sockets: raised as far as allowed, and checked before anything fails for lack of it."""

from __future__ import annotations

import logging
import resource

from engine.errors import ConfigError

log = logging.getLogger("tidegate.supervisor")

# An idle worker has about 40 descriptors open, and reserves 8 for the admin port. A further connection takes one. An engine on a
# CPU has 12 open.
PROCESS_DESCRIPTORS = 64
# What the supervisor has open, besides three pipe ends and a descriptor of the process for each child.
SUPERVISOR_DESCRIPTORS = 16
CHILD_DESCRIPTORS = 4


def raise_limit(api_workers: int) -> None:
    """Raise the soft limit to the hard one, here and so in all children. Raises ConfigError where that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # a hard limit past what the kernel allows now
        log.warning("the limit of open files stays at %d: %s", soft, error)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(PROCESS_DESCRIPTORS, SUPERVISOR_DESCRIPTORS + CHILD_DESCRIPTORS * (1 + api_workers))
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ConfigError(
            f"each process may have {limit} files and sockets open, and a server with api_workers={api_workers} needs at least "
            f"{needed}: raise the hard limit (ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile= in Docker)"
        )
