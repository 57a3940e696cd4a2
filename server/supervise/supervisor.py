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
import tempfile
from pathlib import Path

import msgspec
import setproctitle

from engine import logs
from engine.errors import ConfigError
from engine.process import EXIT_BAD_SETTINGS, EngineStart
from server.bundled import NOTICE, bundled_checkpoint
from server.metrics.supervisor import SupervisorDrops, worker_died
from server.settings import Settings
from server.supervise.child import Child, Fatal
from server.supervise.sockets import bind_http, claim_grpc, socket_path
from server.supervise.worker_start import WorkerStart

log = logging.getLogger("tidegate.supervisor")

KILL_MARGIN_SECONDS = 4.0  # past the time to drain, until a child that has not ended is killed
ENGINE_STOP_SECONDS = 5.0
CUT_SECONDS = 2.0  # for the streams' last words, where the server cannot go on
KILL_SECONDS = 1.0  # for killed children to be seen dead


class Supervisor:
    def __init__(self, settings: Settings, folder: Path) -> None:
        """`settings` name a model; `folder` is private and empty."""
        self._http = bind_http(settings)
        self._grpc, grpc_port = claim_grpc(settings)
        settings = settings.model_copy(update={"port": self._http.getsockname()[1], "grpc_port": grpc_port})
        self._settings = settings
        endpoint = f"ipc://{socket_path(folder)}"
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
        child = Child(f"api {index}", "server.supervise.worker", msgspec.json.encode(start), self._settings, fds=(fd,))
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
        logs.on_dropped(SupervisorDrops().add)
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


def _engine_start(settings: Settings, endpoint: str) -> bytes:
    start = EngineStart(
        config=settings.engine_config(), endpoint=endpoint, log_level=settings.log_level, log_format=settings.log_format
    )
    return msgspec.json.encode(start)
