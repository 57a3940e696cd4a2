"""An API worker: one EngineClient, one GenerateService, and HTTP and gRPC on top of it. `python -m server.supervise.worker`.

SIGTERM   the worker reports that it is not ready, and accepts no new connections or calls; running requests may finish
drained   the admin port closes when the supervisor knows, since the last worker to close it must reset nobody
deadline  running requests end with EngineUnavailable; a second SIGTERM, or SIGINT, brings the deadline forward to now
exit      code 0, or code 2 if a setting or the checkpoint is wrong
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

import msgspec
import setproctitle
import uvicorn
import uvloop
from fastapi import FastAPI

from engine import lifeline, logs
from engine.errors import EXIT_BAD_SETTINGS, CheckpointError, ConfigError
from engine.models.generation import GenerationDefaults, read_generation_defaults
from server.engines.client import EngineClient
from server.http.admin import build_admin_app
from server.http.app import build_app
from server.http.guard import guarded
from server.http.limits import HttpLimits
from server.metrics.registry import Metrics
from server.rpc.server import RpcServer, build_rpc_server
from server.service.connections import ADMIN_CONNECTIONS
from server.service.service import GenerateService
from server.settings import Settings
from server.supervise.http_server import HttpServer
from server.supervise.listening import accept_rest, copies_of_listeners, drop_new_connections
from server.supervise.model_report import report_model
from server.supervise.worker_start import WorkerStart
from server.text.tokenizer import Tokenizer

log = logging.getLogger("tidegate.worker")

CUT_SHARE = 0.9  # share of drain_timeout_s after which streams end with an error; in the rest the error reaches the clients
IDLE_SECONDS = 1.0  # after SIGTERM, requests on idle HTTP connections are answered for this time
ADMIN_IDLE_SECONDS = 0.2
ADMIN_STOP_SECONDS = 1.0  # time to send the last answers of the admin port when the worker ends
BACKLOG = 2048
REPORT_SHARE = 0.1  # time between two progress reports, as a share of the time after which a silent worker is killed
# Python's default, (700, 10, 10), walks the heap several times while a body of a million small lists is parsed.
GC_THRESHOLD = (50_000, 20, 100)
SWITCH_SECONDS = 0.001  # longest wait of the event loop for a thread that runs Python code, such as one that parses a large body


class Worker:
    """Runs one API worker of a server.

    `all_ready` is set once every worker of that server has an engine, and `may_close` when the supervisor answers DRAINED.
    """

    def __init__(self, start: WorkerStart, settings: Settings, all_ready: asyncio.Event, may_close: asyncio.Event) -> None:
        self._settings = settings
        self._listen_at_once = start.listen_at_once
        self._reports = start.index == 0  # one worker writes to the log what concerns all of them
        self._all_ready = all_ready
        self._may_close = may_close
        self._opened = asyncio.Event()  # the ports listen
        self._client = EngineClient(
            [start.endpoint],
            f"api {start.index}",
            stall_timeout_s=settings.stall_timeout_s,
            resume_timeout_s=settings.resume_timeout_s,
            max_deaths=settings.max_deaths,
            max_queue=settings.max_queue,
            max_queue_tokens=settings.max_queue_tokens,
        )
        self._socket = socket.socket(fileno=start.http_fd)
        self._admin_socket = socket.socket(fileno=start.admin_fd)
        self._draining = asyncio.Event()
        self._deadline = asyncio.Event()

    async def run(self) -> None:
        """Connect to the engine, open the ports, serve until SIGTERM, and then drain."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        text = Tokenizer.from_folder(self._settings.model or "")
        for problem in text.chat.problems if self._reports else ():
            log.warning("chat is not available, or not with every template", extra={"reason": problem})
        defaults = GenerationDefaults()
        if self._settings.generation_config == "auto":
            defaults = read_generation_defaults(self._settings.model or "")
        metrics = Metrics(self._settings.model_name, lambda: self._client.health)
        logs.on_dropped(metrics.log_lines_dropped)
        service = GenerateService(
            self._client, text, self._settings, metrics, defaults=defaults, server_ready=self._all_ready.is_set
        )
        await self._client.start()
        helpers = [asyncio.create_task(self._report_ready(text, defaults)), asyncio.create_task(self._report_progress(metrics))]
        try:
            if await self._may_listen():
                await self._serve(service, metrics)
            else:
                await self._client.close()
        finally:
            for helper in helpers:
                helper.cancel()

    async def _may_listen(self) -> bool:
        """Wait until this worker may open its ports. Returns False if SIGTERM comes first.

        A worker that replaces a dead one waits for its engine, so that none of its clients is told that the server is not ready
        while the other workers are. If there is no other worker that serves, the ports open at once: /health/live must answer.
        """
        if not self._listen_at_once:
            await _first_of(self._all_ready.wait(), self._draining.wait())
        return not self._draining.is_set()

    async def _serve(self, service: GenerateService, metrics: Metrics) -> None:
        """Open the ports and serve until SIGTERM, then drain."""
        limits = HttpLimits.from_settings(self._settings)
        admin_limits = msgspec.structs.replace(limits, max_connections=ADMIN_CONNECTIONS)
        http = HttpServer(_http_config(build_app(self._settings, service, metrics), limits, metrics), idle_seconds=IDLE_SECONDS)
        admin_app = build_admin_app(self._settings, service, metrics)
        admin = HttpServer(_http_config(admin_app, admin_limits, metrics), idle_seconds=ADMIN_IDLE_SECONDS)
        rpc = build_rpc_server(service, self._settings, metrics)
        await rpc.start()
        serving = asyncio.create_task(http.serve(sockets=[self._socket]))
        admin_serving = asyncio.create_task(admin.serve(sockets=[self._admin_socket]))
        await _first_of(_all_set(http.opened, admin.opened), serving, admin_serving)
        self._opened.set()
        await _first_of(serving, admin_serving, self._draining.wait())
        await self._drain(http, rpc, serving)
        metrics.tally.flush()
        await self._stop_admin(admin, admin_serving)
        for task in (serving, admin_serving):
            if task.done():
                task.result()  # a bug ends the process with its traceback

    def _on_signal(self) -> None:
        if self._draining.is_set():
            self._deadline.set()
        self._draining.set()

    async def _report_ready(self, text: Tokenizer, defaults: GenerationDefaults) -> None:
        """Tell the supervisor once that this worker has an engine and that its ports are open.

        The ports of a worker that replaces another open only after that.
        """
        await self._client.wait_ready()
        if self._listen_at_once:
            await self._opened.wait()
        if self._reports:
            report_model(text, defaults, self._client.info.limits.eos_token_ids)
        lifeline.tell(lifeline.READY)

    async def _report_progress(self, metrics: Metrics) -> None:
        """Report to the supervisor repeatedly that the event loop runs, and once that a request was answered."""
        served = False
        while True:
            lifeline.tell(lifeline.ALIVE)
            if not served and metrics.num_finished:
                served = True
                lifeline.tell(lifeline.SERVED)
            await asyncio.sleep(min(1.0, self._settings.worker_stall_timeout_s * REPORT_SHARE))

    async def _stop_admin(self, admin: HttpServer, serving: asyncio.Task[None]) -> None:
        lifeline.tell(lifeline.DRAINED)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._may_close.wait(), ADMIN_STOP_SECONDS)
        admin.should_exit = True
        await asyncio.wait({serving}, timeout=ADMIN_STOP_SECONDS)

    async def _drain(self, http: HttpServer, rpc: RpcServer, serving: asyncio.Task[None]) -> None:
        log.info("draining", extra={"streams": self._client.num_streams})
        self._client.drain()
        http.should_exit = True
        cut_after = self._settings.drain_timeout_s * CUT_SHARE
        for_errors = max(self._settings.drain_timeout_s - cut_after, 1.0) / 2
        stopping = asyncio.create_task(_stop_rpc(rpc, cut_after + for_errors))
        rest: set[asyncio.Task[None]] = {serving, stopping}
        deadline = asyncio.create_task(self._deadline.wait())
        until = asyncio.get_running_loop().time() + cut_after
        while rest and not deadline.done() and (left := until - asyncio.get_running_loop().time()) > 0:
            done, _ = await asyncio.wait({*rest, deadline}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            rest -= done
        if rest:
            log.warning("the time to drain is over: streams end with an error", extra={"streams": self._client.num_streams})
        await self._client.close()
        if rest:
            await asyncio.wait(rest, timeout=for_errors)
            http.force_exit = True
        deadline.cancel()


async def _stop_rpc(rpc: RpcServer, grace: float) -> None:
    """Refuse new calls, and after `grace` seconds cancel those that still run. Clients that have connected are not reset."""
    rpc.drain()
    with copies_of_listeners(rpc.port) as listeners:
        for listener in listeners:
            drop_new_connections(listener)
        for listener in listeners:
            await accept_rest(listener)
    await rpc.stop(grace)


def _http_config(app: FastAPI, limits: HttpLimits, metrics: Metrics) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=guarded(limits, metrics.http_refused),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
    )


