"""EngineClient against an engine that says what the test wants, when it wants. Real deaths are in tests/e2e."""

import asyncio
import time

import pytest
import zmq

from engine.config import ModelLimits
from engine.errors import EngineUnavailable, InternalError
from engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Heartbeat,
    Hello,
    Outputs,
    Submit,
    Welcome,
    decode_worker_message,
    encode,
)
from engine.request import FinishReason, RequestFailure, SamplingParams, TokenEvent
from server.client import EngineClient

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

    def close(self):
        self._context.destroy(linger=0)

    async def hear(self, kind, seconds=5.0):
        """The next message, which must be of this kind."""
        end = time.monotonic() + seconds
        while not self._socket.poll(0):
            assert time.monotonic() < end, f"no {kind.__name__} came"
            await asyncio.sleep(0.005)
        self._peer, frame = self._socket.recv_multipart()
        message = decode_worker_message(frame)
        assert isinstance(message, kind), message
        return message

    async def hears_nothing(self, seconds=0.2):
        await asyncio.sleep(seconds)
        return not self._socket.poll(0)

    def say(self, message):
        self._socket.send_multipart((self._peer, encode(message)))

    def raw(self, frame):
        self._socket.send_multipart((self._peer, frame))

    async def welcome(self):
        assert (await self.hear(Hello)).worker == "api 0"
        info = {"model": "demo", "limits": LIMITS, "block_size": 16, "num_blocks": 64, "max_num_seqs": 8, "device": "none"}
        self.say(Welcome(EngineInfo(pid=self._lives, **info)))


@pytest.fixture
def engine(tmp_path):
    scripted = ScriptedEngine(tmp_path)
    scripted.live()
    yield scripted
    scripted.close()


@pytest.fixture
async def client(engine):
    client = EngineClient(engine.endpoint, "api 0", stall_timeout_s=0.3, resume_timeout_s=5)
    await client.start()
    yield client
    await client.close()


def ask(name="r", max_tokens=3, **changes):
    return Submit(request_id=name, prompt=[5, 6], params=SamplingParams(max_tokens=max_tokens, **changes), seed=1, fork_of="s")


async def collect(stream):
    return [event async for event in stream]


async def test_a_resumed_stream_sends_what_it_has_and_tells_nothing_twice(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(prompt_logprobs=0))
    assert (await engine.hear(Submit)).fork_of == "s"
    engine.say(Outputs([TokenEvent("r", [7], num_cached=0, queue_s=0.1, prompt_logprobs=[None])]))
    first = await anext(stream)
    assert (first.tokens, first.num_cached, first.prompt_logprobs) == ([7], 0, [None])
    engine.die()
    engine.live()
    await engine.welcome()
    again = await engine.hear(Submit)
    assert (again.outputs, again.fork_of, again.params.prompt_logprobs, again.seed) == ([7], None, None, 1)
    engine.say(Outputs([TokenEvent("r", [8], num_cached=3, queue_s=0.2)]))
    engine.say(Outputs([TokenEvent("r", [9], FinishReason.LENGTH)]))
    rest = await collect(stream)
    assert [token for event in rest for token in event.tokens] == [8, 9]
    assert all(event.num_cached is None and event.queue_s is None for event in rest)
    assert client.health.restarts == 1


async def test_a_stream_that_lacks_only_its_end_is_ended_and_not_sent_again(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(max_tokens=2))
    await engine.hear(Submit)
    engine.say(Outputs([TokenEvent("r", [7, 8])]))
    assert (await anext(stream)).tokens == [7, 8]
    engine.die()
    engine.live()
    await engine.welcome()
    assert [(event.tokens, event.finish) for event in await collect(stream)] == [([], FinishReason.LENGTH)]
    assert await engine.hears_nothing()


async def test_a_welcome_nobody_asked_for_leads_to_a_new_connection(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(max_tokens=1))
    await engine.hear(Submit)
    engine.say(Welcome(client.info))
    await engine.welcome()
    await engine.hear(Submit)
    engine.say(Outputs([TokenEvent("r", [7], FinishReason.STOP)]))
    assert (await collect(stream))[0].finish is FinishReason.STOP


async def test_a_full_queue_refuses_new_requests_and_not_resumed_ones(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    refusal = RequestFailure("Overloaded", "the queue is full")
    fresh, old = client.submit(ask("fresh")), client.submit(ask("old", max_tokens=1))
    await engine.hear(Submit)
    await engine.hear(Submit)
    engine.say(Outputs([TokenEvent("fresh", [], FinishReason.ERROR, failure=refusal)]))
    with pytest.raises(Exception, match="queue is full"):
        await collect(fresh)
    engine.die()
    engine.live()
    await engine.welcome()
    for _ in range(2):
        assert (await engine.hear(Submit)).request_id == "old"
        engine.say(Outputs([TokenEvent("old", [], FinishReason.ERROR, failure=refusal)]))
    await engine.hear(Submit)
    engine.say(Outputs([TokenEvent("old", [7], FinishReason.LENGTH)]))
    assert (await collect(old))[0].tokens == [7]


async def test_an_engine_that_beats_but_does_not_step_is_not_ready(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    assert client.health.ready
    for _ in range(5):
        engine.say(Heartbeat(EngineStats(step=4, running=1)))
        await asyncio.sleep(0.1)
    assert not client.health.ready
    engine.say(Heartbeat(EngineStats(step=5, running=1)))
    await asyncio.sleep(0.05)
    assert client.health.ready


async def test_what_cannot_be_read_or_is_for_nobody_is_dropped(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask(max_tokens=1))
    await engine.hear(Submit)
    engine.raw(b"\xc1rubbish")
    engine.say(Outputs([TokenEvent("nobody", [1], FinishReason.LENGTH), TokenEvent("r", [7], FinishReason.LENGTH)]))
    assert (await collect(stream))[0].tokens == [7]


async def test_abort_reaches_the_engine_once(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask())
    await engine.hear(Submit)
    stream.abort()
    stream.abort()
    assert (await engine.hear(Abort)).request_ids == ["r"]
    assert await engine.hears_nothing()


async def test_an_aborted_stream_is_not_resumed(client, engine):
    await engine.welcome()
    await client.wait_ready(5)
    stream = client.submit(ask())
    await engine.hear(Submit)
    engine.die()
    stream.abort()
    engine.live()
    await engine.welcome()
    assert await engine.hears_nothing()


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
