"""Tests the Inference servicer over real connections, with a scripted service behind it."""

import inspect
import logging
import random

import grpc
import pytest

from engine import errors
from server.errors import STATUS
from server.rpc.errors import DETAIL_KEY
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.service.types import Chunk
from tests.support.rpc import detail_of, serving, until
from tests.unit.server.http.routes.scripted import ScriptedService, letters

ASKED = pb.GenerateRequest(prompt="a", request_id="mine")
RAISED = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.TidegateError)]


async def test_a_stream_has_its_chunks_its_ending_and_its_ids():
    service = ScriptedService(*letters("abc"))
    async with serving(service) as rpc:
        call = rpc.stub.Generate(ASKED)
        responses = [response async for response in call]
        id = dict(await call.initial_metadata())["x-request-id"]
    assert [r.WhichOneof("event") for r in responses] == ["chunk"] * 3 + ["ending"]
    assert "".join(r.chunk.text for r in responses[:3]) == "abc"
    assert [r.chunk.HasField("finish_reason") for r in responses[:3]] == [False, False, True]
    assert {r.id for r in responses} == {id} == {service.requests[0].request_id}
    assert {r.request_id for r in responses} == {"mine"}
    assert (responses[-1].ending.model, responses[-1].ending.usage.completion_tokens) == ("tiny", 3)
    assert service.closed == [id]


def logged(caplog):
    return [record for record in caplog.records if record.name == "tidegate.requests"]


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "ListModels"])
async def test_the_calls_request_id_is_repeated_in_the_initial_metadata(method):
    requests = {"Generate": ASKED, "Tokenize": pb.TokenizeRequest(prompt="a"), "ListModels": pb.ListModelsRequest()}
    async with serving(ScriptedService(*letters("a"))) as rpc:
        for given, begins in (
            ((), ("req-", "gen-")),
            ((("x-request-id", "mine"),), "mine"),
            ((("x-request-id", "a b"),), ("req", "gen")),
        ):
            call = getattr(rpc.stub, method)(requests[method], metadata=given)
            assert dict(await call.initial_metadata())["x-request-id"].startswith(begins)


async def test_a_call_that_fails_has_its_request_id_in_the_trailers():
    async with serving(ScriptedService(errors.Overloaded("full"))) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(ASKED, metadata=(("x-request-id", "mine"),))]
        assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.stub.Tokenize(pb.TokenizeRequest(), metadata=(("x-request-id", "mine"),))
        assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine"


async def test_a_call_is_one_log_line_without_its_text(caplog):
    caplog.set_level(logging.INFO, "tidegate")
    async with serving(ScriptedService(*letters("tide"))) as rpc:
        asked = pb.GenerateRequest(prompt="secret")
        [r async for r in rpc.stub.Generate(asked, metadata=(("x-request-id", "mine"),))]
        await until(lambda: logged(caplog))
    (line,) = logged(caplog)
    assert (line.id, line.route, line.status) == ("mine", "/tidegate.v1.Inference/Generate", "OK")
    assert line.answer.startswith("gen-")
    assert (line.prompt_tokens, line.completion_tokens) == (0, 0)  # the scripted service does not count
    assert line.total_ms >= 0
    assert "secret" not in str(vars(line))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(errors.UnknownModel("x"), "NOT_FOUND", "model_not_found"), (KeyError("x"), "INTERNAL", "internal_error")],
)
async def test_the_log_line_of_a_failed_call_has_its_status_and_code(caplog, error, status, code):
    caplog.set_level(logging.INFO, "tidegate.requests")
    async with serving(ScriptedService(error)) as rpc:
        with pytest.raises(grpc.aio.AioRpcError):
            [r async for r in rpc.stub.Generate(ASKED)]
        await until(lambda: logged(caplog))
    (line,) = logged(caplog)
    assert (line.status, line.code) == (status, code)


