"""Watchdog: calls a function when a process has sent no sign of progress for some time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICKS = 8

CallLater = Callable[[float, Callable[[], None]], asyncio.TimerHandle]


class Watchdog:
    """Waits for the next sign of progress, by short timers (ticks) of an eighth of the time instead of one long timer.

    A supervisor that was itself stopped for a while then loses one tick only, and reads the signs that came in the meantime
    before the next. `on_silence` is called once the whole time has passed without a sign, and at most one tick later.
    """

    def __init__(self, on_silence: Callable[[], None], call_later: CallLater | None = None) -> None:
        """`call_later` starts a timer; it is the running event loop's by default."""
        self._on_silence = on_silence
        self._call_later = call_later
        self._seconds = 0.0
        self._left = TICKS
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, seconds: float) -> None:
        """A sign has come, and the next one is due within `seconds`. The first call starts the watchdog."""
        self._left = TICKS + 1  # the tick that runs now may end at once, so it is not counted
        if self._timer is None or seconds != self._seconds:
            self.stop()
            self._seconds = seconds
            self._left = TICKS
            self._start_timer()

    def stop(self) -> None:
        """Stop the watchdog until `expect` is called again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self) -> None:
        call_later = self._call_later or asyncio.get_running_loop().call_later
        self._timer = call_later(self._seconds / TICKS, self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._start_timer()
        else:
            self._timer = None
            self._on_silence()
