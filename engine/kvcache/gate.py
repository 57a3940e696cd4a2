"""LoadGate: decides how much of a prefix is loaded from lower tiers, and how much is computed again.

    time to the first token  =  until the first k blocks have come  +  to compute the rest

Blocks from the disk pass the host, so both links carry them, and the slower link decides. The gate takes the k with the shortest
time, among those behind which the tier changes, and the most blocks among equal ones: what is loaded leaves the device to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from engine.kvcache.disk_tier import DiskRecord
from engine.kvcache.link import Link
from engine.kvcache.loads import Source

MAX_PATIENCE = 10.0  # seconds for which a request waits for the disk at most

ComputeSeconds = Callable[[int, int], float]
"""Predicts how long it takes to compute the tokens from one position to another. 0: it is not known."""


def unknown(first: int, end: int) -> float:
    """Predict nothing."""
    return 0.0


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
        best, best_seconds = len(sources), self.seconds(sources, len(sources), num_found, num_tokens, now)
        for num in range(len(sources) - 1, -1, -1):
            if num and isinstance(sources[num], DiskRecord) is isinstance(sources[num - 1], DiskRecord):
                continue
            seconds = self.seconds(sources, num, num_found, num_tokens, now)
            if seconds < best_seconds:
                best, best_seconds = num, seconds
        return best

    def patience(self, sources: Sequence[Source], num_found: int) -> float:
        """Return for how many seconds a load may wait for the disk: as long as computing its blocks would take."""
        first = num_found * self._block_size
        return min(MAX_PATIENCE, self._compute(first, first + len(sources) * self._block_size) or MAX_PATIENCE)

    def seconds(self, sources: Sequence[Source], num: int, num_found: int, num_tokens: int, now: float) -> float:
        """Return the predicted time to the first token if the blocks from the first `num` of `sources` are loaded."""
        from_disk = sum(isinstance(source, DiskRecord) for source in sources[:num])
        loaded = max(self._host.predict(num, now), self._disk.predict(from_disk, now))
        return loaded + self._compute((num_found + num) * self._block_size, num_tokens)
