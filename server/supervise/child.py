"""Child: a program that the supervisor starts again when it dies, and kills when it makes no progress."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from engine import lifeline
from engine.errors import EXIT_BAD_SETTINGS
from server.settings import Settings
from server.supervise.child_process import ChildProcess
from server.supervise.crashes import CrashCount
from server.supervise.watchdog import CallLater, Watchdog

log = logging.getLogger("tidegate.supervisor")


class Fatal(Exception):
    """Raised when the server must end. `message` is None if a child has already logged the reason."""

    def __init__(self, exit_code: int, message: str | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


class Timeout(NamedTuple):
    """The longest time, in seconds, that a process may report no progress, and the name of the setting that holds it."""

    setting: str
    seconds: float


class Program(NamedTuple):
    """What a Child runs: `python -m module`, with the line of `start()` on its standard input and the descriptors `fds` open."""

    name: str
    module: str
    start: Callable[[], bytes]
    stall: Timeout  # applies once the process is ready
    fds: tuple[int, ...] = ()


def nothing() -> None:
    """Do nothing. This is the default of `Child.on_ready` and `Child.on_drained`."""


class Child:
    """Runs a program until `stop` or `kill` is called, and starts a new process of it after each death.

    A process that reports no progress is killed: after start_timeout_s while it starts, and after the program's own timeout once
    it is ready. After crash_limit deaths in a row no new process is started.
    """

    def __init__(self, program: Program, settings: Settings, call_later: CallLater | None = None) -> None:
        """`call_later` starts the timers that find a process without progress; it is the event loop's by default."""
        self.name = program.name
        self.ready = asyncio.Event()
        self.drained = False  # the process, a worker, has reported that its requests have ended
        self.on_drained: Callable[[], None] = nothing
        self.on_ready: Callable[[], None] = nothing
        self.on_death: Callable[[int], None] = lambda pid: None
        self._program = program
        self._crash_limit = settings.crash_limit
        self._start = Timeout("start_timeout_s", settings.start_timeout_s)
        self._crashes = CrashCount(settings.crash_window_s)
        self._watchdog = Watchdog(self._kill_silent, call_later)
        self._process: ChildProcess | None = None
        self._was_ready = False  # once, in any of its processes
        self._stopping = asyncio.Event()
        self._killed = False

    async def run(self) -> None:
        """Return after `stop` or `kill`. Raises Fatal when another start makes no sense."""
        while not self._stopping.is_set():
            try:
                process = await self._spawn()
            except (OSError, RuntimeError) as error:
                if self._stopping.is_set():
                    return
                await self._pause(f"it could not be started: {error}")
                continue
            code = await process.wait()
            self._forget(process)
            if self._stopping.is_set():
                if code != 0 and not self._killed:  # the reason for a kill has been logged
                    log.warning("%s ended badly", self.name, extra={"exit_code": code})
                return
            if code == EXIT_BAD_SETTINGS and not self._was_ready:
                raise Fatal(EXIT_BAD_SETTINGS)
            await self._pause(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")

    def stop(self) -> None:
        """Ask the process to end; no other follows."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def hurry(self) -> None:
        """Ask a worker process to end at once, and to end its streams with an error."""
        self.stop()
        self._signal(signal.SIGINT)  # the second request to stop; two signals of one kind can become one

    def kill(self) -> None:
        """End the process without asking it; no other follows."""
        self._killed = True
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def tell(self, word: bytes) -> None:
        """Write a word of the line protocol to the process, if one is running."""
        if self._process is not None:
            self._process.write_line(word)

    async def _spawn(self) -> ChildProcess:
        program = self._program
        start = program.start()
        process = await ChildProcess.spawn((sys.executable, "-m", program.module), self._on_line, fds=program.fds)
        self._process = process
        process.write_line(start)
        self._watchdog.expect(self._start.seconds)
        if self._stopping.is_set():  # `stop` or `kill` was called while the process began
            process.send_signal(signal.SIGKILL if self._killed else signal.SIGTERM)
        return process

    def _forget(self, process: ChildProcess) -> None:
        self._process = None
        self._watchdog.stop()
        self.ready.clear()
        self.drained = False
        self.on_death(process.pid)

    def _on_line(self, line: bytes) -> None:
        if line == lifeline.ALIVE:
            self._watchdog.expect(self._timeout.seconds)
        elif line == lifeline.SERVED:
            self._crashes.served()
            log.debug("%s has served", self.name)
        elif line == lifeline.DRAINED:
            self.drained = True
            self.on_drained()
        elif line == lifeline.READY:
            self._crashes.ready()
            self._was_ready = True
            self.ready.set()
            self._watchdog.expect(self._timeout.seconds)  # the next report is due within the program's own timeout
            self.on_ready()
        else:
            log.info("%s printed: %s", self.name, line.decode(errors="replace").strip())

    @property
    def _timeout(self) -> Timeout:
        return self._program.stall if self.ready.is_set() else self._start

    def _kill_silent(self) -> None:
        setting, seconds = self._timeout
        log.error("%s makes no progress and is killed", self.name, extra={setting: seconds})
        self._signal(signal.SIGKILL)

    async def _pause(self, why: str) -> None:
        """Count a death, log it, and wait before the next start, or until `stop` or `kill`.

        Raises Fatal at crash_limit deaths in a row.
        """
        deaths = self._crashes.died()
        if deaths >= self._crash_limit:
            raise Fatal(1, f"{self.name} died {deaths} times and served nothing in between; the last time: {why}. Giving up")
        pause = self._crashes.pause_seconds
        log.error("%s died, starting it again", self.name, extra={"why": why, "in_seconds": pause})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
