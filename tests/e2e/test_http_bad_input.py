"""Tests faulty requests. A refusal has a status, a code, the name of the field at fault and a small body, and does not disturb
other requests."""

import asyncio
import re
import threading

import pytest

from server.http import strict_json
from server.text.tokenizer import Tokenizer
from tests.support.http_api import MODEL, http_api
from tests.support.local_engine import until
from tests.support.tiny_checkpoint import write_tiny_checkpoint

GENERATE, COMPLETIONS, CHAT = "/v1/generate", "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]
PLAIN = {
    GENERATE: {"prompt": "x"},
    COMPLETIONS: {"model": MODEL, "prompt": "x"},
    CHAT: {"model": MODEL, "messages": MESSAGES},
}
MANY_DIGITS = int("9" * 4000)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Tokenizer.from_folder(write_tiny_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.fixture
async def api(text):
    async with http_api(text, max_body_bytes=1 << 20, max_n=8) as api:
        yield api
        await api.quiet()


def checked(response, status, param=None, code=None):
    """Assert that the answer is a well-formed error with the given status, code and field."""
    assert response.status_code == status, response.text
    assert len(response.content) <= 4096
    error = response.json()["error"]
    assert set(error) == {"type", "code", "message", "param"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error


# Pairs of faulty fields, which every generating route must refuse, and the field that the error must name.
COMMON = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"temperature": MANY_DIGITS}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": "3"}, "n"),
    ({"n": 2.0}, "n"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": MANY_DIGITS}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 513}, "max_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"ignore_eos": "true"}, "ignore_eos"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [512]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"bad_words": ["x"] * 257}, "bad_words"),
    ({"bad_words": ["x y " * 60]}, "bad_words"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ({"spaces_between_special_tokens": 1}, "spaces_between_special_tokens"),
    ({"include_stop_str_in_output": 0}, "include_stop_str_in_output"),
    ({"return_token_ids": "yes"}, "return_token_ids"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"1": None}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"priority": 10**6}, "priority"),
    ({"model": 5}, "model"),
    ({"nope": 1}, "nope"),
    ({"": 1}, None),
]


@pytest.mark.parametrize("path", PLAIN)
async def test_every_generating_route_refuses_faulty_fields_by_name(api, path):
    """One test covers all fields, because starting a server takes longer than sending all the requests."""
    for more, param in COMMON:
        for stream in ({}, {"stream": True}):
            response = await api.http.post(path, json={**PLAIN[path], **stream, **more})
            checked(response, 400, param)


OWN = [
    (GENERATE, {}, 400, "prompt"),
    (GENERATE, {"prompt": None}, 400, "prompt"),
    (GENERATE, {"prompt": ""}, 400, "prompt"),
    (GENERATE, {"prompt": 5}, 400, "prompt"),
    (GENERATE, {"prompt": ["x"]}, 400, "prompt"),
    (GENERATE, {"prompt": "x", "prompt_token_ids": [1]}, 400, "prompt_token_ids"),
    (GENERATE, {"prompt_token_ids": []}, 400, "prompt_token_ids"),
    (GENERATE, {"prompt_token_ids": [512]}, 400, "prompt_token_ids"),
    (GENERATE, {"prompt_token_ids": [-1]}, 400, "prompt_token_ids[0]"),
    (GENERATE, {"prompt_token_ids": [True]}, 400, "prompt_token_ids[0]"),
    (GENERATE, {"prompt_token_ids": [1.0]}, 400, "prompt_token_ids[0]"),
    (GENERATE, {"prompt_token_ids": [2**40]}, 400, "prompt_token_ids[0]"),
    (GENERATE, {"prompt_token_ids": [5] * 512}, 400, "prompt_token_ids"),
    (GENERATE, {"prompt": "x" * 100_000}, 400, "prompt"),
    (GENERATE, {"prompt": "x", "model": "other"}, 404, "model"),
    (GENERATE, {"prompt": "x", "model": "m" * 257}, 400, "model"),
    (GENERATE, {"prompt": "x", "slo_class": "gold"}, 400, "slo_class"),
    (GENERATE, {"prompt": "x", "cache": "on"}, 400, "cache"),
    (GENERATE, {"prompt": "x", "deadline_ms": 0}, 400, "deadline_ms"),
    (GENERATE, {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    (GENERATE, {"prompt": "x", "logprobs": True}, 400, "logprobs"),
    (GENERATE, {"prompt": "x", "request_id": ""}, 400, "request_id"),
    (GENERATE, {"prompt": "x", "request_id": "a" * 129}, 400, "request_id"),
    (GENERATE, {"prompt": "x", "request_id": "a\r\nx-evil: 1"}, 400, "request_id"),
    (GENERATE, {"prompt": "x", "request_id": "\u0661"}, 400, "request_id"),
    (COMPLETIONS, {"model": MODEL}, 400, "prompt"),
    (COMPLETIONS, {"model": MODEL, "prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"model": MODEL, "prompt": [[]]}, 400, "prompt[0]"),
    (COMPLETIONS, {"model": MODEL, "prompt": ["x", 1]}, 400, "prompt[1]"),
    (COMPLETIONS, {"model": MODEL, "prompt": [1, "x"]}, 400, "prompt[1]"),
    (COMPLETIONS, {"model": MODEL, "prompt": {"a": 1}}, 400, "prompt"),
    (COMPLETIONS, {"model": MODEL, "prompt": ["x"] * 129}, 400, "prompt"),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "suffix": "y"}, 400, "suffix"),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "best_of": 2}, 400, "best_of"),
    (COMPLETIONS, {"model": MODEL, "prompt": "x", "stream_options": {}}, 400, "stream_options"),
    (COMPLETIONS, {"model": "other", "prompt": "x"}, 404, "model"),
    (COMPLETIONS, {"model": MODEL, "prompt": [600], "echo": True}, 400, None),
    (CHAT, {"model": MODEL}, 400, "messages"),
    (CHAT, {"model": MODEL, "messages": []}, 400, "messages"),
    (CHAT, {"model": MODEL, "messages": "x"}, 400, "messages"),
    (CHAT, {"model": MODEL, "messages": ["x"]}, 400, "messages[0]"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"model": MODEL, "messages": [{"role": "pope", "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"model": MODEL, "messages": [{"role": {}, "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": [{"type": {}}]}]}, 400, "messages[0].content[0].type"),
    (CHAT, {"model": MODEL, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "tools": [{}]}, 400, "tools"),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "tool_choice": "auto"}, 400, "tool_choice"),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "response_format": {"type": "json_schema"}}, 400, "response_format"),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "chat_template": "{{ 7 * 7 }}"}, 400, "chat_template"),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "logprobs": 2}, 400, "logprobs"),
    (CHAT, {"model": MODEL, "messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens"),
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 4097}, 400, "messages"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": 1}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
    ("/detokenize", {"tokens": []}, 400, "tokens"),
    ("/detokenize", {"tokens": [512]}, 400, "tokens"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
]


