"""Tests the options of a stream that OpenAI's routes have: usage at the end, usage in each event, obfuscation."""

import pytest

from engine.request import CachedTokens
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import events_of

PLAIN = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


class Measured(ScriptedService):
    """A service that reports the tokens of the prompt, as the real one does."""

    async def generate(self, request, identity, *, transport="http"):
        request.progress.prompt_tokens, request.progress.cached = 3, CachedTokens(gpu=1)
        async for item in super().generate(request, identity, transport=transport):
            yield item


def usage(completion, prompt=3, cached=1):
    total = prompt + completion
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


async def stream(path, options, more=None, text="abc"):
    events = await events_of(Measured(*letters(text)), path, {**PLAIN[path], **(more or {}), "stream_options": options})
    assert events.pop() == "[DONE]"
    return events


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("more", [{}, {"n": 1, "stop": ["zz"]}])
async def test_each_event_has_the_usage_so_far(path, last, more):
    events = await stream(path, {"include_usage": last, "continuous_usage_stats": True}, more)
    if last:
        end = events.pop()
        assert (end["choices"], end["usage"]) == ([], usage(3))
    texts = [event for event in events if "content" in event["choices"][0].get("delta", event["choices"][0] | {"content": ""})]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert all(event["usage"] == usage(count) for event, count in zip(events, counts, strict=True))
    assert texts


async def test_the_usage_so_far_counts_all_prompts_and_outputs():
    service = Measured(*letters("ab"), *letters("cd", index=1))
    body = {"prompt": ["x", "y"], "n": 2, "stream_options": {"continuous_usage_stats": True, "include_usage": True}}
    events = await events_of(service, "/v1/completions", body)
    assert events[-3]["usage"] == events[-2]["usage"] == usage(8, 6, 2)


@pytest.mark.parametrize("path", PLAIN)
async def test_without_the_option_only_the_last_event_has_a_usage(path):
    events = await stream(path, {"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["usage"] == usage(3)
    assert all("usage" not in event for event in await stream(path, {}))


def text_of(event):
    choice = event["choices"][0]
    return choice["delta"].get("content", "") if "delta" in choice else choice["text"]


@pytest.mark.parametrize("path", PLAIN)
async def test_obfuscation_hides_the_length_of_the_text(path):
    text = "a日" * 20 + "🌊"
    events = await stream(path, {"include_obfuscation": True}, text=text)
    assert "".join(map(text_of, events)) == text
    assert {(len(text_of(event).encode()) + len(event["obfuscation"])) % 32 for event in events} == {0}
    assert len({event["obfuscation"] for event in events}) > len(events) // 2
    for options in ({}, {"include_obfuscation": False}):
        assert not any("obfuscation" in event for event in await stream(path, options))
