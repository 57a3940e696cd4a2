"""`tidegate serve`: starts one engine and the API workers, starts again what dies, and stops all of it in order.

    SIGTERM, SIGINT   workers stop accepting and finish what runs  ->  engine ends  ->  exit 0
    again             what runs is ended with an error

The HTTP socket is bound here, once, and inherited by the workers; they bind the gRPC port together, while this process
holds the claim to it. A child that exits with code 2 has said what is wrong with the settings: nothing is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import setproctitle

from engine import lifeline, logs
from engine.errors import ConfigError
from engine.process import EXIT_BAD_SETTINGS, EngineStart
from server.bundled import NOTICE, bundled_checkpoint
from server.child_process import ChildProcess
from server.metrics import worker_died
from server.settings import Settings
from server.watchdog import Watchdog
from server.worker_start import WorkerStart

log = logging.getLogger("tidegate.supervisor")

BACKOFF_SECONDS = 0.1  # before the first new start; twice as long each further time
MAX_BACKOFF_SECONDS = 5.0
KILL_MARGIN_SECONDS = 4.0  # past the time to drain, until a child that has not ended is killed
ENGINE_STOP_SECONDS = 5.0
CUT_SECONDS = 2.0  # for the streams' last words, where the server cannot go on
KILL_SECONDS = 1.0  # for killed children to be seen dead
MAX_SOCKET_PATH = 107  # bytes, of a Unix socket's address


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


class Supervisor:
    def __init__(self, settings: Settings, folder: Path) -> None:
        """`settings` name a model; `folder` is private and empty."""
        self._http = bind_http(settings)
        self._grpc, grpc_port = claim_grpc(settings)
        settings = settings.model_copy(update={"port": self._http.getsockname()[1], "grpc_port": grpc_port})
        self._settings = settings
        endpoint = f"ipc://{_socket_path(folder)}"
        self._engine = Child("engine 0", "engine.process", _engine_start(settings, endpoint), settings)
        self._workers = [self._worker(index, endpoint) for index in range(settings.api_workers)]
        self._asked = asyncio.Event()
        self._draining = False

    async def run(self) -> None:
        """Returns once all has ended as asked. Raises Fatal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        children = [self._engine, *self._workers]
        tasks = [asyncio.create_task(child.run()) for child in children]
        telling = asyncio.create_task(self._tell_ready())
        asked = asyncio.create_task(self._until_asked())
        try:
            await asyncio.wait([*tasks, asked], return_when=asyncio.FIRST_COMPLETED)
            if self._asked.is_set():
                telling.cancel()
                await self._drain(tasks[0], tasks[1:])
            for task in tasks:
                if task.done():
                    task.result()  # raises its Fatal
        except Fatal:
            await self._cut(tasks[1:])
            raise
        finally:
            for child in children:
                child.kill()
            await asyncio.wait(tasks, timeout=KILL_SECONDS)
            for task in (*tasks, telling, asked):
                task.cancel()
            await asyncio.gather(*tasks, telling, asked, return_exceptions=True)

    async def _until_asked(self) -> None:
        await self._asked.wait()

    def _on_signal(self) -> None:
        self._asked.set()
        if self._draining:
            log.warning("asked again to stop: ending what still runs")
            for worker in self._workers:
                worker.stop()
        self._draining = True

    async def _drain(self, engine: asyncio.Task[None], workers: list[asyncio.Task[None]]) -> None:
        log.info("stopping", extra={"drain_timeout_s": self._settings.drain_timeout_s})
        self._http.close()  # with the workers' copies closed, new connections are refused
        if self._grpc is not None:
            self._grpc.close()
        for worker in self._workers:
            worker.stop()
        _, late = await asyncio.wait(workers, timeout=self._settings.drain_timeout_s + KILL_MARGIN_SECONDS)
        if late:
            raise Fatal(1, f"{len(late)} API workers did not end in time and are killed")
        self._engine.stop()  # the streams that ran to their ends needed it until here
        _, late = await asyncio.wait({engine}, timeout=ENGINE_STOP_SECONDS)
        if late:
            log.warning("%s did not end in time and is killed", self._engine.name)
        log.info("stopped")

    async def _cut(self, tasks: list[asyncio.Task[None]]) -> None:
        """Have the workers end their streams with an error that says so, rather than in the middle of a line."""
        running = [task for worker, task in zip(self._workers, tasks, strict=True) if not task.done() and worker.cut()]
        if running:
            await asyncio.wait(running, timeout=CUT_SECONDS)

    async def _tell_ready(self) -> None:
        for worker in self._workers:
            await worker.ready.wait()
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        log.info(
            "ready",
            extra={
                "http": f"http://{host}:{self._settings.port}",
                "http_port": self._settings.port,
                "grpc_port": self._settings.grpc_port,
                "model": self._settings.model_name,
            },
        )

    def _worker(self, index: int, endpoint: str) -> Child:
        fd = self._http.fileno()
        start = WorkerStart(settings=self._settings.model_dump_json(), endpoint=endpoint, http_fd=fd, index=index)
        child = Child(f"api {index}", "server.worker", msgspec.json.encode(start), self._settings, fds=(fd,))
        child.on_death = worker_died
        return child