async def test_each_route_refuses_its_own_faulty_fields_by_name(api):
    for path, body, status, param in OWN:
        response = await api.http.post(path, json=body)
        assert response.status_code == status, (path, str(body)[:200], response.text)
        checked(response, status, param)


BODIES = {
    "empty": b"",
    "blank": b"  ",
    "not JSON": b"prompt=x",
    "truncated": b'{"prompt": "x"',
    "an array": b'["x"]',
    "a string": b'"x"',
    "null": b"null",
    "broken UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "1e999": b'{"prompt": "x", "temperature": 1e999}',
    "-1e999": b'{"prompt": "x", "temperature": -1e999}',
    "5000 digits": b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
    "the same key twice": b'{"prompt": "x", "prompt": "y"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a lone surrogate as a key": b'{"prompt": "x", "\\udfff": 1}',
    "depth 200,000": b"[" * 200_000,
    "depth 200,000 in a field": b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "depth 900 in a field": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
}


async def test_bodies_that_are_not_a_JSON_object_are_400(api):
    for name, body in BODIES.items():
        response = await api.http.post(GENERATE, content=body)
        assert response.status_code == 400, (name, response.text)
        checked(response, 400)


async def test_null_and_zero_width_characters_are_accepted_in_a_prompt(api):
    response = await api.http.post(GENERATE, json={"prompt": "a\u0000b\u200b\U0001f30a", "max_tokens": 1})
    assert response.status_code == 200


async def test_minus_zero_is_accepted_as_zero(api):
    body = b'{"prompt": "x", "temperature": -0.0, "presence_penalty": -0, "max_tokens": 2}'
    assert (await api.http.post(GENERATE, content=body)).status_code == 200


async def test_a_body_over_the_limit_is_413(api):
    async def pieces():
        for _ in range(40):
            yield b"x" * 65536

    checked(await api.http.post(GENERATE, content=b"x" * (1 << 20) + b"x"), 413, code="payload_too_large")
    checked(await api.http.post(GENERATE, content=pieces()), 413, code="payload_too_large")
    assert (await api.http.post(GENERATE, json=PLAIN[GENERATE])).status_code == 200


async def test_a_megabyte_of_faults_gets_a_small_error(api):
    for body in (
        {"prompt": "x", "cache": "y" * 1_000_000},
        {"prompt": "x", "z" * 1_000_000: 1},
        {"prompt_token_ids": ["q"] * 200_000},
    ):
        checked(await api.http.post(GENERATE, json=body), 400)


