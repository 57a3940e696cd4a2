"""Tests the gRPC server's health and reflection services, its limits, and how it binds its port."""

import asyncio
import socket

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.errors import ConfigError
from server.engines.base import EngineHealth
from server.metrics.registry import Metrics
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc
from server.rpc.server import build_rpc_server
from server.settings import Settings
from tests.support.rpc import serving, until
from tests.unit.server.http.routes.scripted import ScriptedService, letters

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
NAMES = ["", "tidegate.v1.Inference"]
DOWN = EngineHealth(ready=False, reason="it died")
UP = EngineHealth(ready=True)


def build_server(service, settings):
    return build_rpc_server(service, settings, Metrics("tiny", lambda: UP))


def asking(service):
    return health_pb2.HealthCheckRequest(service=service)


@pytest.mark.parametrize("name", NAMES)
async def test_check_answers_by_the_services_health_and_the_drain(name):
    service = ScriptedService()
    async with serving(service) as rpc:
        health = health_pb2_grpc.HealthStub(rpc.channel)
        assert (await health.Check(asking(name))).status == SERVING
        service.engine_health = DOWN
        assert (await health.Check(asking(name))).status == NOT_SERVING
        service.engine_health = UP
        assert (await health.Check(asking(name))).status == SERVING
        rpc.server.drain()
        assert (await health.Check(asking(name))).status == NOT_SERVING


async def test_check_of_an_unknown_service_is_not_found():
    async with serving(ScriptedService()) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(rpc.channel).Check(asking("other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_list_has_all_services():
    async with serving(ScriptedService()) as rpc:
        listed = await health_pb2_grpc.HealthStub(rpc.channel).List(health_pb2.HealthListRequest())
    assert {name: answer.status for name, answer in listed.statuses.items()} == dict.fromkeys(NAMES, SERVING)


async def test_watch_reports_each_change_and_ends_at_the_drain():
    service = ScriptedService(ready=False)
    async with asyncio.timeout(5), serving(service) as rpc:
        watch = health_pb2_grpc.HealthStub(rpc.channel).Watch(asking(""))
        assert (await watch.read()).status == NOT_SERVING
        service.engine_health = UP
        assert (await watch.read()).status == SERVING
        rpc.server.drain()
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_watch_of_an_unknown_service_reports_it_as_unknown():
    async with asyncio.timeout(5), serving(ScriptedService()) as rpc:
        watch = health_pb2_grpc.HealthStub(rpc.channel).Watch(asking("other"))
        assert (await watch.read()).status == UNKNOWN
        watch.cancel()


async def test_stop_lets_a_running_call_finish():
    async with asyncio.timeout(5), serving(ScriptedService(0.3, *letters("ab"))) as rpc:
        call = rpc.stub.Generate(pb.GenerateRequest(prompt="a"))
        watch = health_pb2_grpc.HealthStub(rpc.channel).Watch(asking(""))
        await watch.read()
        stopping = asyncio.create_task(rpc.server.stop(grace=60))
        assert len([r async for r in call]) == 3
        await stopping  # stop() must not wait for the open Watch stream


async def test_stop_cancels_calls_after_the_grace():
    service = ScriptedService(3600)
    async with asyncio.timeout(5), serving(service) as rpc:
        call = rpc.stub.Generate(pb.GenerateRequest(prompt="a"))
        await call.initial_metadata()
        await rpc.server.stop(grace=0.1)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        await until(lambda: service.closed)


async def reflect(channel, **asked):
    async def requests():
        yield reflection_pb2.ServerReflectionRequest(**asked)

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return await stub.ServerReflectionInfo(requests()).read()


async def test_reflection_lists_and_describes_the_service():
    async with serving(ScriptedService()) as rpc:
        listed = await reflect(rpc.channel, list_services="")
        described = await reflect(rpc.channel, file_containing_symbol="tidegate.v1.Inference")
    names = {service.name for service in listed.list_services_response.service}
    assert names == {"tidegate.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert [m.name for m in file.service[0].method] == ["Generate", "Tokenize", "Detokenize", "ListModels", "Abort"]


async def test_a_message_over_the_limit_is_refused():
    service = ScriptedService(*letters("a"))
    async with serving(service, max_body_bytes=2048) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(pb.GenerateRequest(prompt="x" * 4096))]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert service.requests == []
        assert len([r async for r in rpc.stub.Generate(pb.GenerateRequest(prompt="x" * 1024))]) == 2


async def test_a_compressed_message_is_refused():
    async with serving(ScriptedService()) as rpc:
        address = f"127.0.0.1:{rpc.server.port}"
        async with grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.InferenceStub(channel).Tokenize(pb.TokenizeRequest(prompt="x" * 100_000))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_over_the_limit_is_refused():
    async with serving(ScriptedService(), max_header_bytes=2048) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.stub.ListModels(pb.ListModelsRequest(), metadata=(("x", "y" * 8192),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await rpc.stub.ListModels(pb.ListModelsRequest())


async def test_a_port_in_use_is_refused_by_the_settings_name():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="grpc_port") as caught:
            build_server(ScriptedService(), Settings(host="127.0.0.1", grpc_port=other.getsockname()[1]))
    assert caught.value.param == "grpc_port"


async def test_two_servers_share_a_port_only_where_workers_do():
    first = build_server(ScriptedService(), Settings(host="127.0.0.1", grpc_port=0, api_workers=2))
    shared = Settings(host="127.0.0.1", grpc_port=first.port, api_workers=2)
    second = build_server(ScriptedService(), shared)
    assert second.port == first.port
    await first.stop()
    await second.stop()
    alone = build_server(ScriptedService(), Settings(host="127.0.0.1", grpc_port=0))
    with pytest.raises(ConfigError):
        build_server(ScriptedService(), Settings(host="127.0.0.1", grpc_port=alone.port))
    await alone.stop()


async def test_an_ipv6_address_can_be_bound():
    server = build_server(ScriptedService(), Settings(host="::1", grpc_port=0))
    assert server.port > 0
    await server.stop()
