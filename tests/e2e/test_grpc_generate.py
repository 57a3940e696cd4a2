"""Tests generation over gRPC with the real service, scheduler and cache. Only the model is a fake."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.request import SamplingParams
from server.metrics.registry import Metrics
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.service.service import GenerateService
from server.service.types import Chunk, GenerationRequest
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.support.local_engine import LIMITS, LocalEngine
from tests.support.rpc import detail_of, serving, until
from tests.support.tiny_checkpoint import write_tiny_checkpoint

PROMPT = "The tide comes in"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Tokenizer.from_folder(write_tiny_checkpoint(tmp_path_factory.mktemp("cache")))


@pytest.fixture
async def up(text):
    """Yield a running engine, service and gRPC server, with a client's stub and channel."""
    async with LocalEngine() as engine:
        metrics = Metrics("tiny", lambda: engine.health)
        service = GenerateService(engine, text, Settings(), metrics)
        async with serving(service) as rpc:
            yield SimpleNamespace(engine=engine, service=service, stub=rpc.stub, channel=rpc.channel, server=rpc.server)


async def collect(call):
    """Read a stream to its end. Returns ({index: text, tokens, last chunk and log-probabilities of the output}, ending)."""
    outputs, ending = {}, None
    async for response in call:
        assert ending is None, "nothing comes after the ending"
        if response.WhichOneof("event") == "ending":
            ending = response.ending
            continue
        chunk = response.chunk
        output = outputs.setdefault(chunk.index, SimpleNamespace(text="", tokens=[], last=None, logprobs=[], prompt_logprobs=[]))
        assert output.last is None, "nothing comes after an output's last chunk"
        output.text += chunk.text
        output.tokens += chunk.token_ids
        output.logprobs += chunk.logprobs
        output.prompt_logprobs += chunk.prompt_logprobs
        if chunk.HasField("finish_reason"):
            output.last = chunk
    return outputs, ending


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return caught.value


