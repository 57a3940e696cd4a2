"""Tests of calls that end early: closed, cancelled, aborted, past the deadline, not read, refused, or without an engine."""

import asyncio
import contextlib

import msgspec
import pytest

from engine.errors import (
    Aborted,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
)
from engine.request import TokenEvent
from server.service import call as call_module
from server.service.types import Chunk
from tests.support.local_engine import until
from tests.unit.server.service.calls import counts, outputs_of, request, running


@pytest.mark.parametrize(("n", "num_prompts"), [(1, 1), (3, 1), (1, 8)])
async def test_a_call_whose_client_does_not_read_is_ended(service, engine, monkeypatch, n, num_prompts):
    """When the call is ended, its unread events are dropped at once. The client gets the error when it reads again."""
    monkeypatch.setattr(call_module, "UNREAD_LIMIT", 600)
    monkeypatch.setattr(call_module, "UNREAD_SECONDS", 0.01)
    sent = msgspec.structs.replace(request(max_tokens=400, n=n, logprobs=5), num_prompts=num_prompts)
    async with contextlib.aclosing(service.generate(sent)) as stream:
        await anext(stream)
        await until(lambda: len(engine.aborted) == n or engine.idle)
        assert all(held.unread == 0 for held in service._calls["r"]._streams.values())
        with pytest.raises(RequestTimeout, match="does not read"):
            await anext(stream)
    assert counts(service)["failed"] == 1


@pytest.mark.parametrize("n", [1, 3])
async def test_falling_behind_once_is_no_reason_to_end_a_call(service, engine, monkeypatch, n):
    """After a pause of the event loop, many events of every call arrive together. A single check must therefore end no call."""
    monkeypatch.setattr(call_module, "UNREAD_LIMIT", 100)
    monkeypatch.setattr(call_module, "UNREAD_SECONDS", 60)
    stream = service.generate(request(max_tokens=400, n=n))
    num_tokens = len((await anext(stream)).token_ids)
    await until(lambda: engine.idle)
    call = service._calls["r"]
    assert sum(held.unread for held in call._streams.values()) > 100
    call._check_unread()
    async for item in stream:
        if isinstance(item, Chunk):
            num_tokens += len(item.token_ids)
    assert num_tokens == n * 400


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_the_generator_aborts_all_outputs_at_once(service, engine, n):
    stream = await running(service, request(max_tokens=400, n=n))
    await stream.aclose()
    assert engine.aborted == ["r", "r-1", "r-2"][:n]
    assert service.num_running == 0
    assert counts(service)["aborted"] == 1


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_task_aborts_all_outputs_at_once(service, engine, n):
    engine.pause()
    task = asyncio.create_task(outputs_of(service, request(max_tokens=400, n=n)))
    await until(lambda: len(engine.submitted) == n)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(engine.aborted) == n
    assert counts(service)["aborted"] == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_abort_ends_a_call_by_its_id(service, engine, n):
    stream = await running(service, request(max_tokens=400, n=n))
    assert service.abort("r")
    assert len(engine.aborted) == n
    with pytest.raises(Aborted):
        await anext(stream)
    assert not service.abort("r")
    assert counts(service)["aborted"] == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_a_call_that_waits_for_the_engine_ends_when_it_is_aborted(service, engine, n):
    engine.pause()
    task = asyncio.create_task(outputs_of(service, request(n=n)))
    await until(lambda: len(engine.submitted) == n)
    service.abort("r")
    with pytest.raises(Aborted):
        await task


@pytest.mark.parametrize("n", [1, 2])
async def test_a_deadline_ends_all_outputs(service, engine, n):
    engine.pause()
    with pytest.raises(RequestTimeout, match=r"0\.05 s"):
        await outputs_of(service, request(deadline_s=0.05, n=n))
    assert len(engine.aborted) == n
    assert counts(service)["failed"] == 1


async def test_an_id_that_is_running_is_refused_and_its_call_continues(service):
    stream = await running(service, request(max_tokens=30))
    with pytest.raises(InvalidRequest):
        await outputs_of(service, request())
    assert service.num_running == 1
    assert sum([len(item.token_ids) async for item in stream if isinstance(item, Chunk)]) == 29


async def test_a_request_without_an_engine_fails(service, engine):
    engine.unavailable = "it is starting"
    with pytest.raises(EngineUnavailable, match="starting"):
        await outputs_of(service, request())
    assert not service.health().ready
    assert counts(service)["failed"] == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_an_engine_that_is_lost_ends_the_call(service, engine, n):
    stream = await running(service, request(max_tokens=400, n=n))
    engine.fail(EngineUnavailable("the engine died"))
    with pytest.raises(EngineUnavailable):
        async for _ in stream:
            pass
    assert counts(service)["failed"] == 1


async def test_a_full_queue_leaves_no_output_running(service, engine):
    engine.pause()
    streams = [service.generate(request(id=f"q{i}")) for i in range(63)]
    waiting = [asyncio.create_task(anext(stream)) for stream in streams]
    await until(lambda: len(engine.submitted) == 63)
    with pytest.raises(Overloaded):
        await outputs_of(service, request(n=2))
    assert engine.aborted == ["r"]
    engine.resume()
    await asyncio.gather(*waiting)
    for stream in streams:
        await stream.aclose()


class BrokenStream:
    def __init__(self, id):
        self.events = [TokenEvent(id, [5])]

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.events:
            raise StopAsyncIteration
        return self.events.pop()

    def abort(self):
        pass


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_without_a_last_event_is_an_internal_error(service, engine, monkeypatch, n):
    monkeypatch.setattr(engine, "submit", lambda submit: BrokenStream(submit.request_id))
    with pytest.raises(InternalError, match="without a last one"):
        await outputs_of(service, request(n=n))
    assert counts(service)["failed"] == 1
