"""EvictionOrder: which record of the disk tier goes first."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from engine.errors import InternalError


class EvictionOrder:
    """Orders slots: first those that were not used since the start, by their stamps; then the used ones, by their last use.

    A scan finds records in the order of slots, not of stamps, so the first kind is a heap. Its entries are void once their slot
    has left `_unused`.
    """

    def __init__(self) -> None:
        self._used: OrderedDict[int, None] = OrderedDict()
        self._unused: set[int] = set()
        self._heap: list[tuple[int, int]] = []  # (stamp, slot)

    def __len__(self) -> int:
        return len(self._used) + len(self._unused)

    def __iter__(self) -> Iterator[int]:
        yield from self._unused
        yield from self._used

    def add_unused(self, slot: int, stamp: int) -> None:
        """Add a slot whose record an earlier run wrote with the number `stamp`. Once for each slot between two `clear`."""
        heapq.heappush(self._heap, (stamp, slot))
        self._unused.add(slot)

    def use(self, slot: int) -> None:
        """Add a slot, or move it, to the end."""
        self._unused.discard(slot)
        self._used[slot] = None
        self._used.move_to_end(slot)

    def remove(self, slot: int) -> None:
        """Remove a slot if it is there."""
        self._unused.discard(slot)
        self._used.pop(slot, None)

    def pop(self) -> int | None:
        """Remove the first slot and return it. Returns None if there is none."""
        while self._heap:
            _, slot = heapq.heappop(self._heap)
            if slot in self._unused:
                self._unused.remove(slot)
                return slot
        return self._used.popitem(last=False)[0] if self._used else None

    def clear(self) -> None:
        self._used.clear()
        self._unused.clear()
        self._heap.clear()

    def check(self) -> None:
        """Raise InternalError if a slot has two places, or none in the heap that it belongs to."""
        if self._unused & self._used.keys() or not self._unused <= {slot for _, slot in self._heap}:
            raise InternalError("a disk slot has two places in the order of eviction, or lost its place")
