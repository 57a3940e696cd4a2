"""Tests the route POST /v1/completions with a scripted service."""

import pytest

from engine.errors import Overloaded
from engine.request import TokenLogprobs
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import events_of, post

ASK = {"model": "tiny", "prompt": "x"}


async def test_an_answer_that_is_not_streamed():
    status, answer = await post(ScriptedService(*letters("tide", finish="stop")), "/v1/completions", ASK)
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "tide", "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
        "prompt_cache_hit_tokens": 1,
        "prompt_cache_miss_tokens": 2,
    }


@pytest.mark.parametrize(
    ("prompt", "contents"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_the_four_forms_of_prompt(prompt, contents):
    service = ScriptedService(*letters("x"))
    _, answer = await post(service, "/v1/completions", {**ASK, "prompt": prompt})
    assert [call.prompt for call in service.requests] == contents
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(contents)))
    assert len({call.request_id for call in service.requests}) == len(contents)
    assert answer["usage"]["prompt_tokens"] == 3 * len(contents)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_outputs_of_several_prompts_are_numbered_in_one_sequence(stream):
    service = ScriptedService(*letters("ab"), *letters("cd", index=1))
    body = {**ASK, "prompt": ["p", "q"], "n": 2}
    if not stream:
        _, answer = await post(service, "/v1/completions", body)
        assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "ab"), (1, "cd"), (2, "ab"), (3, "cd")]
        return
    events = await events_of(service, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    texts = {}
    for e in events[:-2]:
        (choice,) = e["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert e["usage"] is None
    assert texts == {0: "ab", 1: "cd", 2: "ab", 3: "cd"}
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["total_tokens"] == 6 + 8


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_one_prompt_is_the_answer_and_ends_the_other_prompts(stream):
    service = ScriptedService(Overloaded("full"))
    status, answer = await post(service, "/v1/completions", {**ASK, "prompt": ["a", "b", "c"], "stream": stream})
    assert status == 429
    assert answer["error"]["code"] == "overloaded"
    assert len(service.closed) == len(service.requests)


async def test_echo_begins_the_choice_with_its_prompt():
    service = ScriptedService(*letters("de"))
    _, answer = await post(service, "/v1/completions", {**ASK, "prompt": "abc", "echo": True})
    assert answer["choices"][0]["text"] == "abcde"
    events = await events_of(service, "/v1/completions", {**ASK, "prompt": [97, 98], "echo": True})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "abde"


def logprobs_at(token):
    return TokenLogprobs(token, -0.5, 1, [token, 90], [-0.5, -3.0])


async def test_log_probabilities():
    service = ScriptedService(*letters("de", logprobs=logprobs_at))
    _, answer = await post(service, "/v1/completions", {**ASK, "logprobs": 2})
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["d", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"d": -0.5, "Z": -3.0}, {"e": -0.5, "Z": -3.0}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_has_log_probabilities(stream):
    """Evaluation harnesses score a prompt by a request with `echo` and `logprobs`."""
    service = ScriptedService(*letters("d", logprobs=logprobs_at, prompt_logprobs=[None, logprobs_at(98)]))
    body = {**ASK, "prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1}
    if stream:
        events = await events_of(service, "/v1/completions", body)
        choice = events[0]["choices"][0]
    else:
        choice = (await post(service, "/v1/completions", body))[1]["choices"][0]
    assert service.requests[0].params.prompt_logprobs == 1
    assert service.requests[0].prompt == [0, 97, 98]  # the scripted tokenizer adds token 0
    assert choice["logprobs"]["tokens"] == ["\0", "b", "d"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"d": -0.5}]
    assert "prompt_logprobs" not in choice


async def test_prompt_logprobs_have_the_form_of_vllm():
    chunks = letters("d", prompt_logprobs=[None, logprobs_at(98)])
    _, answer = await post(ScriptedService(*chunks), "/v1/completions", {**ASK, "prompt_logprobs": 1})
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "90": {"logprob": -3.0, "rank": 2, "decoded_token": "Z"},
        },
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_only_the_first_choice_has_the_log_probabilities_of_an_echoed_prompt(stream):
    first = letters("d", logprobs=logprobs_at, prompt_logprobs=[None, logprobs_at(98)])
    chunks = [*first, *letters("e", index=1, logprobs=logprobs_at)]
    body = {**ASK, "prompt": [97, 98], "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}
    if stream:
        events = await events_of(ScriptedService(*chunks), "/v1/completions", body)
        first, second = (e["choices"][0] for e in events[:-1])
    else:
        first, second = (await post(ScriptedService(*chunks), "/v1/completions", body))[1]["choices"]
    assert (first["text"], first["logprobs"]["tokens"], first["logprobs"]["text_offset"]) == ("abd", ["a", "b", "d"], [0, 1, 2])
    assert (second["text"], second["logprobs"]["tokens"], second["logprobs"]["text_offset"]) == ("abe", ["e"], [2])


async def test_the_limit_on_log_probabilities_is_for_all_prompts_together():
    service = ScriptedService(*letters("x"))
    await post(service, "/v1/completions", {**ASK, "prompt": ["abc", "de"], "prompt_logprobs": 3})
    assert service.checked == (3, 4 + 3, 2)  # the scripted tokenizer adds a token to each prompt


async def test_errors_can_name_the_prompt_at_fault():
    service = ScriptedService(*letters("x"))
    await post(service, "/v1/completions", {**ASK, "prompt": [[1], [512]]})
    assert [call.client_names for call in service.requests] == [{"prompt": "prompt[0]"}, {"prompt": "prompt[1]"}]
    assert [call.num_prompts for call in service.requests] == [2, 2]
