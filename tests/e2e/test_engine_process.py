"""Tests EngineClient with real engine processes when an engine or a worker dies, hangs or sends rubbish."""

import asyncio
import contextlib
import signal
import time

import msgspec
import psutil
import pytest
import zmq

from engine.config import CacheConfig, EngineConfig, FakeConfig, SchedulerConfig
from engine.errors import Aborted, ContextTooLong, EngineUnavailable, InternalError, InvalidRequest
from engine.messages import Heartbeat, Hello, Submit, Welcome, decode_engine_message, encode, pack_tokens
from engine.request import FinishReason, SamplingParams
from server.bundled import bundled_checkpoint
from tests.support.children import EngineChild, wait_until
from tests.support.engine_client import engine_client


def config(**changes):
    base = EngineConfig(
        model=str(bundled_checkpoint()),
        runner="fake",
        debug_checks=True,
        cache=CacheConfig(block_size=16, num_blocks=1024),
        scheduler=SchedulerConfig(max_num_seqs=64),
        fake=FakeConfig(step_ms=5),
    )
    return msgspec.structs.replace(base, **changes)


@pytest.fixture
def engine():
    with EngineChild(config()) as child:
        yield child


@contextlib.asynccontextmanager
async def connected(engine, worker="api 0", **options):
    """Yield an EngineClient that has connected to its engines. `engine` is one EngineChild or a list of them."""
    engines = engine if isinstance(engine, list) else [engine]
    client = engine_client([engine.endpoint for engine in engines], worker, **options)
    await client.start()
    try:
        await client.wait_ready(30)
        yield client
    finally:
        await client.close()


def ask(number, max_tokens=100, **changes):
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prompt = [2 + (number * 7 + i) % 200 for i in range(20 + number)]
    return Submit(request_id=f"r{number}", prompt=pack_tokens(prompt), params=params, seed=number, **changes)


async def collect(stream, first=None):
    """Return the tokens of a stream and its finish reason. The event `first` is set when the first token has come."""
    tokens, finish = [], None
    async for event in stream:
        tokens += event.tokens
        finish = event.finish
        if first is not None:
            first.set()
    return tokens, finish