async def _all_set(*events: asyncio.Event) -> None:
    for event in events:
        await event.wait()


async def _first_of(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of `awaitables` is done. The coroutines among them are then cancelled; the tasks continue."""
    tasks = [each if isinstance(each, asyncio.Task) else asyncio.create_task(each) for each in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task not in awaitables:
            task.cancel()


def main() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loop, all_ready, may_close = runner.get_loop(), asyncio.Event(), asyncio.Event()
        words = {lifeline.ALL_READY: all_ready, lifeline.CLOSE: may_close}
        line = lifeline.read_start({word: partial(loop.call_soon_threadsafe, event.set) for word, event in words.items()})
        start = msgspec.json.decode(line, type=WorkerStart)
        settings = Settings.model_validate_json(start.settings)
        name = f"api {start.index}"
        setproctitle.setproctitle(f"tidegate: {name}")
        logs.set_up(settings.log_level, settings.log_format, name)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        gc.set_threshold(*GC_THRESHOLD)
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            runner.run(_run(start, settings, all_ready, may_close))
        except (ConfigError, CheckpointError) as error:
            log.error(error.message)
            sys.exit(EXIT_BAD_SETTINGS)


async def _run(start: WorkerStart, settings: Settings, all_ready: asyncio.Event, may_close: asyncio.Event) -> None:
    await Worker(start, settings, all_ready, may_close).run()


if __name__ == "__main__":
    main()
