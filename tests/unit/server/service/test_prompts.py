"""Tests of the prompt, priority, salt and tenant that the engine gets for a request's text, messages and identity."""

import asyncio
import threading
from types import SimpleNamespace

import msgspec
import pytest

from engine.errors import (
    Aborted,
    ContextTooLong,
    InvalidRequest,
    RequestTimeout,
    UnknownModel,
)
from engine.messages import unpack_tokens
from server.metrics.registry import Metrics
from server.service import text_work
from server.service.service import GenerateService
from server.service.types import Identity
from server.text.chat import ChatTemplate
from server.text.conversation import Conversation
from server.text.tokenizer import Tokenizer
from tests.support.local_engine import until
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.unit.server.service.calls import SETTINGS, TEXT, counts, outputs_of, request


async def test_text_is_tokenised_with_and_without_special_tokens(service, engine):
    await outputs_of(service, request("Hello", id="a"))
    ids = await service.tokenize("Hello")
    assert (
        list(unpack_tokens(engine.submitted[0].prompt)) == ids == [0, *await service.tokenize("Hello", add_special_tokens=False)]
    )
    assert await service.detokenize(ids, skip_special_tokens=True) == "Hello"
    assert await service.detokenize(ids) == "<|begin|>Hello"


LONG_TEXT = "tide " * 40


@pytest.fixture
def held_tokenizer(monkeypatch):
    """Make the tokenizer wait with texts of more than 100 characters until `release` is set. It sets `entered` when it waits."""
    held = SimpleNamespace(entered=threading.Event(), release=threading.Event())
    monkeypatch.setattr(text_work, "INLINE_CHARS", 100)

    def encode(self, piece):
        if len(piece) > 100:
            held.entered.set()
            assert held.release.wait(30)
        return encode_now(self, piece)

    encode_now = Tokenizer._encode_piece
    monkeypatch.setattr(Tokenizer, "_encode_piece", encode)
    yield held
    held.release.set()


async def test_the_deadline_includes_the_time_of_tokenising(service, engine, held_tokenizer):
    with pytest.raises(RequestTimeout):
        await outputs_of(service, request(LONG_TEXT, deadline_s=0.02))
    assert not held_tokenizer.release.is_set()  # the call has ended before the tokenizer
    assert not engine.submitted
    assert counts(service)["failed"] == 1


async def test_a_call_that_is_being_tokenised_can_be_aborted(service, engine, held_tokenizer):
    task = asyncio.create_task(outputs_of(service, request(LONG_TEXT)))
    await until(held_tokenizer.entered.is_set)
    assert service.abort("r")
    with pytest.raises(Aborted):
        await task
    assert not engine.submitted
    assert counts(service) == {"started": 1, "finished": 0, "aborted": 1, "failed": 0, "running": 0}


async def test_other_calls_run_while_a_long_text_is_tokenised(service, held_tokenizer):
    long = asyncio.create_task(outputs_of(service, request(LONG_TEXT, id="long", max_tokens=1)))
    await until(held_tokenizer.entered.is_set)
    [(tokens, _, _)], _ = await outputs_of(service, request("Hello", id="short", max_tokens=20))
    assert len(tokens) == 20
    assert not long.done()
    long.cancel()


@pytest.mark.parametrize("prompt", ["a " * 2_000_000, "a" * 3_000_000, "tide gate, " * 1000, [5] * 512, [5] * 600])
async def test_a_prompt_that_cannot_fit_is_refused(service, engine, prompt):
    with pytest.raises(ContextTooLong, match="maximum context length is 512") as caught:
        await outputs_of(service, request(prompt))
    assert caught.value.param == "prompt"
    is_text = isinstance(prompt, str)
    refused = service.tokenize(prompt, as_prompt=True) if is_text else service.prompt_text(None, prompt, skip_special_tokens=True)
    with pytest.raises(ContextTooLong):
        await refused
    assert not engine.submitted


async def test_a_chat_that_cannot_fit_is_refused(service):
    with pytest.raises(ContextTooLong) as caught:
        await service.chat_tokens(Conversation(messages=[{"role": "user", "content": "tide " * 100_000}]), as_prompt=True)
    assert caught.value.param == "messages"


async def test_a_prompt_that_just_fits_is_accepted(service, engine):
    await outputs_of(service, request("a" + " a" * 509, max_tokens=1))
    assert engine.submitted[0].num_prompt == 511
    with pytest.raises(ContextTooLong):
        await outputs_of(service, request("a" + " a" * 510, max_tokens=1))


async def test_a_long_text_can_be_tokenised_and_come_back(service):
    text = "The tide gate lets the water through. " * 3000
    ids = await service.tokenize(text)
    assert ids == TEXT._tokenizer.encode(text).ids
    assert await service.detokenize(ids, skip_special_tokens=True) == text
    with pytest.raises(InvalidRequest, match="tokens has token id 512"):
        await service.detokenize([*ids, 512])


