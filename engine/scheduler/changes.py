"""LimitChanges: the present limits of a controller, how often they have changed and why, and the log line of a change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args

from engine.scheduler.limits import StepLimits

LOG_SECONDS = 1.0  # shortest time between two log lines; changes between them are counted

Reason = Literal[
    "decode_steps_long",  # aimd: steps of decodes took over step_high_ms, so fewer requests may run
    "decode_steps_short",  # aimd: steps took under step_low_ms and requests wait, so more may run
    "prompt_steps_long",  # aimd: steps with prompts took over step_high_ms, so a step gets fewer tokens
    "prompt_steps_short",  # aimd: full steps with prompts took under step_low_ms, so a step gets more tokens
    "predicted_over_target",  # model: a step of the present limits would take longer than the target of a decode
    "predicted_under_target",  # model: a larger step would keep the targets of all decodes
    "policy",  # the other policy took over
]
REASONS: tuple[Reason, ...] = get_args(Reason)

log = logging.getLogger(__name__)


class LimitChanges:
    """Holds the present limits. `set` replaces them, counts the change under its reason and logs it."""

    def __init__(self, limits: StepLimits) -> None:
        self.present = limits
        self.last_reason: Reason | None = None
        self._counts: Counter[str] = Counter()
        self._logged_at = float("-inf")
        self._not_logged = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of changes by reason, for each reason that there was."""
        return self._counts

    def set(self, limits: StepLimits, reason: Reason, now: float) -> None:
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
