"""Watchdog: calls back once it has not been fed for some time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICKS = 8


class Watchdog:
    """It counts `TICKS` short waits, not one long one: a process that was itself stopped for a while takes that for one of them,
    and finds the food that came meanwhile."""

    def __init__(self, seconds: float, on_hunger: Callable[[], None]) -> None:
        self._tick_seconds = seconds / TICKS
        self._on_hunger = on_hunger
        self._left = TICKS
        self._timer: asyncio.TimerHandle | None = None

    def feed(self) -> None:
        """The first time starts it."""
        self._left = TICKS
        if self._timer is None:
            self._wait()

    def stop(self) -> None:
        """Until it is fed again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._tick_seconds, self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._wait()
        else:
            self._timer = None
            self._on_hunger()