async def test_a_cancelled_call_is_logged_as_cancelled_and_the_setting_switches_lines_off(caplog):
    caplog.set_level(logging.INFO, "tidegate.requests")
    for on in (False, True):
        service = ScriptedService(Chunk(index=0, text="a", token_ids=[97]), 3600)
        async with serving(service, log_requests=on) as rpc:
            call = rpc.stub.Generate(ASKED)
            await call.read()
            call.cancel()
            await until(lambda: service.closed)  # noqa: B023 - called before the loop goes on
            await until(lambda: len(logged(caplog)) == on)  # noqa: B023
    assert logged(caplog)[0].status == "CANCELLED"


async def test_a_request_without_an_id_gets_none_back():
    async with serving(ScriptedService(*letters("a"))) as rpc:
        responses = [r async for r in rpc.stub.Generate(pb.GenerateRequest(prompt="a"))]
    assert not any(r.HasField("request_id") for r in responses)


async def test_a_call_without_a_deadline_gives_the_request_none():
    service = ScriptedService(*letters("a"))
    async with serving(service) as rpc:
        [r async for r in rpc.stub.Generate(ASKED)]
    assert service.requests[0].deadline_s is None


@pytest.mark.parametrize("cls", RAISED)
async def test_every_error_has_its_status_and_detail(cls):
    error = cls("what went wrong", param="prompt")
    row = STATUS[cls]
    async with serving(ScriptedService(error)) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(ASKED)]
    assert caught.value.code().name == row.grpc
    detail = detail_of(caught.value)
    assert detail.type == row.type
    if row.http == 500:
        assert "what went wrong" not in caught.value.details()
        assert (detail.code, detail.HasField("param")) == ("internal_error", False)
    else:
        assert caught.value.details() == "what went wrong"
        assert (detail.code, detail.param) == (cls.code, "prompt")
    assert detail.HasField("retry_after") == (row.http in (429, 503))


async def test_a_bug_is_logged_and_not_sent_to_the_client(caplog):
    async with serving(ScriptedService(ZeroDivisionError("secret"))) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(ASKED)]
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.debug_error_string() + caught.value.details()
    assert "secret" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_long_message_still_fits_into_the_trailers():
    error = errors.InvalidRequest("🌊" * 5000, param="🌊" * 5000)
    async with serving(ScriptedService(error)) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(ASKED)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("🌊🌊")
    assert detail_of(caught.value).code == "invalid_value"


async def test_an_error_after_chunks_ends_the_stream():
    async with serving(ScriptedService(Chunk(index=0, text="a", token_ids=[97]), errors.EngineUnavailable("gone"))) as rpc:
        call = rpc.stub.Generate(ASKED)
        assert (await call.read()).chunk.text == "a"
        with pytest.raises(grpc.aio.AioRpcError, match="gone"):
            await call.read()


async def test_a_refusal_reaches_the_client_and_not_the_service():
    service = ScriptedService()
    async with serving(service) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(pb.GenerateRequest(prompt="a", prompt_token_ids=[1]))]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail_of(caught.value).param == "prompt_token_ids"
    assert service.requests == []


async def test_an_unknown_field_is_refused():
    newer = pb.GenerateRequest.FromString(ASKED.SerializeToString() + b"\xf8\x3f\x01")  # adds the unknown field 1023 with value 1
    async with serving(ScriptedService()) as rpc:
        with pytest.raises(grpc.aio.AioRpcError, match="1023") as caught:
            [r async for r in rpc.stub.Generate(newer)]
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert detail_of(caught.value).code == "unsupported_field"


async def test_without_strict_fields_an_unknown_field_is_ignored_and_reported():
    newer = pb.GenerateRequest.FromString(ASKED.SerializeToString() + b"\xf8\x3f\x01" * 3)
    async with serving(ScriptedService(*letters("a")), strict_fields=False) as rpc:
        call = rpc.stub.Generate(newer)
        assert dict(await call.initial_metadata())["x-tidegate-ignored-fields"] == "field 1023"
        assert len([r async for r in call]) == 2


BROKEN = {
    "not UTF-8": b"\x0a\x02\xff\xfe",
    "cut short": b"\x0a\x7fabc",
    "random": random.Random(1).randbytes(1000),
    "groups without an end": b"\x0b" * 100_000,
    "wrong wire type": b"\x0f",
}


