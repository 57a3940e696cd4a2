"""ManualTimers: timers on a clock that a test moves."""

import asyncio


class ManualTimers:
    """Its `call_later` replaces the event loop's. A callback runs in the call of `advance` that reaches its time."""

    def __init__(self):
        self.now = 0.0
        self._handles = []  # asyncio.TimerHandle

    def call_later(self, delay, callback):
        handle = asyncio.TimerHandle(self.now + delay, callback, (), asyncio.get_running_loop())
        self._handles.append(handle)
        return handle

    def advance(self, seconds):
        """Move the clock and run the timers that end in this time, in the order of their ends."""
        end = self.now + seconds
        while due := [handle for handle in self._handles if not handle.cancelled() and handle.when() <= end]:
            handle = min(due, key=asyncio.TimerHandle.when)
            self._handles.remove(handle)
            self.now = handle.when()
            handle._run()
        self.now = end
