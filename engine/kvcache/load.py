"""Load: what is held for one waiting request while, and after, the rest of its prefix comes from lower tiers. See `loads.py`."""

from __future__ import annotations

from collections import deque

from engine.kvcache.disk_tier import DiskRecord
from engine.kvcache.host_tier import Slot
from engine.plan import Tier
from engine.request import Request

Source = Slot | DiskRecord


class Load:
    """Describes a load. Blocks are numbered by their place in the prefix."""

    __slots__ = (
        "blocks",
        "digests",
        "family",
        "moving",
        "num_found",
        "num_good",
        "owner",
        "patience",
        "queued",
        "reading",
        "since",
        "sources",
        "withdrawn",
    )

    def __init__(
        self, owner: Request, digests: list[bytes], blocks: list[int], sources: list[Source], now: float, patience: float
    ) -> None:
        self.owner: Request | None = owner  # None: the request has ended, or has given its blocks back
        self.digests = digests  # of the blocks
        self.family = digests[0]
        self.blocks = blocks
        self.num_found = len(blocks) - len(sources)  # blocks that were on the GPU when the load began
        self.sources = sources  # of the blocks behind these
        self.queued: deque[int] = deque()  # blocks that wait to be read
        self.reading: set[int] = set()
        self.moving: dict[int, Slot] = {}  # blocks into which content is moved from this slot of the host
        self.num_good = len(blocks)  # blocks before the first that cannot be loaded
        self.withdrawn = False  # the content may be wrong
        self.since = now
        self.patience = patience  # how long the request waits for the disk

    @property
    def is_under_way(self) -> bool:
        return bool(self.moving or self.reading or self.queued)

    @property
    def num_coming(self) -> int:
        """Return how many blocks come before the first that has not left the disk."""
        return min([*self.queued, *self.reading], default=self.num_good)

    def num_from(self, tier: Tier, num_blocks: int) -> int:
        """Return how many of the first `num_blocks` blocks came from `tier`."""
        kind = Slot if tier is Tier.HOST else DiskRecord
        return sum(isinstance(source, kind) for source in self.sources[: max(0, num_blocks - self.num_found)])
