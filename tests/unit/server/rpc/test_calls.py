"""Tests gRPC calls that send no message, and more calls and connections than a worker accepts."""

import asyncio
import re

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.service.connections import ConnectionLimits
from tests.support.rpc import detail_of, serving
from tests.unit.server.http.routes.scripted import ScriptedService, letters

METHODS = [
    "tidegate.v1.Inference/Generate",
    "tidegate.v1.Inference/Tokenize",
    "tidegate.v1.Inference/ListModels",
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


def open_call(channel, method):
    """Start a call of `method` that has sent no message yet."""
    return channel.stream_stream(f"/{method}")()


async def status_of(call):
    """Read from a call that must end with an error, and return the error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value


def refused(rpc, reason):
    found = re.search(rf'tidegate_grpc_calls_refused_total{{reason="{reason}"}} (\S+)', rpc.metrics.render()[0].decode())
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_sends_no_message_is_ended_counted_and_logged(method, caplog):
    async with asyncio.timeout(20), serving(ScriptedService(), body_timeout_s=0.2) as rpc:
        error = await status_of(open_call(rpc.channel, method))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert detail_of(error).code == "request_timeout"
        assert refused(rpc, "no_message") == 1
    assert "body_timeout_s" in caplog.text


@pytest.mark.parametrize("method", METHODS[:5])
async def test_a_call_that_ends_without_a_message_is_refused(method):
    async with asyncio.timeout(20), serving(ScriptedService()) as rpc:
        call = open_call(rpc.channel, method)
        await call.done_writing()
        error = await status_of(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert detail_of(error).code == "malformed_request"


async def test_no_silent_call_stays():
    async with asyncio.timeout(60), serving(ScriptedService(*letters("ab")), body_timeout_s=0.5) as rpc:
        calls = [open_call(rpc.channel, METHODS[i % len(METHODS)]) for i in range(500)]
        assert {(await status_of(call)).code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert refused(rpc, "no_message") == 500
        assert len([r async for r in rpc.stub.Generate(pb.GenerateRequest(prompt="a"))]) == 3


async def test_a_reflection_stream_that_falls_silent_is_ended():
    async with asyncio.timeout(20), serving(ScriptedService(), idle_timeout_s=0.2) as rpc:
        call = reflection_pb2_grpc.ServerReflectionStub(rpc.channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await call.read()).list_services_response.service
        assert (await status_of(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_long_answer_outlasts_the_time_for_a_message():
    service = ScriptedService(1.0, *letters("ab"))
    async with asyncio.timeout(20), serving(service, body_timeout_s=0.1) as rpc:
        assert len([r async for r in rpc.stub.Generate(pb.GenerateRequest(prompt="a"))]) == 3


@pytest.mark.parametrize("method", METHODS)
async def test_calls_past_the_limit_are_refused_and_the_others_go_on(method, caplog):
    async with asyncio.timeout(20), serving(ScriptedService(), max_grpc_calls=3, body_timeout_s=60) as rpc:
        watch = health_pb2_grpc.HealthStub(rpc.channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        silent = [open_call(rpc.channel, METHODS[0]) for _ in range(2)]
        await asyncio.gather(*(call.wait_for_connection() for call in silent))
        error = await until_refused(rpc, method)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (detail_of(error).code, detail_of(error).retry_after) == ("overloaded", 1)
        assert refused(rpc, "too_many") >= 1
        assert "max_grpc_calls" in caplog.text
        silent[0].cancel()
        await until_admitted(rpc)
        rpc.server.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def until_refused(rpc, method):
    """Call `method` until a call is refused for too many calls, and return that error. Earlier calls may reach the server late,
    so the first calls may be accepted."""
    while True:
        call = open_call(rpc.channel, method)
        await call.done_writing()
        error = await status_of(call) if "Reflection" not in method else await reflection_status(call)
        if error is not None and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error


async def reflection_status(call):
    """Return the error that ended a reflection stream, or None. The server ends a stream without messages without an error if it
    accepted the stream."""
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def until_admitted(rpc):
    """Repeat a call until the server accepts it, which happens once the server has noticed that other calls ended."""
    while True:
        call = rpc.stub.ListModels(pb.ListModelsRequest())
        code = await call.code()
        if code is grpc.StatusCode.OK:
            return
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_clients_that_leave_silent_calls_free_their_places():
    async with asyncio.timeout(20), serving(ScriptedService(), max_grpc_calls=2, body_timeout_s=60) as rpc:
        for _ in range(3):
            calls = [open_call(rpc.channel, method) for method in METHODS]
            for call in calls:
                call.cancel()
            await until_admitted(rpc)


async def test_connections_past_the_limit_are_closed_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr("server.rpc.server.connection_limits", lambda settings: ConnectionLimits(http=4, grpc=4))
    async with asyncio.timeout(20), serving(ScriptedService()) as rpc:
        await rpc.stub.ListModels(pb.ListModelsRequest())
        connections = [await asyncio.open_connection("127.0.0.1", rpc.server.port) for _ in range(10)]
        # The server either sends its HTTP/2 settings first, or closes the connection, which reads as b"".
        first_bytes = [await reader.read(1) for reader, _ in connections]
        assert first_bytes.count(b"") == 7
        for _, writer in connections:
            writer.close()
        await rpc.stub.ListModels(pb.ListModelsRequest())
