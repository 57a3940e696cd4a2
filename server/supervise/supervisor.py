"""`tidegate serve`: starts one engine and the API workers, starts again what dies, and stops all of it in order.

    SIGTERM, SIGINT, SIGHUP   workers stop accepting and finish what runs, then the engine ends; exit code 0
    a second of these         what still runs is ended with an error
    SIGQUIT                   both at once
    SIGUSR1, SIGUSR2          ignored

The HTTP socket is bound here, once, and inherited by the workers. They bind the gRPC port together, while this process holds
the claim to it. A child that exits with code 2 before it was ever ready has logged what is wrong with the settings: the server
ends with code 2. Later that code is a death like others, as memory that another program takes for a moment can cause it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import setproctitle

from engine import lifeline, logs
from engine.errors import EXIT_BAD_SETTINGS, ConfigError
from engine.scheduler.cost_file import load_costs
from engine.scheduler.cost_folder import check_folder
from server.bundled import NOTICE, bundled_checkpoint
from server.metrics.shared_files import FOLDER_VARIABLE
from server.metrics.supervisor import SupervisorDrops, worker_died
from server.settings import Settings
from server.supervise import descriptors
from server.supervise.child import Child, Fatal
from server.supervise.folder import RunFolder, keep
from server.supervise.listening import drop_new_connections
from server.supervise.programs import Programs
from server.supervise.sockets import bind_admin, bind_http, claim_grpc

log = logging.getLogger("tidegate.supervisor")

KILL_MARGIN_SECONDS = 4.0  # time after drain_timeout_s until a child that has not ended is killed
ENGINE_STOP_SECONDS = 5.0
CUT_SECONDS = 2.0  # after a fatal error, the time that workers have to send an error to each stream
KILL_SECONDS = 1.0  # longest wait for killed children to end


class Supervisor:
    """Owns the ports and the child processes of one server."""

    def __init__(self, settings: Settings, folder: RunFolder) -> None:
        """Bind the ports and prepare the child processes, without starting them. `settings` must name a model."""
        self._folder = folder
        self._http = bind_http(settings)
        self._grpc, grpc_port = claim_grpc(settings)
        self._admin = bind_admin(settings)  # open until the end, so that probes still get answers while the server drains
        ports = {"port": self._http.getsockname()[1], "grpc_port": grpc_port, "admin_port": self._admin.getsockname()[1]}
        self._settings = settings.model_copy(update=ports)
        programs = Programs(self._settings, folder, http_fd=self._http.fileno(), admin_fd=self._admin.fileno())
        self._engine = Child(programs.engine(), self._settings)
        self._workers = [self._worker_child(programs, index) for index in range(settings.api_workers)]
        self._tasks: dict[Child, asyncio.Task[None]] = {}
        self._all_ready = False  # set once all workers are ready, and never cleared
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Run the child processes until a signal asks the server to stop and they have ended.

        Raises Fatal if the server cannot go on.
        """
        self._handle_signals()
        self._tasks = {child: asyncio.create_task(child.run()) for child in (self._engine, *self._workers)}
        helpers: list[asyncio.Task[Any]] = [asyncio.create_task(self._stop.wait()), asyncio.create_task(keep(self._folder))]
        try:
            await asyncio.wait([*self._tasks.values(), *helpers], return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                await self._drain()
            for task in (*self._tasks.values(), *helpers):
                if task.done():
                    task.result()  # raises the task's Fatal, or the exception of a bug
        except Fatal:
            await self._cut()
            raise
        finally:
            await self._kill()
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        stopping = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            stopping.append(signal.SIGHUP)
        for number in stopping:
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGQUIT, self._on_quit)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            loop.add_signal_handler(number, log.warning, "%s has no meaning here and is ignored", number.name)

    def _on_stop(self) -> None:
        if self._stop.is_set():
            self._on_quit()
        self._stop.set()

    def _on_quit(self) -> None:
        log.warning("stopping at once: what still runs is ended with an error")
        self._stop.set()
        for worker in self._workers:
            worker.hurry()

    async def _drain(self) -> None:
        log.info("stopping", extra={"drain_timeout_s": self._settings.drain_timeout_s})
        self._close_http()
        if self._grpc is not None:
            self._grpc.close()
        for worker in self._workers:
            if worker.ready.is_set():
                worker.stop()
            else:
                worker.kill()  # a worker that is not ready runs no request, and may hang in its start
        _, late = await asyncio.wait(self._worker_tasks, timeout=self._settings.drain_timeout_s + KILL_MARGIN_SECONDS)
        if late:
            raise Fatal(1, f"{len(late)} API workers did not end in time and are killed")
        self._admin.close()  # if a worker died as it stopped, it is still open
        self._engine.stop()  # streams that ran to their ends needed the engine until here
        _, late = await asyncio.wait({self._tasks[self._engine]}, timeout=ENGINE_STOP_SECONDS)
        if late:
            log.warning("%s did not end in time and is killed", self._engine.name)
        log.info("stopped")

    def _close_http(self) -> None:
        """Stop new connections. They are refused once the workers have accepted those that wait, and closed their copies."""
        if self._http.fileno() >= 0:
            drop_new_connections(self._http)
            self._http.close()

    async def _cut(self) -> None:
        """Ask the workers to end their streams with an error, so that no stream breaks off in the middle of a line."""
        self._close_http()
        running = []
        for worker in self._workers:
            if worker.ready.is_set() and not self._tasks[worker].done():
                worker.hurry()
                running.append(self._tasks[worker])
        if running:
            await asyncio.wait(running, timeout=CUT_SECONDS)

    async def _kill(self) -> None:
        """Kill the child processes that still run, and wait for them for at most KILL_SECONDS."""
        for child in self._tasks:
            child.kill()
        await asyncio.wait(self._tasks.values(), timeout=KILL_SECONDS)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    @property
    def _worker_tasks(self) -> list[asyncio.Task[None]]:
        return [self._tasks[worker] for worker in self._workers]

    def _on_worker_ready(self) -> None:
        """Send ALL_READY to each worker once all workers have an engine. Until then, each worker reports "not ready"."""
        if not self._all_ready and not self._stop.is_set() and all(worker.ready.is_set() for worker in self._workers):
            self._all_ready = True
            self._log_ready()
        if self._all_ready:
            for worker in self._workers:
                worker.tell(lifeline.ALL_READY)

    def _on_worker_drained(self, worker: Child) -> None:
        """Let `worker` close its admin port. Before the last worker does so while the server stops, new connections end."""
        others = [other for other in self._workers if other is not worker]
        if self._stop.is_set() and all(other.drained or self._tasks[other].done() for other in others):
            drop_new_connections(self._admin)
            self._admin.close()
        worker.tell(lifeline.CLOSE)

    def _log_ready(self) -> None:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        log.info(
            "ready",
            extra={
                "http": f"http://{host}:{self._settings.port}",
                "http_port": self._settings.port,
                "grpc_port": self._settings.grpc_port,
                "admin_port": self._settings.admin_port,
                "model": self._settings.model_name,
            },
        )

    def _worker_child(self, programs: Programs, index: int) -> Child:
        program = programs.worker(index, lambda: any(worker.ready.is_set() for worker in self._workers))
        child = Child(program, self._settings)
        child.on_ready = self._on_worker_ready
        child.on_drained = partial(self._on_worker_drained, child)
        child.on_death = worker_died
        return child


