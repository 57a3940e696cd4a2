"""Tests the route POST /v1/chat/completions with a scripted service."""

from engine.request import TokenLogprobs
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import events_of, post

PATH = "/v1/chat/completions"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_an_answer_that_is_not_streamed():
    service = ScriptedService(*letters("tide", finish="stop"))
    status, answer = await post(service, PATH, ASK)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "tide", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert service.requests[0].add_special_tokens is False


async def test_the_limit_of_tokens_is_the_rest_of_the_context_by_default():
    service = ScriptedService(*letters("x"))
    for more in ({}, {"max_tokens": 5}, {"max_completion_tokens": 6}, {"max_tokens": 7, "max_completion_tokens": 7}):
        await post(service, PATH, {**ASK, **more})
    assert [call.params.max_tokens for call in service.requests] == [100 - 11, 5, 6, 7]


async def test_messages_reach_the_template_in_the_clients_order_of_keys():
    service = ScriptedService(*letters("x"))
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"text": "b", "type": "text"}]
    messages = [{"role": "system", "content": "s"}, {"name": "ann", "content": parts, "role": "user"}]
    status, _ = await post(service, PATH, {**ASK, "messages": messages})
    assert status == 200
    [conversation] = service.conversations
    assert [list(message.items()) for message in conversation.messages] == [
        [("role", "system"), ("content", "s")],
        [("name", "ann"), ("content", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ("role", "user")],
    ]


async def test_template_fields_reach_the_template():
    service = ScriptedService(*letters("x"))
    given = {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "x"}], "reasoning_effort": "low"}
    for more in (
        {},
        {"add_generation_prompt": False, "chat_template": "rag"},
        {"continue_final_message": True, "add_special_tokens": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        given,
    ):
        status, answer = await post(service, PATH, {**ASK, **more})
        assert status == 200, answer
    plain, named, continued, continued_too, full = service.conversations
    assert (plain.add_generation_prompt, plain.continue_final_message, plain.template) == (True, False, None)
    assert (named.add_generation_prompt, named.template) == (False, "rag")
    assert (continued.add_generation_prompt, continued.continue_final_message) == (False, True)
    assert continued_too == continued
    assert (full.variables, full.documents, full.reasoning_effort) == tuple(given.values())
    assert [len(request.prompt) for request in service.requests] == [11, 11, 12, 11, 11]


async def test_a_streamed_answer():
    service = ScriptedService(*letters("ab"), *letters("cd", index=1, finish="stop"))
    events = await events_of(service, PATH, {**ASK, "n": 2, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 4
    for index, text, reason in ((0, "ab", "length"), (1, "cd", "stop")):
        mine = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == text
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [reason]
    assert all(e["object"] == "chat.completion.chunk" and e["usage"] is None for e in events[:-2])


async def test_a_stream_has_no_usage_unless_it_is_requested():
    events = await events_of(ScriptedService(*letters("ab")), PATH, ASK)
    assert not any("usage" in e for e in events[:-1])


async def test_log_probabilities_are_the_same_whole_and_streamed():
    def logprobs_at(token):
        return TokenLogprobs(token, -0.5, 1, [token, 0xE9], [-0.5, -3.0])

    service = ScriptedService(*letters("a", logprobs=logprobs_at))
    body = {**ASK, "logprobs": True, "top_logprobs": 2}
    _, answer = await post(service, PATH, body)
    expected = {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                    {"token": "é", "logprob": -3.0, "bytes": [0xC3, 0xA9]},
                ],
            }
        ],
        "refusal": None,
    }
    assert answer["choices"][0]["logprobs"] == expected
    events = await events_of(service, PATH, body)
    assert events[1]["choices"][0]["logprobs"] == expected
    assert [call.params.logprobs for call in service.requests] == [2, 2]


async def test_no_alternatives_may_be_asked_for_with_and_without_log_probabilities():
    status, answer = await post(ScriptedService(*letters("x")), PATH, {**ASK, "top_logprobs": 0})
    assert (status, answer["choices"][0]["logprobs"]) == (200, None)
    service = ScriptedService(*letters("x", logprobs=lambda token: TokenLogprobs(token, -0.5, 1, [], [])))
    _, answer = await post(service, PATH, {**ASK, "logprobs": True, "top_logprobs": 0})
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
