"""LimitChanges: the present limits of a controller, how often they have changed and why, and the log line of a change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from engine.scheduler.limits import StepLimits

LOG_SECONDS = 1.0  # shortest time between two log lines; changes between them are counted

log = logging.getLogger(__name__)


class LimitChanges:
    """Holds the present limits. `set` replaces them, counts the change under its reason and logs it."""

    def __init__(self, limits: StepLimits) -> None:
        self.present = limits
        self.last_reason = ""  # empty until the first change
        self._counts: Counter[str] = Counter()
        self._logged_at = float("-inf")
        self._not_logged = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of changes by reason."""
        return self._counts

    def set(self, limits: StepLimits, reason: str, now: float) -> None:
        """Make `limits` the present ones. Nothing happens if they are already."""
        old = self.present
        if limits == old:
            return
        self.present, self.last_reason = limits, reason
        self._counts[reason] += 1
        if now - self._logged_at < LOG_SECONDS:
            self._not_logged += 1
            return
        extra: dict[str, object] = {"reason": reason}
        for name, before, after in zip(StepLimits._fields, old, limits, strict=True):
            extra |= {f"{name}_old": before, f"{name}_new": after}
        if self._not_logged:
            extra["changes_not_logged"] = self._not_logged
        log.info("limits of a step changed", extra=extra)
        self._logged_at, self._not_logged = now, 0
