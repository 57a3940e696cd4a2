"""Runs the HTTP application in a real uvicorn, with the real service and a LocalEngine, all in the event loop of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass

import httpx
import openai
import uvicorn

from engine.models.generation import GenerationDefaults
from server.http.app import build_app
from server.http.guard import guarded
from server.http.limits import HttpLimits
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.support import plain_http
from tests.support.local_engine import LocalEngine

MODEL = "tiny"


class _Server(uvicorn.Server):
    """A uvicorn server that installs no signal handlers, so that those of pytest stay."""

    def capture_signals(self):
        return contextlib.nullcontext()


@dataclass
class HttpApi:
    """Holds a running HTTP server, its engine and service, and two clients of the server."""

    port: int
    engine: LocalEngine
    service: GenerateService
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def quiet(self, seconds=3.0):
        """Wait until neither the engine nor the service has a request."""
        async with asyncio.timeout(seconds):
            while not self.engine.idle or self.service.num_running:  # noqa: ASYNC110 - no event covers both
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def http_api(
    text: Tokenizer,
    *,
    engine: LocalEngine | None = None,
    limits: HttpLimits | None = None,
    defaults: GenerationDefaults | None = None,
    **settings,
):
    settings = Settings(served_model_name=MODEL, **settings)
    engine = engine or LocalEngine()
    async with engine:
        metrics = Metrics(MODEL, lambda: engine.health)
        service = GenerateService(engine, text, settings, metrics, defaults=defaults)
        app = build_app(settings, service, metrics)
        listener = socket.create_server(("127.0.0.1", 0))
        protocol = guarded(limits or HttpLimits.from_settings(settings), metrics.http_refused)
        config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", access_log=False, log_level="critical")
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        try:
            async with (
                plain_http.AsyncClient(base_url=base, trust_env=False) as http,
                openai.AsyncOpenAI(
                    base_url=f"{base}/v1",
                    api_key="none",
                    max_retries=0,
                    http_client=plain_http.AsyncClient(trust_env=False),
                ) as client,
            ):
                yield HttpApi(port, engine, service, http, client)
        finally:
            server.should_exit = server.force_exit = True
            await serving
            listener.close()
