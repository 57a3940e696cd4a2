"""Tests of EngineClient with two engines: which engine a request goes to, and how streams move when an engine is lost."""

import asyncio

import pytest

from engine.errors import ContextTooLong, EngineUnavailable
from engine.messages import Abort, CacheReset, EngineStats, Heartbeat, ResetCache, Submit, Welcome
from engine.request import FinishReason
from tests.support.clock import Clock
from tests.support.engine_client import engine_client
from tests.unit.server.engines.scripted_engine import (
    ScriptedEngine,
    collect,
    next_event,
    outputs_of,
    read_until,
    request,
    tokens_of,
    until,
)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engines(tmp_path):
    pair = [ScriptedEngine(f"ipc://{tmp_path}/engine-{index}") for index in range(2)]
    for engine in pair:
        engine.start()
    yield pair
    for engine in pair:
        engine.close()


@pytest.fixture
async def client(engines, clock):
    client = engine_client([engine.endpoint for engine in engines], resume_timeout_s=30, max_queue=2, clock=clock)
    await client.start()
    for engine in engines:
        await engine.accept()
    await until(lambda: len(client._live_links()) == 2, "both engines are live")
    yield client
    await client.close()


def submit(client, *names, **changes):
    return {name: client.submit(request(name, **changes)) for name in names}


async def lose(client, engine):
    """Kill one engine and wait until the client has noticed."""
    engine.die()
    await until(lambda: len(client._live_links()) < 2, "the client notices the death")


async def test_requests_go_to_the_engine_with_the_fewest_streams(client, engines):
    first, second = engines
    streams = submit(client, "a", "b", "c", "d")
    assert await first.receive_ids(2) == ["a", "c"]
    assert await second.receive_ids(2) == ["b", "d"]
    for name in ("b", "d"):
        second.finish(name, 7)
        await collect(streams[name])
    submit(client, "e", "f")
    assert await second.receive_ids(2) == ["e", "f"]


async def test_a_fork_goes_to_the_engine_of_its_sibling(client, engines):
    submit(client, "a")
    for number in range(1, 4):
        client.submit(request(f"a-{number}", fork_of="a"))
    assert await engines[0].receive_ids(4) == ["a", "a-1", "a-2", "a-3"]


async def test_streams_of_a_dead_engine_move_to_the_other_one_at_once(client, engines):
    """No new engine replaces the dead one. Each stream still gets each of its tokens once, in order, and ends."""
    first, second = engines
    streams = submit(client, "a", "b", "c", "d", max_tokens=4)
    await first.receive_ids(2)
    await second.receive_ids(2)
    for name in ("a", "c"):
        first.send_tokens(name, 10)
    first.send_tokens("a", 11)
    for name in ("b", "d"):
        second.send_tokens(name, 10)
    assert await read_until(streams["a"], 2) == [10, 11]
    first.die()
    moved = [await second.receive(Submit) for _ in range(2)]
    assert {submit.request_id: (outputs_of(submit), submit.fork_of) for submit in moved} == {
        "a": ([10, 11], None),
        "c": ([10], None),
    }
    second.finish("a", 12, 13)
    for name in ("b", "c", "d"):
        second.finish(name, 11, 12, 13)
    assert await tokens_of(streams["a"]) == [12, 13]
    for name in ("b", "c", "d"):
        assert await tokens_of(streams[name]) == [10, 11, 12, 13]
    assert (client.health.ready, client.num_streams) == (True, 0)


async def test_a_stream_may_move_any_number_of_times(client, engines):
    stream = client.submit(request(max_tokens=100))
    here, there = engines
    for life in range(6):
        assert outputs_of(await here.receive(Submit)) == list(range(2 * life))
        here.send_tokens("r", 2 * life)
        here.send_tokens("r", 2 * life + 1)
        assert await read_until(stream, 2) == [2 * life, 2 * life + 1]
        await lose(client, here)
        here.start()
        await here.accept()
        await until(lambda: len(client._live_links()) == 2, "both engines are live")
        here, there = there, here
    await here.receive(Submit)
    here.finish("r", 12)
    assert await tokens_of(stream) == [12]


