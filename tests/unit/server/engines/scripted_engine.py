"""ScriptedEngine: an engine that does only what a test says, behind a real ZeroMQ socket.

Tests with real engine processes that die are in tests/e2e.
"""

import asyncio
import time

import msgspec
import zmq

from engine.config import ModelLimits
from engine.errors import Overloaded
from engine.messages import (
    EngineInfo,
    Hello,
    StepEvents,
    Submit,
    Welcome,
    decode_worker_message,
    encode,
    pack_tokens,
    unpack_tokens,
)
from engine.request import FinishReason, RequestFailure, SamplingParams, TokenEvent

LIMITS = ModelLimits(max_model_len=512, vocab_size=512, eos_token_ids=(1,), dtype="float32")
QUEUE_FULL = RequestFailure("Overloaded", "the queue is full")


class ScriptedEngine:
    """Plays an engine with a ROUTER socket that the test reads and writes. `start` after `die` binds a new socket."""

    def __init__(self, endpoint, **info):
        self.endpoint = endpoint
        self._info = info  # fields of EngineInfo; `max_model_len` is put into its limits
        self._context = zmq.Context()
        self._num_starts = 0
        self._socket = None

    def start(self):
        self._num_starts += 1
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 1)  # a small receive queue, so that a test can fill the client's queue
        self._socket.bind(self.endpoint)

    def die(self):
        self._socket.close()

    def close(self):
        self._context.destroy(linger=0)

    async def replace(self, client, **info):
        """Die, wait until `client` has noticed, start again and accept the client. `info` changes fields of EngineInfo."""
        self.die()
        await until(lambda: not client.health.ready, "the client notices the death")
        self._info |= info
        self.start()
        await self.accept()

    async def receive(self, kind, seconds=10.0):
        """Return the next message, which must be of this kind."""
        end = time.monotonic() + seconds
        while not self._socket.poll(0):
            assert time.monotonic() < end, f"no {kind.__name__} came"
            await asyncio.sleep(0.005)
        self._peer, frame = self._socket.recv_multipart()
        message = decode_worker_message(frame)
        assert isinstance(message, kind), message
        return message

    async def receive_ids(self, num):
        """Receive `num` messages, which must be Submits, and return their request ids."""
        return [(await self.receive(Submit)).request_id for _ in range(num)]

    async def receives_nothing_else(self, client):
        """Assert that the client has sent no message that is not received yet.

        The client submits one more request. Messages arrive in order, so an earlier message would arrive before it.
        """
        client.submit(request("last"))
        assert await self.receive_ids(1) == ["last"]

    def send(self, message):
        self.send_raw(encode(message))

    def send_raw(self, frame):
        self._socket.send_multipart((self._peer, frame))

    def send_tokens(self, name, *tokens, finish=None, **fields):
        """Send the events of a step that sampled `tokens` for the request `name`."""
        self.send(StepEvents([TokenEvent(name, list(tokens), finish, **fields)]))

    def finish(self, name, *tokens, finish=FinishReason.LENGTH):
        self.send_tokens(name, *tokens, finish=finish)

    def refuse(self, name, failure=QUEUE_FULL):
        self.send_tokens(name, finish=FinishReason.ERROR, failure=failure)

    async def accept(self):
        assert (await self.receive(Hello)).worker == "api 0"
        self.send(Welcome(self.info()))

    def info(self):
        given = dict(self._info)
        limits = msgspec.structs.replace(LIMITS, max_model_len=given.pop("max_model_len", LIMITS.max_model_len))
        base = {"model": "demo", "limits": limits, "block_size": 16, "num_blocks": 64, "device": "none"}
        base |= {"max_num_seqs": 8, "max_step_tokens": 64, "pid": self._num_starts}
        return EngineInfo(**base | given)


def request(name="r", max_tokens=3, prompt=(5, 6), priority=0, fork_of="s", tenant="", **params):
    params = SamplingParams(max_tokens=max_tokens, **params)
    prompt = pack_tokens(list(prompt))
    return Submit(request_id=name, prompt=prompt, params=params, seed=1, priority=priority, fork_of=fork_of, tenant=tenant)


def outputs_of(submit):
    """Return the tokens of a Submit's `outputs`: those that an earlier engine has generated."""
    return unpack_tokens(submit.outputs).tolist()


async def until(condition, what, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain: {what}"
        await asyncio.sleep(0.005)


async def fill_send_queue(client):
    """Submit large requests while the engine reads nothing, until the client has refused one 20 times in a row.

    ZeroMQ moves messages from the client's queue to the socket in a thread of its own, so one refusal is not enough. Returns
    the number of requests that were sent. The client must have been created with a small `SEND_QUEUE`.
    """
    large = tuple(range(100, 400)) * 300
    sent = refused = 0
    while refused < 20:
        assert sent < 1000, "the queue to an engine that does not read has no bound"
        try:
            client.submit(request(f"filler {sent}", prompt=large))
        except Overloaded:
            refused += 1
            await asyncio.sleep(0.005)
        else:
            refused = 0
            sent += 1
    return sent


def count_calls(monkeypatch, owner, name):
    """Record the calls of the method `name` of `owner`. Returns a list that gets the arguments of each call."""
    calls, method = [], getattr(owner, name)

    def counted(*args):
        calls.append(args)
        return method(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


async def collect(stream):
    """Return all events of a stream. Fails after 10 seconds, so that no test waits for ever."""
    async with asyncio.timeout(10):
        return [event async for event in stream]


async def tokens_of(stream):
    return [token for event in await collect(stream) for token in event.tokens]


async def next_event(stream):
    async with asyncio.timeout(10):
        return await anext(stream)


async def read_until(stream, num):
    """Read events until `num` tokens have come; returns the tokens."""
    tokens = []
    while len(tokens) < num:
        tokens += (await next_event(stream)).tokens
    return tokens
