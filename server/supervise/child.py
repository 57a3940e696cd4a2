"""Child: a process that the supervisor starts again when it dies, and kills when it hangs."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Callable

from engine import lifeline
from engine.process import EXIT_BAD_SETTINGS
from server.settings import Settings
from server.supervise.child_process import ChildProcess
from server.supervise.watchdog import Watchdog

log = logging.getLogger("tidegate.supervisor")

BACKOFF_SECONDS = 0.1  # before the first restart; it doubles with each further death
MAX_BACKOFF_SECONDS = 5.0


class Fatal(Exception):
    """The server cannot go on. The message is None where a child has told it already."""

    def __init__(self, exit_code: int, message: str | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


class Child:
    """A process that is started again when it dies, ever later, until it has died too often. One that has said that it gets on,
    as engines do, is killed once it has not said so for stall_timeout_s."""

    def __init__(self, name: str, module: str, start: bytes, settings: Settings, *, fds: tuple[int, ...] = ()) -> None:
        self.name = name
        self.ready = asyncio.Event()
        self.on_death: Callable[[int], None] = lambda pid: None
        self._module, self._start, self._fds = module, start, fds
        self._limit, self._window = settings.crash_limit, settings.crash_window_s
        self._deaths: deque[float] = deque()
        self._stall_timeout = settings.stall_timeout_s
        self._watchdog = Watchdog(settings.stall_timeout_s, self._stalled)
        self._process: ChildProcess | None = None
        self._stopping = False
        self._killed = False

    async def run(self) -> None:
        """Returns after `stop`. Raises Fatal when there is no use in another start."""
        while not self._stopping:
            process = self._process = await self._spawn()
            if self._stopping:  # asked while the process began
                process.send_signal(signal.SIGKILL if self._killed else signal.SIGTERM)
            code = await process.wait()
            self._watchdog.stop()
            self.ready.clear()
            self.on_death(process.pid)
            if self._stopping:
                if code != 0 and not self._killed:  # whoever kills it has said why
                    log.warning("%s ended badly", self.name, extra={"exit_code": code})
                return
            if code == EXIT_BAD_SETTINGS:
                raise Fatal(EXIT_BAD_SETTINGS)
            await asyncio.sleep(self._backoff(code))

    def stop(self) -> None:
        self._stopping = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stopping = self._killed = True
        self._signal(signal.SIGKILL)

    def cut(self) -> bool:
        """Have a worker end what it runs, now. False where it is not ready, and so runs nothing."""
        if not self.ready.is_set():
            return False
        self.stop()
        self._signal(signal.SIGINT)  # the second request to stop; two of one signal can become one
        return True

    async def _spawn(self) -> ChildProcess:
        command = (sys.executable, "-m", self._module)
        return await ChildProcess.spawn(command, self._start + b"\n", self._on_line, fds=self._fds)

    def _on_line(self, line: bytes) -> None:
        if line == lifeline.ALIVE:
            self._watchdog.feed()
        elif line == lifeline.READY:
            self.ready.set()
        else:
            log.info("%s printed: %s", self.name, line.decode(errors="replace").strip())

    def _stalled(self) -> None:
        log.error("%s makes no progress and is killed", self.name, extra={"stall_timeout_s": self._stall_timeout})
        self._signal(signal.SIGKILL)

    def _backoff(self, code: int) -> float:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._window:
            self._deaths.popleft()
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if len(self._deaths) >= self._limit:
            raise Fatal(1, f"{self.name} died {self._limit} times within {self._window:g} s, last with {died}: giving up")
        pause = min(BACKOFF_SECONDS * 2.0 ** (len(self._deaths) - 1), MAX_BACKOFF_SECONDS)
        log.error("%s died, starting it again", self.name, extra={"why": died, "in_seconds": pause})
        return pause

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