async def test_an_error_names_the_field_as_the_client_knows_it(api):
    long_chat = {"model": MODEL, "messages": [{"role": "user", "content": "x y z " * 500}]}
    for path, body, param in (
        (GENERATE, {"prompt_token_ids": [512]}, "prompt_token_ids"),
        (GENERATE, {"prompt_token_ids": [5] * 600}, "prompt_token_ids"),
        (GENERATE, {"prompt": "x y z " * 500}, "prompt"),
        (COMPLETIONS, {"model": MODEL, "prompt": [[1], [512]]}, "prompt[1]"),
        (COMPLETIONS, {"model": MODEL, "prompt": [512]}, "prompt"),
        (CHAT, long_chat, "messages"),
        (CHAT, {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 512}, "max_completion_tokens"),
    ):
        checked(await api.http.post(path, json=body), 400, param)


CONTEXT = re.compile(r"This model's maximum context length is (\d+) tokens\. However, you requested (\d+) tokens")


async def test_context_errors_have_the_words_that_gateways_look_for(api):
    """litellm, LangChain and others find the error by its code or by these words, and read the two numbers."""
    text, long_ = "x y z " * 500, [5] * 600
    chat = {"messages": [{"role": "user", "content": text}]}
    for path, body, requested, more in (
        (GENERATE, {"prompt": text}, 513, "The prompt is too long: it has more than 511 tokens"),
        (GENERATE, {"prompt_token_ids": long_}, 601, "The prompt is too long: it has 600 tokens"),
        (
            GENERATE,
            {"prompt_token_ids": [5] * 100, "max_tokens": 500},
            600,
            "(100 in the prompt_token_ids, 500 in the completion)",
        ),
        (COMPLETIONS, {"prompt": long_, "stream": True}, 601, "and may have 511 at most"),
        (COMPLETIONS, {"prompt": [[5], [5] * 500], "max_tokens": 13}, 513, "max_tokens 13"),
        (CHAT, chat, 513, "The prompt is too long: it has more than 511 tokens"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 512}, None, " in the messages, 512 in the completion)"),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": 512}, None, "max_completion_tokens 512"),
    ):
        response = await api.http.post(path, json=body)
        checked(response, 400, code="context_length_exceeded")
        message = response.json()["error"]["message"]
        limit, num = map(int, CONTEXT.match(message).groups())
        assert limit == 512
        assert num > 512
        assert num == requested or requested is None
        assert more in message, message


async def test_only_large_bodies_are_parsed_in_the_thread(api, monkeypatch):
    threads = []
    loads = strict_json.loads
    monkeypatch.setattr(strict_json, "loads", lambda body: threads.append(threading.current_thread().name) or loads(body))
    bodies = [{"prompt_token_ids": [5] * 100}, {"prompt_token_ids": [5] * 300_000}]
    for body in bodies:
        await api.http.post(GENERATE, json=body)
    assert ["tidegate-body" in name for name in threads] == [False, True]


async def test_unknown_paths_and_methods(api):
    checked(await api.http.get("/nowhere"), 404, code="unknown_route")
    checked(await api.http.get("/" + "x" * 5000), 404)
    checked(await api.http.get("/docs"), 404)
    response = await api.http.get(GENERATE)
    checked(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    checked(await api.http.get("/v1/models/%ff%00"), 404, code="model_not_found")
    checked(await api.http.request("BREW", "/v1/models"), 400)


async def test_a_metric_counts_requests_that_are_not_http(api):
    for sent in (b"{}\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(sent)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    assert 'tidegate_http_refused_total{status="400"} 2.0' in (await api.http.get("/metrics")).text


async def test_a_request_past_its_deadline_is_408(api):
    api.engine.pause()
    checked(await api.http.post(GENERATE, json={"prompt": "x", "deadline_ms": 30}), 408, code="request_timeout")
    checked(await api.http.post(GENERATE, json={"prompt": "x", "deadline_ms": 30, "stream": True}), 408)
    api.engine.resume()


async def test_an_aborted_request_is_499(api):
    api.engine.pause()
    task = asyncio.create_task(api.http.post(GENERATE, json={"prompt": "x"}))
    await until(lambda: api.engine.submitted)
    assert api.service.abort(api.engine.submitted[0].request_id)
    checked(await task, 499, code="aborted")
    api.engine.resume()


async def test_faulty_requests_do_not_change_the_answers_of_others(api):
    body = {"prompt": "the tide", "max_tokens": 60, "seed": 4, "ignore_eos": True}
    alone = (await api.http.post(GENERATE, json=body)).json()["outputs"]
    neighbours = [asyncio.create_task(api.http.post(GENERATE, json=body)) for _ in range(4)]
    attacks = [api.http.post(path, json={**PLAIN[path], **more}) for path in PLAIN for more, _ in COMMON[::4]]
    attacks += [api.http.post(GENERATE, content=faulty) for faulty in BODIES.values()]
    for response in await asyncio.gather(*attacks):
        assert 400 <= response.status_code < 500
    for neighbour in neighbours:
        assert (await neighbour).json()["outputs"] == alone
