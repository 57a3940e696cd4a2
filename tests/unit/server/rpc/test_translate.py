"""Tests the translation between protobuf messages and the types of the service."""

import asyncio
import math

import pytest

from engine.errors import InvalidRequest
from engine.models.generation import GenerationDefaults
from engine.request import CachedTokens, TokenLogprobs
from server.http.schemas.generate import GenerateBody
from server.rpc import translate
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.service.pacing import SLICE, Pacer
from server.service.types import Chunk, Ending, Timing, Usage


def asked(**fields):
    return translate.checked(pb.GenerateRequest(**fields), GenerateBody)


def request(*, time_remaining=None, defaults=None, **fields):
    return translate.generation_request(asked(**fields), "gen-1", GenerationDefaults(params=defaults or {}), time_remaining)


def test_every_field_reaches_the_request():
    made = request(
        prompt_token_ids=[5, 6],
        model="m",
        max_tokens=9,
        min_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=2**62,
        n=3,
        stop=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={3: -100.0, 4: 0.5},
        logprobs=0,
        prompt_logprobs=2,
        priority=-5,
        deadline_ms=1500,
        cache="off",
        request_id="mine",
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        bad_words=["no", "never"],
        allowed_token_ids=[4, 5],
        truncate_prompt_tokens=-1,
        return_token_ids=True,
    )
    assert (made.request_id, made.prompt, made.model, made.n) == ("gen-1", [5, 6], "m", 3)
    assert (made.stop, made.priority, made.deadline_s, made.add_special_tokens) == (("a", "b"), -5, 1.5, True)
    params = made.params
    assert (params.max_tokens, params.min_tokens, params.top_k, params.seed) == (9, 2, 40, 2**62)
    assert (params.temperature, params.top_p, params.min_p) == (0.7, 0.9, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (params.stop_token_ids, params.ignore_eos, params.logit_bias) == ((7,), True, {3: -100.0, 4: 0.5})
    assert (params.logprobs, params.prompt_logprobs, params.allowed_token_ids) == (0, 2, (4, 5))
    assert (made.include_stop_str_in_output, made.return_token_ids, made.truncate_prompt_tokens) == (True, True, -1)
    assert (made.skip_special_tokens, made.spaces_between_special_tokens) == (False, False)
    assert (made.bad_words, made.fits_max_tokens) == (("no", "never"), False)


def test_an_omitted_field_keeps_its_default_and_a_zero_is_kept():
    made = request(prompt="hi")
    assert (made.prompt, made.n, made.stop, made.model, made.deadline_s) == ("hi", 1, (), None, None)
    assert made.params == type(made.params)()
    assert request(prompt="hi", temperature=0.0).params.greedy
    assert (made.skip_special_tokens, made.spaces_between_special_tokens, made.fits_max_tokens) == (True, True, True)


def test_a_default_of_the_model_holds_until_the_request_says_something():
    defaults = {"temperature": 0.3, "top_k": 7, "max_tokens": 99}
    params = request(prompt="hi", defaults=defaults, temperature=0.0).params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 7, 99)


@pytest.mark.parametrize(
    ("deadline_ms", "remaining", "seconds"),
    [(None, None, None), (500, None, 0.5), (None, 2.0, 2.0), (500, 2.0, 0.5), (5000, 2.0, 2.0), (None, -1.0, 0.001)],
)
def test_the_earlier_deadline_holds(deadline_ms, remaining, seconds):
    assert request(prompt="hi", deadline_ms=deadline_ms, time_remaining=remaining).deadline_s == seconds


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 2**31]}, "prompt_token_ids[1]"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 2**31}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 5, "min_tokens": 9}, "min_tokens"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"prompt": "a", "bad_words": ["x", ""]}, "bad_words[1]"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": math.nan}, "temperature"),
        ({"prompt": "a", "top_p": math.inf}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**6}, "n"),
        ({"prompt": "a", "stop": [""]}, "stop[0]"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logit_bias": {1: 101.0}}, "logit_bias.1"),
        ({"prompt": "a", "priority": 1001}, "priority"),
        ({"prompt": "a", "deadline_ms": 0}, "deadline_ms"),
        ({"prompt": "a", "cache": "maybe"}, "cache"),
        ({"prompt": "a", "request_id": "no spaces"}, "request_id"),
    ],
)
def test_a_value_that_http_refuses_is_refused(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        request(**fields)
    assert caught.value.param == param


async def chunk_message(chunk, text_of):
    message = pb.Chunk()
    await translate.write_chunk(message, chunk, text_of, Pacer())
    return message


async def test_a_chunk_with_all_fields():
    at = TokenLogprobs(token=65, logprob=-0.5, rank=1, top_ids=[65, 66], top_logprobs=[-0.5, -math.inf])
    made = await chunk_message(
        Chunk(index=1, text="A", token_ids=[65], finish_reason="stop", stop_reason=65, logprobs=[at], prompt_logprobs=[None, at]),
        chr,
    )
    assert (made.index, made.text, list(made.token_ids), made.finish_reason) == (1, "A", [65], "stop")
    assert (made.WhichOneof("stop_reason"), made.stop_token_id) == ("stop_token_id", 65)
    info = pb.TokenInfo(
        token_id=65,
        text="A",
        logprob=-0.5,
        rank=1,
        top=[pb.TopToken(token_id=65, text="A", logprob=-0.5), pb.TopToken(token_id=66, text="B", logprob=-math.inf)],
    )
    assert list(made.logprobs) == [info]
    assert list(made.prompt_logprobs) == [info]


async def test_a_message_leaves_out_the_fields_that_its_chunk_does_not_have():
    made = await chunk_message(Chunk(index=0, text="", token_ids=[]), chr)
    assert not made.HasField("finish_reason")
    assert made.WhichOneof("stop_reason") is None
    chunk = Chunk(index=0, text="", token_ids=[], finish_reason="stop", stop_reason="END")
    stopped = await chunk_message(chunk, chr)
    assert (stopped.WhichOneof("stop_reason"), stopped.stop_text) == ("stop_text", "END")


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
async def test_many_log_probabilities_are_translated_in_slices(field):
    """Another task runs repeatedly during the translation. The test counts the tokens that are looked up between two runs of that
    task."""
    at = TokenLogprobs(token=65, logprob=-0.5, rank=1, top_ids=[65] * 20, top_logprobs=[-0.5] * 20)
    lookups, most = 0, 0

    def text_of(token):
        nonlocal lookups
        lookups += 1
        return "t"

    async def watch():
        nonlocal lookups, most
        while True:
            most, lookups = max(most, lookups), 0
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    made = await chunk_message(Chunk(index=0, text="", token_ids=[], **{field: [at] * 1000}), text_of)
    await asyncio.sleep(0)
    watcher.cancel()
    assert len(getattr(made, field)) == 1000
    assert most < SLICE + 21


def test_the_ending():
    made = translate.ending_message(
        Ending(
            usage=Usage(prompt_tokens=7, cached=CachedTokens(gpu=1, disk=2), completion_tokens=5),
            timing=Timing(queue_ms=1.0, ttft_ms=2.0, total_ms=3.0),
        ),
        "m",
    )
    assert (made.model, made.cache) == ("m", "off")
    by_tier = pb.CachedTokensByTier(gpu=1, disk=2)
    assert made.usage == pb.Usage(prompt_tokens=7, cached_tokens=3, cached_tokens_by_tier=by_tier, completion_tokens=5)
    assert made.timing == pb.Timing(queue_ms=1.0, ttft_ms=2.0, total_ms=3.0)
