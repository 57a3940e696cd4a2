"""Watchdog: calls a function when a process has sent no sign of progress for some time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICKS = 8


class Watchdog:
    """Waits for the next sign of progress with `TICKS` short timers instead of one long timer.

    If the supervisor itself is stopped for a while, only one short timer runs out. The supervisor then reads the signs that came
    in the meantime before the next timer runs out.
    """

    def __init__(self, on_silence: Callable[[], None]) -> None:
        self._on_silence = on_silence
        self._seconds = 0.0
        self._left = TICKS
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, seconds: float) -> None:
        """Record a sign of progress, and expect the next one within `seconds`. The first call starts the watchdog."""
        self._left = TICKS
        if self._timer is None or seconds != self._seconds:
            self.stop()
            self._seconds = seconds
            self._start_timer()

    def stop(self) -> None:
        """Stop the watchdog until `expect` is called again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds / TICKS, self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._start_timer()
        else:
            self._timer = None
            self._on_silence()
