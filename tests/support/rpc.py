"""A real gRPC server on a free port and a client, both in the event loop of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

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


@asynccontextmanager
async def serving(service: Any, **settings: Any) -> AsyncIterator[Rpc]:
    server = build_rpc_server(service, Settings(host="127.0.0.1", grpc_port=0, **settings))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Rpc(server, channel, pb_grpc.InferenceStub(channel))
    finally:
        await server.stop()


def detail_of(error: grpc.aio.AioRpcError) -> pb.ErrorDetail:
    return pb.ErrorDetail.FromString(dict(error.trailing_metadata())[DETAIL_KEY])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.005)
