"""Which blocks are worth a write, and how many bytes may be written: both spare the SSD, whose cells wear out by writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import StrEnum


class Refusal(StrEnum):
    """Why a block is not written. The values are the labels of a metric."""

    OFF = "off"
    PRESENT = "present"  # its record is on disk already, or being written
    NOT_WORTH = "not_worth"  # the write filter holds it back
    RATE = "rate"
    BUSY = "busy"  # too many writes wait
    NO_SLOT = "no_slot"  # all slots are in use by moves, or none is allocated yet


class WriteFilter:
    """Lets a block through from its second use on, or once it belongs to a finished turn. It remembers `capacity` digests.

    Most blocks of a service are used once: the end of a prompt that nobody continues. They would be written for nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._worth: OrderedDict[bytes, bool] = OrderedDict()  # the least recently used first

    def use(self, digest: bytes) -> None:
        """Count one use of a block: it was computed, or a request's prefix matched it."""
        self._set(digest, digest in self._worth)

    def finish(self, digests: Iterable[bytes]) -> None:
        """Mark the blocks of a finished turn, which its next turn will use."""
        for digest in digests:
            self._set(digest, True)

    def passes(self, digest: bytes) -> bool:
        return self._worth.get(digest, False)

    def _set(self, digest: bytes, worth: bool) -> None:
        self._worth[digest] = worth
        self._worth.move_to_end(digest)
        if len(self._worth) > self._capacity:
            self._worth.popitem(last=False)


class TokenBucket:
    """Limits a rate to `rate` units a second, with bursts of up to `burst` units. `clock` returns seconds."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = burst
        self._at = clock()

    def has(self, amount: float) -> bool:
        """Return whether `amount` units are left."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level >= amount

    def take(self, amount: float) -> None:
        self._level -= amount