@pytest.mark.parametrize(
    ("ceiling", "priority", "submitted"),
    [(-1000, -1000, -1000), (-1000, 7, 7), (0, 0, 0), (0, 5, 5), (-3, None, 0), (0, None, 0), (3, None, 3), (3, 3, 3)],
)
async def test_an_identity_bounds_the_priority(service, engine, ceiling, priority, submitted):
    sent = msgspec.structs.replace(request(n=2), priority=priority)
    await outputs_of(service, sent, Identity(priority_ceiling=ceiling))
    assert [submit.priority for submit in engine.submitted] == [submitted, submitted]


@pytest.mark.parametrize(("ceiling", "priority"), [(0, -1), (3, 0), (3, -1000)])
async def test_a_priority_above_the_ceiling_is_refused_with_the_ceiling(service, engine, ceiling, priority):
    with pytest.raises(InvalidRequest, match=f"^priority is {priority}: it must be at least {ceiling}, ") as caught:
        await outputs_of(service, msgspec.structs.replace(request(), priority=priority), Identity(priority_ceiling=ceiling))
    assert (caught.value.param, engine.submitted) == ("priority", [])


@pytest.mark.parametrize("priority", [-1001, 1001])
async def test_a_priority_out_of_range_is_refused_also_under_a_ceiling(service, priority):
    with pytest.raises(InvalidRequest, match="must lie between -1000 and 1000") as caught:
        await outputs_of(service, msgspec.structs.replace(request(), priority=priority), Identity(priority_ceiling=5))
    assert caught.value.param == "priority"


async def test_identities_with_different_salts_do_not_share_a_prefix(service, engine):
    prompt, cached = list(range(2, 66)), []
    for i, salt in enumerate(["", "a", "a", "b", ""]):
        _, ending = await outputs_of(service, request(prompt, id=f"r{i}", n=2), Identity(salt=salt))
        cached.append(ending.usage.cached_tokens)
    assert cached == [0, 0, 48, 0, 48]
    assert [submit.salt for submit in engine.submitted] == ["", "", "a", "a", "a", "a", "b", "b", "", ""]


async def test_chat_messages_become_the_prompt_of_the_template(service, monkeypatch):
    monkeypatch.setattr(text_work, "INLINE_CHARS", 100)
    tokens = await service.chat_tokens(Conversation(messages=[{"role": "user", "content": "Hi"}]))
    assert tokens[:1] == [0]
    assert TEXT.decode(tokens) == "Hi"
    long = await service.chat_tokens(Conversation(messages=[{"role": "user", "content": "Hi " * 150}]))
    assert TEXT.decode(long) == "Hi " * 150
    with pytest.raises(InvalidRequest, match="roles"):
        await service.chat_tokens(Conversation(messages=[{"role": "tool", "content": "Hi"}]))
    with pytest.raises(InvalidRequest) as caught:
        await service.chat_tokens(Conversation(messages=[{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]))
    assert caught.value.param == "messages[0]"


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("messages[0]", {"messages": [{"role": "user", "content": "x", "name": "\ud800"}]}),
        ("chat_template_kwargs", {"variables": {"x": [{"\udfff": 1}]}}),
        ("documents", {"documents": [{"text": "\ud800"}]}),
    ],
)
async def test_half_a_character_is_refused_wherever_it_is(service, field, more):
    conversation = Conversation(**{"messages": [{"role": "user", "content": "Hi"}], **more})
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        await service.chat_tokens(conversation)
    assert caught.value.param == field


async def test_a_chat_of_another_model_is_refused_before_it_is_rendered(service):
    with pytest.raises(UnknownModel):
        await service.chat_tokens(Conversation(messages=[{"role": "tool", "content": "Hi"}]), model="other")


@pytest.mark.parametrize(
    ("num_messages", "text", "lane"),
    [
        (1, "x", "MainThread"),
        (40, "x", "tidegate-text-short"),
        (4000, "x", "tidegate-text-chat"),
        (1, "x" * 20_000, "tidegate-text-chat"),
    ],
)
async def test_the_work_of_a_chat_decides_where_it_is_rendered(service, monkeypatch, num_messages, text, lane):
    threads = []

    def render(self, conversation):
        threads.append(threading.current_thread().name)
        return "x"

    monkeypatch.setattr(ChatTemplate, "render", render)
    await service.chat_tokens(Conversation(messages=[{"role": "user", "content": text}] * num_messages))
    assert threads[0].startswith(lane)


async def test_a_chat_to_tokenise_may_be_longer_than_a_prompt(service):
    tokens = await service.chat_tokens(Conversation(messages=[{"role": "user", "content": "tide " * 1000}]))
    assert len(tokens) > service.max_model_len


async def test_a_model_without_a_chat_template_says_so(engine):
    service = GenerateService(engine, Tokenizer(tiny_tokenizer()), SETTINGS, Metrics("tiny", lambda: engine.health))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await service.chat_tokens(Conversation(messages=[{"role": "user", "content": "Hi"}]))
