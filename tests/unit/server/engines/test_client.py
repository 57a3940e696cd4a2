"""EngineClient against an engine that says what the test wants, when it wants. Real deaths are in tests/e2e."""

import asyncio
import time

import msgspec
import pytest
import zmq

from engine.config import ModelLimits
from engine.errors import EngineUnavailable, InternalError, Overloaded
from engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Heartbeat,
    Hello,
    StepEvents,
    Submit,
    Welcome,
    decode_worker_message,
    encode,
    pack_tokens,
)
from engine.request import FinishReason, RequestFailure, SamplingParams, TokenEvent
from server.engines import zmq_connection as connection
from server.engines.client import EngineClient

LIMITS = ModelLimits(max_model_len=512, vocab_size=512, eos_token_ids=(1,), dtype="float32")


class ScriptedEngine:
    """A ROUTER that the test reads and writes by hand. Each `life` is a new socket at the same address."""

    def __init__(self, folder):
        self.endpoint = f"ipc://{folder}/engine"
        self._context = zmq.Context()
        self._lives = 0
        self._socket = None

    def live(self):
        self._lives += 1
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.endpoint)

    def die(self):
        self._socket.close()

    async def replace(self, client):
        """A death that the client has noticed, and a new life."""
        self.die()
        await until(lambda: not client.health.ready, "the death is noticed")
        self.live()
        await self.welcome()

    def close(self):
        self._context.destroy(linger=0)

    async def hear(self, kind, seconds=10.0):
        """The next message, which must be of this kind."""
        end = time.monotonic() + seconds
        while not self._socket.poll(0):
            assert time.monotonic() < end, f"no {kind.__name__} came"
            await asyncio.sleep(0.005)
        self._peer, frame = self._socket.recv_multipart()
        message = decode_worker_message(frame)
        assert isinstance(message, kind), message
        return message

    async def hears_nothing_else(self, client):
        """Messages come in order: what was sent before this last one would be heard first."""
        client.submit(ask("last"))
        assert (await self.hear(Submit)).request_id == "last"

    def say(self, message):
        self._socket.send_multipart((self._peer, encode(message)))

    def raw(self, frame):
        self._socket.send_multipart((self._peer, frame))

    async def welcome(self):
        assert (await self.hear(Hello)).worker == "api 0"
        info = {"model": "demo", "limits": LIMITS, "block_size": 16, "num_blocks": 64, "device": "none"}
        info |= {"max_num_seqs": 8, "max_step_tokens": 64}
        self.say(Welcome(EngineInfo(pid=self._lives, **info)))


@pytest.fixture
def engine(tmp_path):
    scripted = ScriptedEngine(tmp_path)
    scripted.live()
    yield scripted
    scripted.close()


@pytest.fixture
async def client(engine):
    client = EngineClient(engine.endpoint, "api 0", resume_timeout_s=30, max_queue=2)
    await client.start()
    yield client
    await client.close()


def ask(name="r", max_tokens=3, **changes):
    return Submit(
        request_id=name, prompt=pack_tokens([5, 6]), params=SamplingParams(max_tokens=max_tokens, **changes), seed=1, fork_of="s"
    )


