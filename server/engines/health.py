"""Pulse: whether an engine gets on with its work, judged by what came from it. Progress counts, not mere life."""

from __future__ import annotations

import time

from engine.messages import EngineStats

IDLE_STALE_SECONDS = 2.0  # the loop of an idle engine that has nothing to prepare turns every quarter of a second


class Pulse:
    """An idle engine is judged by its heartbeats, one that has work by its steps: a long step keeps heartbeats waiting, and so
    does what an idle one prepares."""

    def __init__(self, stall_timeout: float) -> None:
        self.stats: EngineStats | None = None
        self._stall_timeout = stall_timeout
        self._beat_at = self._moved_at = time.monotonic()
        self._busy = self._preparing = False

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def beat(self, stats: EngineStats, *, preparing: bool = False) -> None:
        self._beat_at = time.monotonic()
        self._preparing = preparing
        self._busy = stats.running + stats.waiting > 0
        if not self._busy or self.stats is None or stats.step != self.stats.step:
            self._moved_at = self._beat_at
        self.stats = stats

    def reason(self) -> str | None:
        """Why the engine is not fit for work; None where it is."""
        now = time.monotonic()
        if self._busy and now - self._moved_at > self._stall_timeout:
            return f"the engine has work, and its last step ended {now - self._moved_at:.0f} s ago"
        silent = max(IDLE_STALE_SECONDS, self._stall_timeout) if self._preparing else IDLE_STALE_SECONDS
        if not self._busy and now - self._beat_at > silent:
            return f"the engine's last heartbeat was {now - self._beat_at:.0f} s ago"
        return None
