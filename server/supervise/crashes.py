"""CrashCount: how often a child process has died in a row, and how long to wait before its next start."""

from __future__ import annotations

import time

FIRST_PAUSE_SECONDS = 0.1  # pause before the first restart; the pause doubles with each further death in a row
MAX_PAUSE_SECONDS = 5.0


class CrashCount:
    """Counts how often a child process has died since one of its runs last did work for a client.

    A death after at least `stable_s` of readiness is not counted: an idle server that loses a process once a day must not end
    after some days. Such a death does not reset the count either.
    """

    def __init__(self, stable_s: float) -> None:
        self.deaths = 0
        self._stable_s = stable_s
        self._ready_at: float | None = None
        self._served = False

    def ready(self) -> None:
        """Record that the process is ready to serve now."""
        self._ready_at = time.monotonic()

    def served(self) -> None:
        """Record that the present process has done work for a client."""
        self._served = True

    def died(self) -> int:
        """Record that the process has died. Returns the number of deaths in a row."""
        if self._served:
            self.deaths = 0
        if self._ready_at is None or time.monotonic() - self._ready_at < self._stable_s:
            self.deaths += 1
        self._ready_at, self._served = None, False
        return self.deaths

    @property
    def pause_seconds(self) -> float:
        """The time in seconds to wait before the process is started again."""
        return min(FIRST_PAUSE_SECONDS * 2.0 ** max(0, self.deaths - 1), MAX_PAUSE_SECONDS)