def greedy(**fields):
    return pb.GenerateRequest(**{"prompt": PROMPT, "temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "seed": 1} | fields)


async def test_the_usage_names_the_tiers_of_cached_tokens(up):
    (_, first), (_, again) = [await collect(up.stub.Generate(greedy(prompt=PROMPT * 5))) for _ in range(2)]
    assert first.usage.cached_tokens_by_tier == pb.CachedTokensByTier()
    cached = (again.usage.prompt_tokens - 1) // 16 * 16
    assert cached > 0
    assert (again.usage.cached_tokens, again.usage.cached_tokens_by_tier) == (cached, pb.CachedTokensByTier(gpu=cached))


async def test_greedy_tokens_equal_those_of_the_service(up, text):
    outputs, ending = await collect(up.stub.Generate(greedy()))
    request = GenerationRequest(
        request_id="direct", prompt=PROMPT, params=SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=1)
    )
    chunks = [item async for item in up.service.generate(request) if isinstance(item, Chunk)]
    assert outputs[0].tokens == [token for chunk in chunks for token in chunk.token_ids]
    assert outputs[0].text == "".join(chunk.text for chunk in chunks)
    assert len(outputs[0].tokens) == 12
    assert outputs[0].last.finish_reason == "length"
    assert ending.model == up.service.model_name
    assert ending.usage.prompt_tokens == len(text.encode(PROMPT, add_special_tokens=True))
    assert ending.usage.completion_tokens == 12
    assert 0 <= ending.timing.queue_ms <= ending.timing.ttft_ms <= ending.timing.total_ms


async def test_a_prompt_of_token_ids_gives_the_tokens_of_its_text(up):
    tokens = (await up.stub.Tokenize(pb.TokenizeRequest(prompt=PROMPT))).tokens
    as_text, _ = await collect(up.stub.Generate(greedy()))
    as_ids, _ = await collect(up.stub.Generate(greedy(prompt=None, prompt_token_ids=tokens)))
    assert as_ids[0].tokens == as_text[0].tokens


async def test_two_outputs_of_one_prompt_differ_and_can_be_repeated(up):
    outputs, ending = await collect(up.stub.Generate(greedy(n=2, temperature=1.0, seed=7)))
    assert sorted(outputs) == [0, 1]
    assert all(len(output.tokens) == 12 and output.last for output in outputs.values())
    assert outputs[0].tokens != outputs[1].tokens
    assert ending.usage.completion_tokens == 24
    again, _ = await collect(up.stub.Generate(greedy(n=2, temperature=1.0, seed=7)))
    assert [again[i].tokens for i in (0, 1)] == [outputs[i].tokens for i in (0, 1)]


async def test_a_stop_token_ends_the_output(up):
    outputs, _ = await collect(up.stub.Generate(greedy()))
    stop = outputs[0].tokens[5]
    stopped, _ = await collect(up.stub.Generate(greedy(stop_token_ids=[stop])))
    first = outputs[0].tokens.index(stop)
    assert stopped[0].tokens == outputs[0].tokens[: first + 1]
    assert stopped[0].last.finish_reason == "stop"
    assert stopped[0].last.stop_token_id == stop


async def test_a_stop_string_ends_the_output_and_is_left_out(up):
    whole, _ = await collect(up.stub.Generate(greedy(max_tokens=40)))
    stop = next(c for c in whole[0].text[8:] if c.isascii() and c.isprintable())
    stopped, ending = await collect(up.stub.Generate(greedy(max_tokens=40, stop=["never there", stop])))
    assert stopped[0].text == whole[0].text.split(stop)[0]
    assert (stopped[0].last.finish_reason, stopped[0].last.stop_text) == ("stop", stop)
    assert ending.usage.completion_tokens < 40
    await until(lambda: up.engine.idle)


async def test_logprobs_are_returned_if_requested(up):
    outputs, ending = await collect(up.stub.Generate(greedy(max_tokens=4, logprobs=2, prompt_logprobs=1)))
    assert [at.token_id for at in outputs[0].logprobs] == outputs[0].tokens
    assert all(len(at.top) == 2 and at.logprob <= 0 and at.rank >= 1 for at in outputs[0].logprobs)
    assert all(at.text == up.service.token_text(at.token_id) for at in outputs[0].logprobs)
    assert len(outputs[0].prompt_logprobs) == ending.usage.prompt_tokens - 1
    without, _ = await collect(up.stub.Generate(greedy(max_tokens=4)))
    assert without[0].logprobs == without[0].prompt_logprobs == []


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "INVALID_ARGUMENT", "prompt"),
        ({"prompt": None}, "INVALID_ARGUMENT", "prompt"),
        ({"prompt_token_ids": [1]}, "INVALID_ARGUMENT", "prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [LIMITS.vocab_size]}, "INVALID_ARGUMENT", "prompt"),
        ({"prompt": None, "prompt_token_ids": [3] * LIMITS.max_model_len}, "INVALID_ARGUMENT", None),
        ({"max_tokens": -1}, "INVALID_ARGUMENT", "max_tokens"),
        ({"temperature": -1.0}, "INVALID_ARGUMENT", "temperature"),
        ({"n": 1000}, "INVALID_ARGUMENT", "n"),
        ({"stop": ["x"] * 17}, "INVALID_ARGUMENT", "stop"),
        ({"stop": [""]}, "INVALID_ARGUMENT", "stop[0]"),
        ({"model": "another"}, "NOT_FOUND", "model"),
    ],
)
async def test_a_refusal_has_its_status_and_names_the_field(up, fields, code, param):
    error = await refusal(up.stub.Generate(greedy(**fields)))
    assert error.code().name == code
    assert error.details()
    detail = detail_of(error)
    assert detail.type
    assert detail.code
    if param is not None:
        assert detail.param.startswith(param)
    assert up.engine.idle


async def test_without_an_engine_a_call_is_unavailable_with_a_time_to_retry(up):
    up.engine.unavailable = "the engine is loading"
    error = await refusal(up.stub.Generate(greedy()))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine is loading")
    assert detail_of(error).code == "engine_unavailable"
    assert detail_of(error).retry_after >= 1