def warnings_of(caplog):
    """Return the log messages of the server and of grpc. Messages of the logger `asyncio` are left out, since grpc's poller may
    log there about the event loop of an earlier test."""
    return [record.getMessage() for record in caplog.records if record.name.startswith(("server", "grpc"))]


@pytest.mark.parametrize("message", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    "method", ["tidegate.v1.Inference/Generate", "tidegate.v1.Inference/Abort", "grpc.health.v1.Health/Check"]
)
async def test_a_message_that_cannot_be_decoded_is_the_clients_error(caplog, method, message):
    async with serving(ScriptedService(*letters("a"))) as rpc:
        call = rpc.channel.unary_stream(f"/{method}")(message)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "cannot be read as a " in await call.details()
        detail = dict(await call.trailing_metadata())[DETAIL_KEY]
    assert pb.ErrorDetail.FromString(detail).code == "malformed_request"
    assert warnings_of(caplog) == []


async def test_a_reflection_message_that_cannot_be_decoded_ends_the_call(caplog):
    async with serving(ScriptedService()) as rpc:
        info = rpc.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        call = info(iter([BROKEN["cut short"]]))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "cannot be read as a " in await call.details()
    assert warnings_of(caplog) == []


async def test_random_messages_are_never_answered_as_bugs(caplog):
    rng = random.Random(2)
    codes = set()
    async with serving(ScriptedService(*letters("a") * 200)) as rpc:
        generate = rpc.channel.unary_stream("/tidegate.v1.Inference/Generate")
        for _ in range(200):
            call = generate(rng.randbytes(rng.randrange(40)))
            codes.add(await call.code())
    assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}
    assert warnings_of(caplog) == []


async def test_cancelling_closes_the_service_stream_at_once():
    service = ScriptedService(Chunk(index=0, text="a", token_ids=[97]), 3600)
    async with serving(service) as rpc:
        call = rpc.stub.Generate(ASKED)
        await call.read()
        call.cancel()
        await until(lambda: service.closed)


async def test_a_vanished_client_closes_the_service_stream():
    service = ScriptedService(Chunk(index=0, text="a", token_ids=[97]), 3600)
    async with serving(service) as rpc:
        call = rpc.stub.Generate(ASKED)
        await call.read()
        await rpc.channel.close()
        await until(lambda: service.closed)


async def test_the_deadline_of_the_call_becomes_that_of_the_request():
    service = ScriptedService(3600)
    async with serving(service) as rpc:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [r async for r in rpc.stub.Generate(ASKED, timeout=0.3)]
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: service.closed)
    assert 0 < service.requests[0].deadline_s < 0.4  # the remaining part of 0.3 s, which gRPC rounds up


async def test_a_client_that_reads_nothing_is_ended(caplog):
    flood = [Chunk(index=0, text="x" * 100_000, token_ids=[]) for _ in range(2000)]
    service = ScriptedService(*flood)
    async with serving(service, send_timeout_s=0.2) as rpc:
        call = rpc.stub.Generate(ASKED)
        await call.read()
        await until(lambda: service.closed)
        call.cancel()
    assert "Traceback" not in caplog.text


async def test_tokenize_and_detokenize():
    async with serving(ScriptedService()) as rpc:
        made = await rpc.stub.Tokenize(pb.TokenizeRequest(prompt="ab"))
        assert (list(made.tokens), made.count, made.max_model_len) == ([0, 97, 98], 3, 100)
        bare = await rpc.stub.Tokenize(pb.TokenizeRequest(prompt="", add_special_tokens=False))
        assert (list(bare.tokens), bare.count) == ([], 0)
        assert (await rpc.stub.Detokenize(pb.DetokenizeRequest(tokens=[97, 98]))).prompt == "ab"


@pytest.mark.parametrize(
    ("method", "request_", "param"),
    [("Tokenize", pb.TokenizeRequest(), "prompt"), ("Detokenize", pb.DetokenizeRequest(), "tokens")],
)
async def test_tokenize_and_detokenize_refuse_a_missing_field(method, request_, param):
    async with serving(ScriptedService()) as rpc:
        with pytest.raises(grpc.aio.AioRpcError, match=f"{param} is required") as caught:
            await getattr(rpc.stub, method)(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail_of(caught.value).param == param
