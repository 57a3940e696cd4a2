"""An API worker: one EngineClient, one GenerateService, and HTTP and gRPC on top of it. `python -m server.supervise.worker`.

SIGTERM   not ready, no new connections or calls; what runs may finish
deadline  what still runs ends with EngineUnavailable (a second SIGTERM is a deadline now)
exit      0; 2 for a setting or checkpoint that is wrong
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import msgspec
import setproctitle
import uvicorn
import uvloop

from engine import lifeline, logs
from engine.errors import CheckpointError, ConfigError
from engine.process import EXIT_BAD_SETTINGS
from server.engines.client import EngineClient
from server.http.app import build_app
from server.http.guard import HttpLimits, guarded
from server.metrics.registry import Metrics
from server.rpc.server import RpcServer, build_rpc_server
from server.service.service import GenerateService
from server.settings import Settings
from server.supervise.worker_start import WorkerStart
from server.text.tokenizer import Tokenizer

log = logging.getLogger("tidegate.worker")

CUT_SHARE = 0.9  # of drain_timeout_s, after which streams are cut short: the rest is for their last words to arrive
BACKLOG = 2048
# Python's own, (700, 10, 10), walks the heap several times over while a body of a million small lists is read.
GC_THRESHOLD = (50_000, 20, 100)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the worker has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Worker:
    def __init__(self, start: WorkerStart) -> None:
        self._settings = settings = Settings.model_validate_json(start.settings)
        self._client = EngineClient(
            start.endpoint,
            f"api {start.index}",
            stall_timeout_s=settings.stall_timeout_s,
            resume_timeout_s=settings.resume_timeout_s,
            max_deaths=settings.max_deaths,
            max_queue=settings.max_queue,
        )
        self._socket = socket.socket(fileno=start.http_fd)
        self._draining = asyncio.Event()
        self._deadline = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM, then drain."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        text = Tokenizer.from_folder(self._settings.model or "")
        metrics = Metrics(self._settings.model_name, lambda: self._client.health)
        logs.on_dropped(metrics.log_lines_dropped)
        service = GenerateService(self._client, text, self._settings, metrics)
        http = HttpServer(self._http_config(service, metrics))
        rpc = build_rpc_server(service, self._settings, metrics)
        await self._client.start()
        await rpc.start()
        serving = asyncio.create_task(http.serve(sockets=[self._socket]))
        telling = asyncio.create_task(self._tell_ready())
        await asyncio.wait({serving, asyncio.create_task(self._draining.wait())}, return_when=asyncio.FIRST_COMPLETED)
        telling.cancel()
        await self._drain(http, rpc, serving)
        metrics.tally.flush()
        if serving.done():
            serving.result()  # a bug ends the process with its traceback

    def _on_signal(self) -> None:
        if self._draining.is_set():
            self._deadline.set()
        self._draining.set()

    def _http_config(self, service: GenerateService, metrics: Metrics) -> uvicorn.Config:
        return uvicorn.Config(
            build_app(self._settings, service, metrics),
            http=guarded(HttpLimits.from_settings(self._settings), metrics.http_refused),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
        )

    async def _tell_ready(self) -> None:
        """One line on standard output, once tokens can be made."""
        await self._client.wait_ready()
        lifeline.tell(lifeline.READY)

    async def _drain(self, http: HttpServer, rpc: RpcServer, serving: asyncio.Task[None]) -> None:
        log.info("draining", extra={"streams": self._client.num_streams})
        self._client.drain()
        http.should_exit = True
        cut_after = self._settings.drain_timeout_s * CUT_SHARE
        last_words = max(self._settings.drain_timeout_s - cut_after, 1.0) / 2
        stopping = asyncio.create_task(rpc.stop(cut_after + last_words))
        rest: set[asyncio.Task[None]] = {serving, stopping}
        deadline = asyncio.create_task(self._deadline.wait())
        until = asyncio.get_running_loop().time() + cut_after
        while rest and not deadline.done() and (left := until - asyncio.get_running_loop().time()) > 0:
            done, _ = await asyncio.wait({*rest, deadline}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            rest -= done
        if rest:
            log.warning("the time to drain is over", extra={"streams": self._client.num_streams})
        await self._client.close()
        if rest:
            await asyncio.wait(rest, timeout=last_words)
            http.force_exit = True
        deadline.cancel()


def main() -> None:
    start = msgspec.json.decode(lifeline.read_start(), type=WorkerStart)
    settings = Settings.model_validate_json(start.settings)
    name = f"api {start.index}"
    setproctitle.setproctitle(f"tidegate: {name}")
    logs.set_up(settings.log_level, settings.log_format, name)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    gc.set_threshold(*GC_THRESHOLD)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(start))
    except (ConfigError, CheckpointError) as error:
        log.error(error.message)
        sys.exit(EXIT_BAD_SETTINGS)


async def _serve(start: WorkerStart) -> None:
    await Worker(start).run()


if __name__ == "__main__":
    main()
