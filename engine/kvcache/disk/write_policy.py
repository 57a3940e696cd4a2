"""Why a record is not written, and how fast records may be written. A cap spares the SSD, whose cells wear out by writes."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Refusal(StrEnum):
    """Why a record is not written. The values are the labels of a metric."""

    OFF = "off"
    PRESENT = "present"  # it is on disk already, or being written
    RATE = "rate"
    BUSY = "busy"  # too many writes wait
    NO_SLOT = "no_slot"  # all slots are in use by moves, or none is allocated yet


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
