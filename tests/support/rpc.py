"""Runs a real gRPC server on a free port and a client for it, both in the test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from server.engines.base import EngineHealth
from server.metrics.registry import Metrics
from server.rpc.errors import DETAIL_KEY
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc
from server.rpc.server import RpcServer, build_rpc_server
from server.settings import Settings


@dataclass
class Rpc:
    server: RpcServer
    channel: grpc.aio.Channel
    stub: Any
    metrics: Metrics


@asynccontextmanager
async def serving(service: Any, **settings: Any) -> AsyncIterator[Rpc]:
    metrics = Metrics("tiny", lambda: EngineHealth(ready=True))
    server = build_rpc_server(service, Settings(host="127.0.0.1", grpc_port=0, **settings), metrics)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Rpc(server, channel, pb_grpc.InferenceStub(channel), metrics)
    finally:
        await server.stop()


def detail_of(error: grpc.aio.AioRpcError) -> pb.ErrorDetail:
    return pb.ErrorDetail.FromString(dict(error.trailing_metadata())[DETAIL_KEY])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - no event marks the condition
            await asyncio.sleep(0.005)