def serve(settings: Settings) -> int:
    """Run the server until a signal stops it or it cannot go on. Returns the exit code."""
    setproctitle.setproctitle("tidegate: supervisor")
    logs.set_up(settings.log_level, settings.log_format, "supervisor")
    try:
        _check_cost_files(settings)
        descriptors.raise_limit(settings.api_workers)
        folder = RunFolder.make()
        try:
            os.environ[FOLDER_VARIABLE] = str(folder.metrics)
            logs.on_dropped(SupervisorDrops().add)
            # The gRPC core of the workers reads this. By default it writes its own lines to standard error for invalid requests.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            asyncio.run(_run(with_model(settings), folder))
        finally:
            folder.remove()
    except ConfigError as error:
        log.error(error.message)
        return EXIT_BAD_SETTINGS
    except Fatal as fatal:
        if fatal.message is not None:
            log.critical(fatal.message)
        return fatal.exit_code
    return 0


def _check_cost_files(settings: Settings) -> None:
    """Raise ConfigError if a file of step costs, or the folder of learnt ones, cannot be used at all.

    The engine would find that only after it has the weights. Whether a file belongs to the device and the model, only the engine
    knows.
    """
    for name in ("cost_file", "fake_cost_file"):
        path = getattr(settings, name)
        if path is not None:
            load_costs(path, setting=name)
    if settings.cost_folder is not None:
        check_folder(settings.cost_folder, "cost_folder")


async def _run(settings: Settings, folder: RunFolder) -> None:
    await Supervisor(settings, folder).run()


def with_model(settings: Settings) -> Settings:
    """Return `settings` with a checkpoint folder. If the settings name none, it is the bundled checkpoint."""
    if settings.model is None:
        log.info(NOTICE)
        return settings.model_copy(update={"model": str(bundled_checkpoint())})
    if not (Path(settings.model) / "config.json").is_file():
        raise ConfigError(f"model is {settings.model!r}: it must be a checkpoint folder, with a config.json in it", param="model")
    return settings