async def until(condition, what, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain: {what}"
        await asyncio.sleep(0.01)


async def test_streams_survive_the_engines_death_with_the_same_tokens(engine):
    async with connected(engine) as client:
        undisturbed = await asyncio.gather(*(collect(client.submit(ask(i))) for i in range(32)))
        firsts = [asyncio.Event() for _ in range(32)]
        tasks = [asyncio.create_task(collect(client.submit(ask(i)), firsts[i])) for i in range(32)]
        await asyncio.gather(*(first.wait() for first in firsts))
        engine.kill()
        await until(lambda: not client.health.ready, "the death is noticed")
        assert not all(task.done() for task in tasks), "killed too late: nothing was in flight"
        meanwhile = client.submit(ask(99, max_tokens=5))
        engine.start()
        assert await asyncio.gather(*tasks) == undisturbed
        assert all(len(tokens) == 100 and finish is FinishReason.LENGTH for tokens, finish in undisturbed)
        assert len((await collect(meanwhile))[0]) == 5
        assert client.health.restarts == 1
        await until(lambda: client.health.ready and client.health.stats.running == 0, "idle again")


async def test_streams_of_a_killed_engine_move_to_the_other_engine_at_once(engine):
    """The test does not restart the killed engine. Each stream must get each token of an undisturbed run exactly once."""
    with EngineChild(config()) as other:
        async with connected([engine, other]) as client:
            await until(lambda: client.health.stats and len(client._live_links()) == 2, "both engines are live", 30)
            undisturbed = await asyncio.gather(*(collect(client.submit(ask(i))) for i in range(32)))
            firsts = [asyncio.Event() for _ in range(32)]
            tasks = [asyncio.create_task(collect(client.submit(ask(i)), firsts[i])) for i in range(32)]
            await asyncio.gather(*(first.wait() for first in firsts))
            assert [len(link.sent) for link in client._links] == [16, 16]
            engine.kill()
            await until(lambda: len(client._live_links()) == 1, "the death is noticed")
            assert client.health.ready
            assert not all(task.done() for task in tasks), "killed too late: nothing was in flight"
            assert await asyncio.gather(*tasks) == undisturbed
            assert all(len(tokens) == 100 and finish is FinishReason.LENGTH for tokens, finish in undisturbed)


async def test_streams_that_progress_on_each_engine_survive_any_number_of_kills(engine):
    """With `max_deaths=1`, a stream ends at the first engine death that it may have caused. A death does not count if the stream
    got tokens from that engine before."""
    async with connected(engine, max_deaths=1) as client:
        undisturbed = await asyncio.gather(*(collect(client.submit(ask(i, max_tokens=400))) for i in range(8)))
        streams = [client.submit(ask(i, max_tokens=400)) for i in range(8)]
        tasks = [asyncio.create_task(collect(stream)) for stream in streams]
        for restarts in (1, 2, 3):
            await until(lambda: all(stream.has_progressed for stream in streams), "all streams progress", 30)
            engine.kill()
            assert not any(task.done() for task in tasks), "killed too late: a stream had ended"
            engine.start()
            await until(lambda restarts=restarts: client.health.restarts == restarts, "the engine is back", 30)
        assert await asyncio.gather(*tasks) == undisturbed


async def test_an_engine_that_restarts_with_a_smaller_context_serves_what_still_fits(engine):
    async with connected(engine) as client:
        (short, _), (long, _) = [await collect(client.submit(ask(i, max_tokens))) for i, max_tokens in ((1, 40), (2, 200))]
        streams = [client.submit(ask(1, max_tokens=40)), client.submit(ask(2, max_tokens=200))]
        tokens = [[], []]

        async def read(index):
            async for event in streams[index]:
                tokens[index] += event.tokens

        tasks = [asyncio.create_task(read(index)) for index in range(2)]
        await until(lambda: all(tokens), "both streams have tokens")
        engine.kill()
        assert not any(task.done() for task in tasks), "killed too late: a stream had ended"
        engine.start(config(max_model_len=64))
        with pytest.raises(ContextTooLong, match=r"context of 64 tokens .* needs 222 \(prompt 22, max_tokens 200\)"):
            await asyncio.wait_for(tasks[1], 30)
        await asyncio.wait_for(tasks[0], 30)
        assert tokens == [short, long[: 64 - 22]]
        assert client.info.limits.max_model_len == 64


async def test_a_request_that_engines_die_of_is_ended():
    """The test kills each engine during the request's first step, which takes a minute, until `max_deaths` is reached."""
    with EngineChild(config(fake=FakeConfig(step_ms=60_000))) as engine:
        async with connected(engine, max_deaths=2) as client:
            task = asyncio.create_task(collect(client.submit(ask(1, max_tokens=400))))
            for restarts in (1, 2):
                await until(lambda: client.health.stats and client.health.stats.waiting + client.health.stats.running, "has it")
                engine.kill()
                engine.start()
                await until(lambda restarts=restarts: client.health.restarts == restarts, "back", 20)
            with pytest.raises(InternalError, match="died 2 times"):
                await task


async def test_streams_end_when_no_engine_comes_back(engine):
    async with connected(engine, resume_timeout_s=0.5) as client:
        task = asyncio.create_task(collect(client.submit(ask(1, max_tokens=400))))
        await until(lambda: client.health.stats and client.health.stats.running, "running")
        engine.kill()
        with pytest.raises(EngineUnavailable, match=r"within 0\.5 s"):
            await asyncio.wait_for(task, 20)


async def test_abort_frees_the_blocks_within_two_steps_and_wakes_the_consumer(engine):
    async with connected(engine) as client:
        stream = client.submit(ask(1, max_tokens=400))
        received = 0
        while received < 20:
            received += len((await anext(stream)).tokens)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.abort()
        stream.abort()
        with pytest.raises(Aborted):
            await waiting
        await until(lambda: client.health.stats.running == 0 and client.health.stats.num_aborted == 1, "freed")
        assert client.health.stats.blocks_used == 0
        assert client.health.stats.output_tokens - received <= 2  # a stream gets one token in a step
        assert client.num_streams == 0


@pytest.mark.parametrize(
    ("submit", "error"),
    [
        (Submit(request_id="x", prompt=b"", params=SamplingParams(), seed=1), InvalidRequest),
        (Submit(request_id="x", prompt=pack_tokens([10**6]), params=SamplingParams(), seed=1), InvalidRequest),
        (Submit(request_id="x", prompt=pack_tokens([5] * 10**5), params=SamplingParams(), seed=1), ContextTooLong),
    ],
    ids=["empty", "unknown token", "too long"],
)
async def test_a_refusal_is_raised_by_the_stream(engine, submit, error):
    async with connected(engine) as client:
        with pytest.raises(error):
            await collect(client.submit(submit))
        assert (await collect(client.submit(ask(1, max_tokens=5))))[1] is FinishReason.LENGTH


async def test_events_that_arrive_faster_than_they_are_read_are_merged(engine):
    async with connected(engine) as client:
        stream = client.submit(ask(1, max_tokens=20))
        await until(lambda: client.health.stats and client.health.stats.num_finished == 1, "all tokens have arrived")
        events = [event async for event in stream]
        assert len(events) == 1
        assert len(events[0].tokens) == 20


async def test_a_restarted_worker_finds_nothing_of_its_earlier_requests(engine):
    """A worker that is killed and started again has the same name. The engine aborts the requests that this worker sent before,
    and continues the requests of other workers."""
    async with connected(engine, "api 1") as neighbour:
        kept = asyncio.create_task(collect(neighbour.submit(ask(5))))
        async with connected(engine, "api 0") as first:
            first.submit(ask(1, max_tokens=450))
            await until(lambda: first.health.stats and first.health.stats.running == 2, "both run")
            async with connected(engine, "api 0") as second:
                stream = second.submit(ask(1, max_tokens=50))  # the earlier request had the same request id
                assert len((await collect(stream))[0]) == 50
                assert second.health.stats.num_aborted >= 1
        assert len((await kept)[0]) == 100


async def test_requests_of_a_worker_that_disappears_are_aborted(engine):
    async with connected(engine, "api 1") as witness:
        gone = engine_client([engine.endpoint], "api 0")
        await gone.start()
        await gone.wait_ready(10)
        gone.submit(ask(1, max_tokens=450))
        await until(lambda: witness.health.stats and witness.health.stats.running == 1, "running")
        await gone.close()  # closing sends nothing to the engine
        await until(lambda: witness.health.stats.running == 0, "aborted")
        assert witness.health.stats.num_aborted == 1
        assert witness.health.stats.blocks_used == 0


async def test_a_stopped_engine_is_not_ready(engine):
    async with connected(engine, stall_timeout_s=0.5) as client:
        await until(lambda: client.health.ready, "ready")
        engine.send(signal.SIGSTOP)
        await until(lambda: not client.health.ready, "idle and stopped")
        assert "heartbeat" in client.health.reason
        engine.send(signal.SIGCONT)
        await until(lambda: client.health.ready, "ready again")
        task = asyncio.create_task(collect(client.submit(ask(1, max_tokens=300))))
        await until(lambda: client.health.stats.running, "busy")
        engine.send(signal.SIGSTOP)
        await until(lambda: not client.health.ready, "busy and stopped")
        assert "step" in client.health.reason
        engine.send(signal.SIGCONT)
        assert len((await task)[0]) == 300


def test_rubbish_is_dropped_and_a_worker_that_never_reads_delays_no_other():
    """The engine drops messages that it cannot read. It drops a worker that never reads once the worker's queue is full, and
    other workers get their tokens meanwhile."""
    with EngineChild(config(debug_checks=False, fake=FakeConfig(step_ms=0))) as engine:
        context = zmq.Context()
        stuck, other = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        for sock in (stuck, other):
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.RCVTIMEO, 20000)
        stuck.setsockopt(zmq.RCVHWM, 1)
        stuck.connect(engine.endpoint)
        other.connect(engine.endpoint)
        try:
            for rubbish in (b"", b"\xc1", b"hello", msgspec.msgpack.encode({"type": "Submit"}), b"\x93\x01"):
                other.send(rubbish)
            other.send(encode(Hello("other")))
            assert isinstance(decode_engine_message(other.recv()), Welcome)
            stuck.send(encode(Hello("stuck")))
            for number in range(2000):
                stuck.send(encode(rename(number)))
            dropped = False
            until = time.monotonic() + 60
            while not dropped and time.monotonic() < until:
                message = decode_engine_message(other.recv())
                assert isinstance(message, Heartbeat)
                dropped = '"worker dropped"' in engine.log.read_text()
            assert dropped
            other.send(encode(ask(7, max_tokens=3)))
            tokens = []
            while len(tokens) < 3:
                message = decode_engine_message(other.recv())
                tokens += [] if isinstance(message, Heartbeat) else message.events[0].tokens
        finally:
            stuck.close()
            other.close()
            context.term()


def rename(number):
    return msgspec.structs.replace(ask(number % 100, max_tokens=400), request_id=f"stuck-{number}")


def test_sigterm_ends_an_engine_cleanly_and_at_once(engine):
    wait_until(lambda: "engine ready" in engine.log.read_text(), "ready")
    assert psutil.Process(engine.process.pid).cmdline()[0] == "tidegate: engine 0"
    engine.send(signal.SIGTERM)
    assert engine.wait(5) == 0
    assert "Traceback" not in engine.log.read_text()


def test_an_engine_ends_with_its_parent_even_while_it_is_stopped(engine):
    wait_until(lambda: "engine ready" in engine.log.read_text(), "ready")
    engine.process.stdin.close()
    assert engine.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("changes", [{"model": "/nowhere"}, {"max_model_len": 10**9}], ids=["checkpoint", "setting"])
def test_a_wrong_setting_ends_the_engine_with_one_message(changes):
    with EngineChild(config(**changes)) as engine:
        assert engine.wait(30) == 2
        lines = [line for line in engine.log.read_text().splitlines() if '"error"' in line]
        assert len(lines) == 1
        assert "Traceback" not in engine.log.read_text()