async def test_streams_wait_if_both_engines_are_dead_and_go_to_the_first_that_is_back(client, engines):
    first, second = engines
    streams = submit(client, "a", "b")
    for engine in engines:
        await engine.receive(Submit)
        engine.die()
    await until(lambda: not client.health.ready, "both deaths are noticed")
    streams |= submit(client, "c")
    second.start()
    await second.accept()
    assert sorted(await second.receive_ids(3)) == ["a", "b", "c"]
    for name in streams:
        second.finish(name, 7)
        assert await tokens_of(streams[name]) == [7]
    first.start()
    await first.accept()
    await until(lambda: len(client._live_links()) == 2, "both engines are live")
    submit(client, "d")
    assert await first.receive_ids(1) == ["d"]
    assert client.health.restarts == 2


async def test_streams_move_away_from_an_engine_that_dropped_this_worker(client, engines):
    first, second = engines
    streams = submit(client, "a", "b")
    await first.receive(Submit)
    await second.receive(Submit)
    first.send(Welcome(client.info))
    assert await second.receive_ids(1) == ["a"]
    second.finish("a", 7)
    assert await tokens_of(streams["a"]) == [7]


async def test_an_abort_reaches_the_engine_that_has_the_stream(client, engines):
    first, second = engines
    streams = submit(client, "a", "b")
    await first.receive(Submit)
    await second.receive(Submit)
    streams["b"].abort()
    submit(client, "c")
    assert (await second.receive(Abort)).request_ids == ["b"]
    assert await second.receive_ids(1) == ["c"]


async def test_one_suspect_at_a_time_is_at_an_engine_though_there_are_two(client, engines):
    first, second = engines
    streams = submit(client, "a", "b", "c", "d")
    await first.receive_ids(2)
    await second.receive_ids(2)
    await lose(client, first)
    assert await second.receive_ids(2) == ["a", "c"]
    first.start()
    await first.accept()
    await until(lambda: len(client._live_links()) == 2, "both engines are live")
    await lose(client, second)  # "a" and "c" are charged with two deaths now, "b" and "d" with one
    assert await first.receive_ids(3) == ["b", "d", "a"]
    second.start()
    await second.accept()
    await until(lambda: len(client._live_links()) == 2, "both engines are live")
    submit(client, "last")
    assert await second.receive_ids(1) == ["last"]
    first.finish("a", 7)
    assert await tokens_of(streams["a"]) == [7]
    assert await second.receive_ids(1) == ["c"]


async def test_an_engine_that_hangs_gets_no_new_requests(client, engines, clock):
    first, second = engines
    first.send(Heartbeat(EngineStats(step=1, running=1)))
    second.send(Heartbeat(EngineStats(step=1)))
    await until(lambda: client.health.stats == EngineStats(step=2, running=1), "both heartbeats")
    clock.now += 31.0  # stall_timeout_s is 30
    second.send(Heartbeat(EngineStats(step=2)))
    await until(lambda: client.health.ready, "a heartbeat of the second engine")
    submit(client, "a", "b")
    assert await second.receive_ids(2) == ["a", "b"]


async def test_health_covers_both_engines(client, engines):
    first, second = engines
    first.send(Heartbeat(EngineStats(step=3, running=1, output_tokens=10, step_seconds=0.5)))
    second.send(Heartbeat(EngineStats(step=4, waiting=2, output_tokens=20, step_seconds=0.25)))
    total = EngineStats(step=7, running=1, waiting=2, output_tokens=30, step_seconds=0.75)
    await until(lambda: client.health.stats == total, "both heartbeats")
    await lose(client, first)
    assert client.health.ready
    second.die()
    await until(lambda: not client.health.ready, "the second death is noticed")
    assert client.health.reason == "the engine is restarting"


