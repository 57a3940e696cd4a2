"""Implements the service grpc.health.v1. It answers SERVING while the service is ready and the server does not drain.

The servicer of the grpc_health package is not used, for two reasons. The server would have to report each change to that
servicer, and the Watch streams of that servicer never end, so a graceful stop would wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.rpc.errors import Context, answers_errors

WATCH_SECONDS = 0.25
SERVING: int = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: int = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Answers health checks. It calls `is_ready` for each Check, and every WATCH_SECONDS for each Watch. The known services are
    "" (the whole server) and the names in `services`."""

    def __init__(self, is_ready: Callable[[], bool], services: tuple[str, ...]) -> None:
        self._is_ready = is_ready
        self._services = frozenset({"", *services})
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Answer NOT_SERVING from now on. Every Watch stream sends NOT_SERVING and ends."""
        self._draining.set()

    @answers_errors(health_pb2.HealthCheckRequest, closed=False)
    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service[:256]!r}")
        return health_pb2.HealthCheckResponse(status=status)

    @answers_errors(health_pb2.HealthCheckRequest, closed=False)
    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        sent = None
        while True:
            last = self._draining.is_set()
            status = self._status(request.service)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if last:
                return
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._draining.wait()
            except TimeoutError:
                continue

    @answers_errors(health_pb2.HealthListRequest, closed=False)
    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    def _status(self, service: str) -> int:
        if service not in self._services:
            return SERVICE_UNKNOWN
        return NOT_SERVING if self._draining.is_set() or not self._is_ready() else SERVING