async def test_health_is_that_of_the_engine(up):
    health = health_pb2_grpc.HealthStub(up.channel)
    asked = health_pb2.HealthCheckRequest(service="tidegate.v1.Inference")
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
    up.engine.unavailable = "it died"
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    up.engine.unavailable = None
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING


async def begin(up, **fields):
    """Start a call, read its first chunk, and pause the engine between two steps. Returns (call, first response)."""
    call = up.stub.Generate(greedy(max_tokens=400, **fields))
    response = await anext(aiter(call))
    up.engine.pause()
    assert up.engine.core.stats().blocks_used > 0
    return call, response


async def assert_freed(up):
    await until(lambda: up.engine.aborted)
    step = up.engine.core.stats().step
    up.engine.resume()
    await until(lambda: up.engine.idle)
    assert up.engine.core.stats().blocks_used == 0
    assert up.engine.core.stats().step <= step + 2
    assert up.service.num_running == 0


async def test_cancelling_frees_the_blocks_within_two_steps(up):
    call, _ = await begin(up, n=2)
    call.cancel()
    await assert_freed(up)


async def test_a_client_that_vanishes_frees_the_blocks_within_two_steps(up):
    await begin(up)
    await up.channel.close()
    await assert_freed(up)


async def test_the_deadline_of_the_call_ends_the_request(up):
    up.engine.pause()
    error = await refusal(up.stub.Generate(greedy(max_tokens=400), timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: up.service.num_running == 0)
    up.engine.resume()
    await until(lambda: up.engine.idle)


async def test_deadline_ms_ends_the_request(up):
    up.engine.pause()
    error = await refusal(up.stub.Generate(greedy(max_tokens=400, deadline_ms=100)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert detail_of(error).code == "request_timeout"
    up.engine.resume()
    await until(lambda: up.engine.idle)


async def test_abort_ends_a_running_call(up):
    call, first = await begin(up)
    assert (await up.stub.Abort(pb.AbortRequest(id=first.id))).aborted
    error = await refusal(call)
    assert error.code() is grpc.StatusCode.CANCELLED
    assert detail_of(error).code == "aborted"
    await assert_freed(up)
    assert not (await up.stub.Abort(pb.AbortRequest(id=first.id))).aborted


async def test_calls_at_the_same_time_get_the_tokens_that_each_gets_alone(up):
    alone = [(await collect(up.stub.Generate(greedy(prompt=f"{PROMPT} {i}"))))[0][0].tokens for i in range(16)]
    together = await asyncio.gather(*(collect(up.stub.Generate(greedy(prompt=f"{PROMPT} {i}"))) for i in range(16)))
    assert [outputs[0].tokens for outputs, _ in together] == alone


async def test_tokenize_detokenize_and_list_models(up):
    made = await up.stub.Tokenize(pb.TokenizeRequest(prompt=PROMPT))
    assert made.count == len(made.tokens) > 0
    assert made.max_model_len == LIMITS.max_model_len
    whole, hidden = pb.DetokenizeRequest(tokens=made.tokens), pb.DetokenizeRequest(tokens=made.tokens, skip_special_tokens=True)
    assert (await up.stub.Detokenize(whole)).prompt == f"<|begin|>{PROMPT}"
    assert (await up.stub.Detokenize(hidden)).prompt == PROMPT
    (model,) = (await up.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.max_model_len) == (up.service.model_name, LIMITS.max_model_len)
    for call in (
        up.stub.Tokenize(pb.TokenizeRequest(prompt="a", model="another")),
        up.stub.Detokenize(pb.DetokenizeRequest(tokens=[1], model="another")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.stub.Detokenize(pb.DetokenizeRequest(tokens=[LIMITS.vocab_size]))
    assert (caught.value.code(), detail_of(caught.value).param) == (grpc.StatusCode.INVALID_ARGUMENT, "tokens")
