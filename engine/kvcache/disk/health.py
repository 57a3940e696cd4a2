"""Health: whether the disk tier is on, why it is off, and when it is tried again. One thread uses it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable

from engine.kvcache.disk.outcome import DISK_FAULT, Outcome
from engine.kvcache.disk.settings import DiskSettings

_log = logging.getLogger("tidegate.disk")

SLOW_READS = 3  # reads in a row over the bound that turn the tier off; so does a single one that takes as many times the bound


class Health:
    """Turns off at a disk fault or at slow reads. The owner tries again when `is_due`, and reports by `turn_on` or `turn_off`."""

    def __init__(self, settings: DiskSettings, clock: Callable[[], float]) -> None:
        self.reason: Outcome | None = None
        self.outages: Counter[Outcome] = Counter()  # times turned off, by reason
        self._settings = settings
        self._clock = clock
        self._wait = settings.retry
        self._since = -math.inf  # last change between on and off
        self._retry_at = 0.0
        self._num_slow = 0

    @property
    def is_on(self) -> bool:
        return self.reason is None

    @property
    def is_due(self) -> bool:
        """Return whether it is time for an attempt to turn on."""
        return self.reason is not None and self._clock() >= self._retry_at

    def note(self, outcome: Outcome, read_seconds: float | None = None) -> None:
        """Judge an operation that ended. `read_seconds` is the duration if it was a read."""
        if outcome in DISK_FAULT:
            self.turn_off(outcome)
        elif read_seconds is not None:
            self._num_slow = self._num_slow + 1 if read_seconds > self._settings.slow_read else 0
            if self._num_slow >= SLOW_READS:
                self.turn_off(Outcome.SLOW)
            else:
                self.note_running(read_seconds)

    def note_running(self, seconds: float) -> None:
        """Judge the read that has been running for the longest time."""
        if seconds > SLOW_READS * self._settings.slow_read:
            self.turn_off(Outcome.SLOW)

    def is_slow(self, seconds: float) -> bool:
        return seconds > self._settings.slow_read

    def turn_off(self, reason: Outcome) -> None:
        """Turn off, or note that an attempt to turn on failed. Nothing changes while off before the next attempt is due."""
        now = self._clock()
        if self.reason is None:
            self.outages[reason] += 1
            self._wait = self._settings.retry if now - self._since >= self._wait else self._longer()
            self._since = now
        elif now < self._retry_at:
            return
        else:
            self._wait = self._longer()
        if self.reason != reason:
            extra = {"folder": str(self._settings.folder), "retry_s": round(self._wait, 1)}
            _log.warning("the disk tier is off: %s", reason.replace("_", " "), extra=extra)
        self.reason = reason
        self._retry_at = now + self._wait

    def turn_on(self) -> None:
        if self.reason is not None:
            now = self._clock()
            extra = {"folder": str(self._settings.folder), "off_s": round(now - self._since, 1)}
            _log.warning("the disk tier is on again", extra=extra)
            self.reason = None
            self._since = now
            self._num_slow = 0

    def _longer(self) -> float:
        return min(2 * self._wait, self._settings.max_retry)
