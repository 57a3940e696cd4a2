"""EngineHealthTracker: decides whether one engine makes progress, from the messages that it sends."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.messages import EngineStats

IDLE_SILENCE_SECONDS = 2.0  # an idle engine sends a heartbeat every HEARTBEAT_SECONDS (0.25), unless it prepares something

Clock = Callable[[], float]  # a function that returns the seconds of a monotonic clock


class EngineHealthTracker:
    """Records when an engine last sent a heartbeat and when its step counter last moved.

    An engine that has work is judged by its steps, since a long step delays its heartbeats. An idle engine is judged by its
    heartbeats. An idle engine that prepares something (it captures graphs or warms up kernels) may be silent for as long as
    a step may take, which is `stall_timeout_s`.
    """

    def __init__(self, stall_timeout_s: float, clock: Clock = time.monotonic) -> None:
        self.stats: EngineStats | None = None  # statistics from the latest heartbeat
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._heartbeat_at = self._progress_at = clock()
        self._busy = self._preparing = False

    def record_step(self) -> None:
        self._progress_at = self._clock()

    def record_heartbeat(self, stats: EngineStats, *, preparing: bool = False) -> None:
        self._heartbeat_at = self._clock()
        self._preparing = preparing
        self._busy = stats.running + stats.waiting > 0
        if not self._busy or self.stats is None or stats.step != self.stats.step:
            self._progress_at = self._heartbeat_at
        self.stats = stats

    def why_unhealthy(self) -> str | None:
        """Return None if the engine makes progress, and otherwise the reason, as text for people, why it is not fit for work."""
        now = self._clock()
        if self._busy:
            stalled = now - self._progress_at > self._stall_timeout_s
            return f"the engine has work, and its last step ended {now - self._progress_at:.0f} s ago" if stalled else None
        allowed = max(IDLE_SILENCE_SECONDS, self._stall_timeout_s) if self._preparing else IDLE_SILENCE_SECONDS
        silent = now - self._heartbeat_at > allowed
        return f"the engine's last heartbeat was {now - self._heartbeat_at:.0f} s ago" if silent else None