async def until(condition, what, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain: {what}"
        await asyncio.sleep(0.005)


async def collect(stream):
    return [event async for event in stream]


async def test_a_resumed_stream_sends_what_it_has_and_tells_nothing_twice(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(prompt_logprobs=0))
    assert (await engine.hear(Submit)).fork_of == "s"
    engine.say(StepEvents([TokenEvent("r", [7], num_cached=0, queue_s=0.1, prompt_logprobs=[None])]))
    first = await anext(stream)
    assert (first.tokens, first.num_cached, first.prompt_logprobs) == ([7], 0, [None])
    engine.die()
    engine.live()
    await engine.welcome()
    again = await engine.hear(Submit)
    assert (again.outputs, again.fork_of, again.params.prompt_logprobs, again.seed) == (pack_tokens([7]), None, None, 1)
    engine.say(StepEvents([TokenEvent("r", [8], num_cached=3, queue_s=0.2)]))
    engine.say(StepEvents([TokenEvent("r", [9], FinishReason.LENGTH)]))
    rest = await collect(stream)
    assert [token for event in rest for token in event.tokens] == [8, 9]
    assert all(event.num_cached is None and event.queue_s is None for event in rest)
    assert client.health.restarts == 1


async def test_an_engine_that_prepares_may_be_silent(client, engine, monkeypatch):
    await engine.welcome()
    await client.wait_ready(5)
    monkeypatch.setattr("server.engines.health.IDLE_STALE_SECONDS", -1.0)  # any silence is too long
    engine.say(Heartbeat(EngineStats(step=1), preparing=True))
    await until(lambda: client.health.stats == EngineStats(step=1), "a heartbeat")
    assert client.health.ready
    engine.say(Heartbeat(EngineStats(step=2)))
    await until(lambda: not client.health.ready, "another, and silence")


async def test_a_welcome_nobody_asked_for_leads_to_a_new_connection(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(max_tokens=1))
    await engine.hear(Submit)
    engine.say(Welcome(client.info))
    await engine.welcome()
    await engine.hear(Submit)
    engine.say(StepEvents([TokenEvent("r", [7], FinishReason.STOP)]))
    assert (await collect(stream))[0].finish is FinishReason.STOP


async def test_a_full_queue_refuses_new_requests_and_not_resumed_ones(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    refusal = RequestFailure("Overloaded", "the queue is full")
    fresh, old = client.submit(ask("fresh")), client.submit(ask("old", max_tokens=1))
    await engine.hear(Submit)
    await engine.hear(Submit)
    engine.say(StepEvents([TokenEvent("fresh", [], FinishReason.ERROR, failure=refusal)]))
    with pytest.raises(Exception, match="queue is full"):
        await collect(fresh)
    engine.die()
    engine.live()
    await engine.welcome()
    for _ in range(2):
        assert (await engine.hear(Submit)).request_id == "old"
        engine.say(StepEvents([TokenEvent("old", [], FinishReason.ERROR, failure=refusal)]))
    await engine.hear(Submit)
    engine.say(StepEvents([TokenEvent("old", [7], FinishReason.LENGTH)]))
    assert (await collect(old))[0].tokens == [7]


async def test_what_cannot_be_read_or_is_for_nobody_is_dropped(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(max_tokens=1))
    await engine.hear(Submit)
    engine.raw(b"\xc1rubbish")
    engine.say(StepEvents([TokenEvent("nobody", [1], FinishReason.LENGTH), TokenEvent("r", [7], FinishReason.LENGTH)]))
    assert (await collect(stream))[0].tokens == [7]


async def test_a_fast_engine_leaves_the_loop_to_others(client, engine, monkeypatch):
    """Events that wait for their consumer come out as one: here it gets its turn between them."""
    monkeypatch.setattr(connection, "READ_SECONDS", 0.0)
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(max_tokens=50))
    await engine.hear(Submit)
    for token in range(50):
        engine.say(StepEvents([TokenEvent("r", [token], FinishReason.LENGTH if token == 49 else None)]))
    events = [event.tokens async for event in stream]
    assert [token for tokens in events for token in tokens] == list(range(50))
    assert max(map(len, events)) <= 2  # its turn may come behind the next message, and no later


async def test_abort_reaches_the_engine_once(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask())
    await engine.hear(Submit)
    stream.abort()
    stream.abort()
    assert (await engine.hear(Abort)).request_ids == ["r"]
    await engine.hears_nothing_else(client)


async def test_an_aborted_stream_is_not_resumed(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask())
    await engine.hear(Submit)
    engine.die()
    stream.abort()
    engine.live()
    await engine.welcome()
    await engine.hears_nothing_else(client)


async def test_before_the_first_engine_nothing_is_taken(tmp_path):
    client = EngineClient(f"ipc://{tmp_path}/nobody", "api 0")
    await client.start()
    with pytest.raises(EngineUnavailable):
        client.submit(ask())
    with pytest.raises(EngineUnavailable):
        _ = client.info
    with pytest.raises(EngineUnavailable):
        await client.wait_ready(0.05)
    assert (client.health.ready, client.health.started, client.health.reason) == (False, False, "the engine is still starting")
    await client.close()


async def test_closing_ends_the_streams_and_draining_the_readiness(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask())
    client.drain()
    assert (client.health.ready, client.health.reason) == (False, "the server is shutting down")
    await client.close()
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await anext(stream)


async def test_a_name_is_taken_once(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    client.submit(ask())
    with pytest.raises(InternalError, match="under way already"):
        client.submit(ask())


async def test_a_request_that_comes_while_the_engine_restarts_waits_for_it(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    engine.die()
    await until(lambda: not client.health.ready, "the death is noticed")
    stream = client.submit(ask(prompt_logprobs=0))
    gone = client.submit(ask("gone"))
    gone.abort()
    engine.live()
    await engine.welcome()
    sent = await engine.hear(Submit)
    assert (sent.request_id, sent.fork_of, sent.outputs, sent.params.prompt_logprobs) == ("r", "s", b"", 0)
    engine.say(StepEvents([TokenEvent("r", [7], FinishReason.LENGTH, num_cached=0)]))
    assert [(event.tokens, event.num_cached) for event in await collect(stream)] == [([7], 0)]
    await engine.hears_nothing_else(client)


async def test_only_so_many_requests_wait_for_the_engine(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    engine.die()
    await until(lambda: not client.health.ready, "the death is noticed")
    for number in range(10):  # max_num_seqs 8 and max_queue 2
        client.submit(ask(f"r{number}"))
    with pytest.raises(Overloaded, match="restarting"):
        client.submit(ask("one more"))


async def test_none_waits_for_an_engine_that_does_not_come(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    engine.die()
    await until(lambda: not client.health.ready, "the death is noticed")
    stream = client.submit(ask())
    client._no_engine_came()  # resume_timeout_s has passed
    with pytest.raises(EngineUnavailable, match="none took its place"):
        await collect(stream)
    with pytest.raises(EngineUnavailable, match="restarting"):
        client.submit(ask())
    engine.live()
    await engine.welcome()
    await until(lambda: client.health.ready, "back")
    client.submit(ask())
    assert (await engine.hear(Submit)).request_id == "r"


async def test_while_draining_none_waits_for_an_engine(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    client.drain()
    engine.die()
    await until(lambda: client.num_streams == 0 and not client._synced, "the death is noticed")
    with pytest.raises(EngineUnavailable):
        client.submit(ask())


async def test_a_request_that_engines_die_of_takes_no_other_along(client, engine):
    """Two deaths all share; from then on they come one by one, and the third death is the fault of the one that came last."""
    await engine.welcome()
    await client.wait_ready(5)
    streams = {name: client.submit(ask(name, max_tokens=4)) for name in ("first", "poison", "second")}
    for _ in range(2):
        for name in streams:
            assert (await engine.hear(Submit)).request_id == name
        await engine.replace(client)
    for name in ("first", "poison"):
        assert (await engine.hear(Submit)).request_id == name
        if name != "poison":
            engine.say(StepEvents([TokenEvent(name, [7])]))
    await engine.replace(client)
    for name, has in (("first", [7]), ("second", [])):
        again = await engine.hear(Submit)
        assert (again.request_id, again.outputs) == (name, pack_tokens(has))
        engine.say(StepEvents([TokenEvent(name, [8], FinishReason.LENGTH)]))
    with pytest.raises(InternalError, match="died 3 times"):
        await collect(streams["poison"])
    assert [event.finish for event in await collect(streams["first"])][-1] is FinishReason.LENGTH
    assert [event.finish for event in await collect(streams["second"])][-1] is FinishReason.LENGTH


async def test_a_death_is_not_counted_against_streams_that_only_waited(client, engine):
    """The engine runs 8 at a time."""
    await engine.welcome()
    await client.wait_ready(5)
    names = [f"r{number}" for number in range(9)]
    for name in [*names, "urgent"]:
        client.submit(msgspec.structs.replace(ask(name), priority=-1 if name == "urgent" else 0))
    for _ in range(2):
        assert [(await engine.hear(Submit)).request_id for _ in range(10)] == [*names, "urgent"]
        await engine.replace(client)
    # r0 to r6 and the urgent one ran; of these, suspects by now, the first is sent and no other.
    assert [(await engine.hear(Submit)).request_id for _ in range(3)] == ["r7", "r8", "r0"]
    await engine.hears_nothing_else(client)


async def test_a_suspect_that_leaves_lets_the_next_one_go(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    streams = {name: client.submit(ask(name)) for name in ("first", "second")}
    for _ in range(2):
        await engine.hear(Submit)
        await engine.hear(Submit)
        await engine.replace(client)
    assert (await engine.hear(Submit)).request_id == "first"
    streams["first"].abort()
    assert (await engine.hear(Abort)).request_ids == ["first"]
    assert (await engine.hear(Submit)).request_id == "second"


async def test_a_refused_suspect_is_asked_again_in_its_turn(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    for name in ("first", "second"):
        client.submit(ask(name))
    for _ in range(2):
        await engine.hear(Submit)
        await engine.hear(Submit)
        await engine.replace(client)
    refusal = RequestFailure("Overloaded", "the queue is full")
    assert (await engine.hear(Submit)).request_id == "first"
    engine.say(StepEvents([TokenEvent("first", [], FinishReason.ERROR, failure=refusal)]))
    assert (await engine.hear(Submit)).request_id == "first"
    engine.say(StepEvents([TokenEvent("first", [7])]))
    assert (await engine.hear(Submit)).request_id == "second"
