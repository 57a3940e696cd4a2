"""LoadGate: decides how much of a prefix is loaded from lower tiers, and how much is computed again.

    time to the first token  =  until the first k blocks have come  +  to compute the rest

Blocks from the disk pass the host, so both links carry them, and the slower link decides. The gate takes the k with the shortest
time, among those behind which the tier changes, and the most blocks among equal ones: what is loaded leaves the device to others.
Everything is loaded while it is not known how long computing takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum

from engine.kvcache.disk_tier import DiskRecord
from engine.kvcache.link import Link
from engine.kvcache.load import Source

MAX_PATIENCE = 10.0  # seconds for which a request waits for the disk at most

ComputeSeconds = Callable[[int, int], float | None]
"""Predicts how long it takes to compute the tokens from one position to another. None: it is not known."""


def unknown(first: int, end: int) -> None:
    """Predict nothing."""


class Decision(StrEnum):
    """The values are the labels of a metric."""

    LOAD = "load"  # all that lower tiers have
    PART = "part"  # the first part of it; computing the rest is faster
    COMPUTE = "compute"  # nothing: computing is faster
    GAVE_UP = "gave_up"  # a load took too long, or failed, and the rest is computed


class LoadGate:
    def __init__(self, host: Link, disk: Link, block_size: int, compute: ComputeSeconds) -> None:
        self._host = host
        self._disk = disk
        self._block_size = block_size
        self._compute = compute

    def num_worth(self, sources: Sequence[Source], num_found: int, num_tokens: int, now: float) -> int:
        """Return how many of the blocks from `sources` to load. They follow `num_found` blocks on the GPU, in a prompt of
        `num_tokens`."""
        best, best_seconds = len(sources), math.inf
        for num in range(len(sources), -1, -1):
            if 0 < num < len(sources) and type(sources[num]) is type(sources[num - 1]):
                continue
            computed = self._compute((num_found + num) * self._block_size, num_tokens)
            if computed is None:
                return len(sources)
            seconds = self._load_seconds(sources[:num], now) + computed
            if seconds < best_seconds:
                best, best_seconds = num, seconds
        return best

    def patience(self, sources: Sequence[Source], num_found: int) -> float:
        """Return for how many seconds a load may wait for the disk: as long as computing its blocks would take."""
        first = num_found * self._block_size
        return min(MAX_PATIENCE, self._compute(first, first + len(sources) * self._block_size) or MAX_PATIENCE)

    def _load_seconds(self, sources: Sequence[Source], now: float) -> float:
        """Return the predicted seconds until blocks from `sources` have come."""
        from_disk = sum(isinstance(source, DiskRecord) for source in sources)
        return max(self._host.predict(len(sources), now), self._disk.predict(from_disk, now))