def serve(settings: Settings) -> int:
    """Run the server until it is told to stop; returns the exit code."""
    setproctitle.setproctitle("tidegate: supervisor")
    logs.set_up(settings.log_level, settings.log_format, "supervisor")
    folder = Path(tempfile.mkdtemp(prefix="tidegate-"))  # 0700: the engine's socket has no other lock
    try:
        metrics = folder / "metrics"
        metrics.mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
        # gRPC's core writes lines of its own form to standard error at a client's garbage; read when the workers import it.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        asyncio.run(_run(with_model(settings), folder))
    except ConfigError as error:
        log.error(error.message)
        return EXIT_BAD_SETTINGS
    except Fatal as fatal:
        if fatal.message is not None:
            log.critical(fatal.message)
        return fatal.exit_code
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


async def _run(settings: Settings, folder: Path) -> None:
    await Supervisor(settings, folder).run()


def with_model(settings: Settings) -> Settings:
    """The settings with a checkpoint folder in them: the bundled one, where none is named."""
    if settings.model is None:
        log.info(NOTICE)
        return settings.model_copy(update={"model": str(bundled_checkpoint())})
    if not (Path(settings.model) / "config.json").is_file():
        raise ConfigError(f"model is {settings.model!r}: it must be a checkpoint folder, with a config.json in it", param="model")
    return settings


def bind_http(settings: Settings) -> socket.socket:
    family, _, _, _, address = _address(settings.host, settings.port, "port")
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _bind(bound, address, "port", settings.port, settings.host)
    return bound


def claim_grpc(settings: Settings) -> tuple[socket.socket | None, int]:
    """Make sure that the gRPC port is free. Several workers share it by SO_REUSEPORT, which would let strangers in, too: the
    first, plain bind finds them, and the socket that is returned keeps out whoever comes later without that option."""
    family, _, _, _, address = _address(settings.host, settings.grpc_port, "grpc_port")
    with socket.socket(family, socket.SOCK_STREAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(plain, address, "grpc_port", settings.grpc_port, settings.host)
        address = plain.getsockname()
    if settings.api_workers == 1:
        return None, address[1]
    claim = socket.socket(family, socket.SOCK_STREAM)
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _bind(claim, address, "grpc_port", address[1], settings.host)
    return claim, address[1]


def _bind(sock: socket.socket, address: tuple[str, int], name: str, port: int, host: str) -> None:
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{name} is {port}, which cannot be had on {host}: {error.strerror}", param=name) from None


def _address(host: str, port: int, name: str) -> tuple[int, int, int, str, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"host is {host!r}, which is no address of this machine: {error.strerror}", param="host") from None
    return found[0]  # type: ignore[return-value]


def _socket_path(folder: Path) -> Path:
    path = folder / "engine"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(f"the temporary folder's path is too long for a socket: {folder}; set TMPDIR to a shorter one")
    return path


def _engine_start(settings: Settings, endpoint: str) -> bytes:
    start = EngineStart(
        config=settings.engine_config(), endpoint=endpoint, log_level=settings.log_level, log_format=settings.log_format
    )
    return msgspec.json.encode(start)