class TestContextsThatDiffer:
    @pytest.fixture
    def engines(self, tmp_path):
        pair = [ScriptedEngine(f"ipc://{tmp_path}/small", max_model_len=6), ScriptedEngine(f"ipc://{tmp_path}/large")]
        for engine in pair:
            engine.start()
        yield pair
        for engine in pair:
            engine.close()

    async def test_a_request_goes_to_an_engine_that_can_hold_it(self, client, engines):
        small, large = engines
        assert client.info.limits.max_model_len == 512
        submit(client, "a", "b", max_tokens=8)
        assert await large.receive_ids(2) == ["a", "b"]
        submit(client, "c", max_tokens=4)
        assert await small.receive_ids(1) == ["c"]

    async def test_a_stream_that_moves_to_a_smaller_context_goes_as_far_as_it_can(self, client, engines):
        small, large = engines
        stream = client.submit(request(max_tokens=8))
        await large.receive(Submit)
        large.send_tokens("r", 10)
        await read_until(stream, 1)
        large.die()
        moved = await small.receive(Submit)
        assert (outputs_of(moved), moved.params.max_tokens) == ([10], 4)
        small.finish("r", 11, 12, 13, finish=FinishReason.LENGTH)
        assert await read_until(stream, 3) == [11, 12, 13]
        with pytest.raises(ContextTooLong, match="context of 6 tokens"):
            await next_event(stream)


async def answer_reset(engine, tiers, **blocks):
    message = await engine.receive(ResetCache)
    assert message.tiers == tiers
    engine.send(CacheReset(message.number, blocks))


async def test_a_reset_adds_up_the_blocks_of_all_engines(client, engines):
    for _ in range(2):
        reset = asyncio.create_task(client.reset_cache(["gpu", "host"]))
        await answer_reset(engines[0], ["gpu", "host"], gpu=3, host=0)
        await answer_reset(engines[1], ["gpu", "host"], gpu=4, host=5)
        assert await reset == {"gpu": 7, "host": 5}


async def test_no_cache_is_reset_while_an_engine_is_not_ready(client, engines):
    await lose(client, engines[1])
    with pytest.raises(EngineUnavailable, match=r"engine 1 is not ready \(the engine is restarting\): no cache was reset"):
        await client.reset_cache(["gpu"])
    await engines[0].receives_nothing_else(client)


async def test_a_reset_names_the_engine_that_is_lost_meanwhile(client, engines):
    reset = asyncio.create_task(client.reset_cache(["gpu"]))
    await answer_reset(engines[0], ["gpu"], gpu=3)
    await engines[1].receive(ResetCache)
    await lose(client, engines[1])
    with pytest.raises(EngineUnavailable, match="engine 1 was lost before it answered: its cache may not be reset"):
        await reset


async def test_a_reset_names_the_engine_that_does_not_answer_in_time(engines):
    client = engine_client([engine.endpoint for engine in engines], stall_timeout_s=0.2)
    await client.start()
    for engine in engines:
        await engine.accept()
    await until(lambda: len(client._live_links()) == 2, "both engines are live")
    reset = asyncio.create_task(client.reset_cache(["gpu"]))
    await answer_reset(engines[1], ["gpu"], gpu=3)
    late = await engines[0].receive(ResetCache)
    with pytest.raises(EngineUnavailable, match=r"engine 0 did not answer within 0\.2 s"):
        await reset
    engines[0].send(CacheReset(late.number, {"gpu": 1}))  # too late, and harmless
    reset = asyncio.create_task(client.reset_cache(["gpu"]))
    await answer_reset(engines[0], ["gpu"], gpu=8)
    await answer_reset(engines[1], ["gpu"], gpu=2)
    assert await reset == {"gpu": 10}
    await client.close()
