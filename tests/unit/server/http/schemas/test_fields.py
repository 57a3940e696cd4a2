"""Tests what happens to fields that a route does not have: they pass, are refused by name, or are ignored and reported."""

import logging

import pytest

from server.http.schemas.fields import KNOWN, MAX_REPORTED
from server.http.schemas.generate import GenerateBody
from server.http.schemas.openai import ChatBody, CompletionBody
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import app_of, client_for

MESSAGES = [{"role": "user", "content": "x"}]
PLAIN = {"/v1/generate": {"prompt": "x"}, "/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": MESSAGES}}
BODY = {"/v1/generate": GenerateBody, "/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
SMALL = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [104]}}
OPENAI = ("/v1/completions", "/v1/chat/completions")
NOTHING = [None, False, "", [], {}]


SERVICE = ScriptedService(*letters("x"))
# Building an application takes longer than all these requests.
APPS = {strict: app_of(SERVICE, strict_fields=strict) for strict in (True, False)}


async def send(path, more, strict_fields=True):
    SERVICE.requests.clear()
    async with client_for(APPS[strict_fields]) as client:
        answer = await client.post(path, json={**PLAIN, **SMALL}[path] | more)
    return answer, SERVICE


def error_of(answer):
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("path", [*PLAIN, *SMALL])
@pytest.mark.parametrize("name", ["from_a_newer_client", "Temperature2", "x-y", "日本"])
async def test_an_unknown_field_that_asks_for_nothing_passes_and_others_are_refused_by_name(path, name):
    for value in NOTHING:
        answer, _ = await send(path, {name: value})
        assert answer.status_code == 200, answer.text
        assert "x-tidegate-ignored-fields" not in answer.headers
    for value in (True, 0, 1.5, "x", [0], {"a": None}):
        error = error_of((await send(path, {name: value}))[0])
        assert (error["code"], error["param"]) == ("unsupported_field", name)
        assert name in error["message"]


@pytest.mark.parametrize("path", PLAIN)
async def test_a_field_that_other_servers_have_is_refused_alike_on_every_route(path):
    for name in KNOWN.keys() & BODY[path].UNSUPPORTED.keys():
        for value in ("something", 7, {"type": "other"}, [1]):
            error = error_of((await send(path, {name: value}))[0])
            assert (error["code"], error["param"]) == ("unsupported_field", name)
        for value in (None, "", [], {}, *KNOWN[name]):
            assert (await send(path, {name: value}))[0].status_code == 200, (name, value)


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("name", ["enable_thinking", "separate_reasoning", "stream_reasoning", "detokenize"])
async def test_false_is_refused_where_it_asks_for_something(path, name):
    assert error_of((await send(path, {name: False}))[0])["param"] == name


async def test_a_prompts_special_tokens_cannot_be_left_out_in_silence():
    for path in ("/v1/completions", "/v1/generate"):
        assert (await send(path, {"add_special_tokens": True}))[0].status_code == 200
        assert error_of((await send(path, {"add_special_tokens": False}))[0])["param"] == "add_special_tokens"


@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize(
    "more",
    [
        {"safety_identifier": "user-1"},
        {"prompt_cache_key": "k"},
        {"prompt_cache_options": {"mode": "implicit"}},
        {"return_token_ids": False},
        {"documents": []},
        {"chat_template_kwargs": {}},
        {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u"},
        {"service_tier": "default", "parallel_tool_calls": True, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium", "reasoning_effort": None},
        {"stream": True, "stream_options": {"include_obfuscation": False, "include_usage": True, "from_a_newer_client": None}},
    ],
)
async def test_what_changes_nothing_is_accepted(path, more):
    answer, _ = await send(path, more)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", PLAIN)
async def test_of_tools_and_tool_choice_the_tools_are_named(path):
    tools = {"tool_choice": "auto", "parallel_tool_calls": True, "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert error_of((await send(path, tools))[0])["param"] == "tools"
    assert error_of((await send(path, dict(reversed(tools.items()))))[0])["param"] == "tools"
    assert error_of((await send(path, {"tool_choice": "auto"}))[0])["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("path", "name", "near"),
    [
        ("/v1/generate", "max_new_tokens", "did you mean max_tokens?"),
        ("/v1/completions", "tempurature", "did you mean temperature?"),
        ("/v1/chat/completions", "top-p", "did you mean top_p?"),
        ("/v1/chat/completions", "prompt", "send messages here"),
        ("/v1/completions", "messages", "/v1/chat/completions"),
        ("/v1/completions", "top_logprobs", "logprobs"),
        ("/tokenize", "promt", "did you mean prompt?"),
        ("/tokenize", "max_new_tokens", "leave it out"),
    ],
)
async def test_a_refusal_names_what_was_probably_meant(path, name, near):
    assert near in error_of((await send(path, {name: "x"}))[0])["message"]


async def test_the_path_of_a_nested_unknown_field_is_named():
    options = {"stream": True, "stream_options": {"include_usages": True}}
    error = error_of((await send("/v1/completions", options))[0])
    assert error["param"] == "stream_options.include_usages"
    assert "did you mean include_usage?" in error["message"]


@pytest.mark.parametrize("path", [*PLAIN, *SMALL])
async def test_without_strict_fields_unknown_fields_are_ignored_and_reported(path, caplog):
    caplog.set_level(logging.INFO, "tidegate")
    answer, service = await send(path, {"foo": 1, "bar": None, "x,\r\ny: é": 2}, strict_fields=False)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tidegate-ignored-fields"] == "foo, x???y: ?"
    (line,) = [record for record in caplog.records if record.name == "tidegate.requests"]
    assert line.ignored == "foo, x???y: ?"
    if service.requests:
        params = service.requests[0].params
        assert params == (await send(path, {}))[1].requests[0].params


async def test_without_strict_fields_nested_unknown_fields_are_reported_with_their_place():
    more = {"stream": True, "stream_options": {"foo": 1}}
    answer, _ = await send("/v1/completions", more, strict_fields=False)
    assert answer.headers["x-tidegate-ignored-fields"] == "stream_options.foo"


async def test_without_strict_fields_unknown_fields_of_messages_and_parts_are_reported_with_their_place():
    part = {"type": "text", "text": "x", "foo": 1}
    more = {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [part, part], "bar": 1}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        answer, _ = await send(path, {**more, "prompt": None}, strict_fields=False)
        assert answer.headers["x-tidegate-ignored-fields"] == "messages[].bar, messages[].content[].foo"


async def test_without_strict_fields_known_fields_are_still_refused():
    assert error_of((await send("/v1/completions", {"tools": [1], "foo": 1}, strict_fields=False))[0])["param"] == "tools"


async def test_many_ignored_fields_make_a_short_header():
    answer, _ = await send("/v1/generate", {f"{'k' * 300}{i}": 1 for i in range(5000)} | {"z": 1}, strict_fields=False)
    assert answer.status_code == 200
    assert len(answer.headers["x-tidegate-ignored-fields"]) < 66 * MAX_REPORTED
