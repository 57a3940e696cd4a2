"""Tests the route POST /v1/generate with a scripted service."""

import json

import pytest

from engine.errors import EngineUnavailable, Overloaded, RequestTimeout
from engine.request import TokenLogprobs
from server.service.types import Chunk
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import client_of, events_of, post


async def test_an_answer_that_is_not_streamed():
    service = ScriptedService(*letters("tide"))
    status, answer = await post(service, "/v1/generate", {"prompt": "x"})
    assert status == 200
    id = answer.pop("id")
    assert answer == {
        "model": "tiny",
        "outputs": [
            {"index": 0, "text": "tide", "token_ids": [116, 105, 100, 101], "finish_reason": "length", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 3,
            "cached_tokens": 1,
            "cached_tokens_by_tier": {"gpu": 0, "host": 1, "disk": 0},
            "completion_tokens": 4,
        },
        "timing": {"queue_ms": 0.5, "ttft_ms": 1.5, "total_ms": 2.5},
        "cache": "off",
    }
    assert service.requests[0].request_id == id


async def test_the_clients_id_is_repeated_in_the_answer_and_used_for_nothing_else():
    service = ScriptedService(*letters("x"))
    _, answer = await post(service, "/v1/generate", {"prompt": "x", "request_id": "order-7"})
    assert answer["request_id"] == "order-7"
    assert service.requests[0].request_id == answer["id"] != "order-7"


async def test_every_field_reaches_the_service():
    service = ScriptedService(*letters("x"), *letters("y", index=1))
    fields = {
        "prompt_token_ids": [5, 6],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 2**63 - 1,
        "n": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "min_tokens": 1,
        "ignore_eos": True,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"12": -100},
        "logprobs": 2,
        "prompt_logprobs": 1,
        "priority": -3,
        "deadline_ms": 1500,
        "cache": "off",
        "model": "tiny",
        "stream": False,
    }
    status, _ = await post(service, "/v1/generate", fields)
    assert status == 200
    call = service.requests[0]
    assert (call.prompt, call.n, call.stop, call.priority, call.deadline_s) == ([5, 6], 2, ("a", "b"), -3, 1.5)
    for name in ("max_tokens", "temperature", "top_k", "seed", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"):
        assert getattr(call.params, name) == fields[name]
    assert call.params.logit_bias == {12: -100.0}
    assert call.params.stop_token_ids == (9,)


async def test_null_has_the_meaning_of_a_missing_field():
    service = ScriptedService(*letters("x"))
    await post(service, "/v1/generate", {"prompt": "x", "temperature": None, "stop": None, "n": None, "max_tokens": None})
    assert service.requests[0].params == type(service.requests[0].params)()


async def test_a_stream_has_the_content_of_the_whole_answer():
    service = ScriptedService(*letters('t"i\n'), *letters("ab", index=1, finish="stop"))
    body = {"prompt": "x", "n": 2}
    _, whole = await post(service, "/v1/generate", body)
    events = await events_of(service, "/v1/generate", body)
    assert events[-1] == "[DONE]"
    for output in whole["outputs"]:
        mine = [e for e in events[:-1] if e["index"] == output["index"]]
        assert "".join(e["text"] for e in mine) == output["text"]
        assert [t for e in mine for t in e["token_ids"]] == output["token_ids"]
        assert [e["finish_reason"] for e in mine if "finish_reason" in e] == [output["finish_reason"]]
    last = events[-2]
    assert {"finish_reason", "usage", "timing", "cache", "model"} <= last.keys()
    assert last["usage"] == whole["usage"]
    assert sum("usage" in e for e in events[:-1]) == 1
    assert len({e["id"] for e in events[:-1]}) == 1


async def test_log_probabilities_are_the_same_whole_and_streamed():
    def logprobs_at(token):
        return TokenLogprobs(token, float("-inf"), 2, [65, 66], [-0.1, -2.5])

    service = ScriptedService(*letters("hi", logprobs=logprobs_at, prompt_logprobs=[None, logprobs_at(67)]))
    _, answer = await post(service, "/v1/generate", {"prompt": "x", "logprobs": 2, "prompt_logprobs": 2})
    output = answer["outputs"][0]
    assert output["logprobs"][0] == {
        "token_id": 104,
        "text": "h",
        "logprob": -9999.0,  # replaces minus infinity, which JSON does not have
        "rank": 2,
        "top": [{"token_id": 65, "text": "A", "logprob": -0.1}, {"token_id": 66, "text": "B", "logprob": -2.5}],
    }
    assert output["prompt_logprobs"][0] is None
    events = await events_of(service, "/v1/generate", {"prompt": "x", "logprobs": 2, "prompt_logprobs": 2})
    assert [at for e in events[:-1] for at in e.get("logprobs", [])] == output["logprobs"]
    assert events[0]["prompt_logprobs"] == output["prompt_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [(Overloaded("full", retry_after=3), 429), (RequestTimeout("late"), 408), (EngineUnavailable("gone"), 503)],
)
async def test_an_error_before_the_first_token_keeps_its_status(stream, error, status):
    async with client_of(ScriptedService(error)) as client:
        response = await client.post("/v1/generate", json={"prompt": "x", "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["message"] == error.message
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_an_error_after_the_first_token_is_the_last_event():
    service = ScriptedService(Chunk(index=0, text="a", token_ids=[1]), RequestTimeout("too late"))
    events = await events_of(service, "/v1/generate", {"prompt": "x", "stream": True})
    assert events[0]["text"] == "a"
    assert events[1]["error"]["code"] == "request_timeout"
    assert len(events) == 2
    assert len(service.closed) == 1


async def test_a_bug_after_the_first_token_is_reported_without_details(caplog):
    service = ScriptedService(Chunk(index=0, text="a", token_ids=[1]), KeyError("/secret"))
    events = await events_of(service, "/v1/generate", {"prompt": "x", "stream": True})
    assert events[1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(events)
    assert "/secret" in caplog.text
