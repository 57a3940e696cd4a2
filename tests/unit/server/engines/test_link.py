"""EngineLink and ZmqConnection in a process that has no file descriptor free, as at the limit of open files."""

import asyncio
import contextlib
import os
import resource

import pytest
import zmq

from engine.errors import EngineUnavailable
from engine.messages import Submit
from server.engines import link
from server.engines.zmq_connection import ZmqConnection
from tests.support.engine_client import engine_client
from tests.unit.server.engines.scripted_engine import collect, outputs_of, read_until, request, tokens_of, until

RETRY = "no socket to the engine"


@contextlib.contextmanager
def descriptors(spare):
    """Let this process open `spare` more files and sockets."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held = [os.dup(0)]
    while held[-1] <= highest:  # a new descriptor gets the smallest free number, and the limit below is one of numbers
        held.append(os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1 + spare, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)


@contextlib.contextmanager
def no_descriptors():
    """Refuse every new file and socket, even if others are closed meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def num_retries(caplog):
    return sum(message.startswith(RETRY) for message in caplog.messages)


@pytest.mark.parametrize("spare", [0, 1, 2])
async def test_a_connection_that_lacks_a_descriptor_raises_and_leaves_none_open(tmp_path, spare):
    """The connection's own sockets need three."""
    context = zmq.Context()
    context.socket(zmq.DEALER).close()  # starts the context's threads, which keep descriptors of their own
    before = os.listdir("/proc/self/fd")
    try:
        with descriptors(spare), pytest.raises(zmq.ZMQError, match="Too many open files"):
            ZmqConnection(context, f"ipc://{tmp_path}/engine", lambda message: None, lambda: None)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= len(before), "all descriptors are closed")
    finally:
        context.destroy(linger=0)


async def test_a_lost_engine_is_found_again_once_a_socket_can_be_opened(client, engine, monkeypatch, caplog):
    monkeypatch.setattr(link, "CONNECT_RETRY_SECONDS", 0.05)
    stream = client.submit(request())
    await engine.receive(Submit)
    engine.send_tokens("r", 7)
    assert await read_until(stream, 1) == [7]
    with no_descriptors():
        engine.die()
        await until(lambda: num_retries(caplog) >= 3, "several attempts")
        assert not client.health.ready
    engine.start()
    await engine.accept()
    assert outputs_of(await engine.receive(Submit)) == [7]
    engine.finish("r", 8)
    assert await tokens_of(stream) == [8]


async def test_streams_end_in_time_if_no_socket_can_be_opened(engine, caplog):
    client = engine_client([engine.endpoint], resume_timeout_s=0.2)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    stream = client.submit(request())
    with no_descriptors():
        engine.die()
        with pytest.raises(EngineUnavailable, match="none took its place"):
            await collect(stream)
    assert num_retries(caplog) >= 1
    await client.close()


async def test_a_client_that_cannot_open_a_socket_at_its_start_tries_again(engine, monkeypatch, caplog):
    monkeypatch.setattr(link, "CONNECT_RETRY_SECONDS", 0.05)
    client = engine_client([engine.endpoint])
    with no_descriptors():
        await client.start()
        await until(lambda: num_retries(caplog) >= 2, "a second attempt")
    await engine.accept()
    await client.wait_ready(5)
    await client.close()


async def test_a_closed_link_tries_no_more(engine, monkeypatch, caplog):
    monkeypatch.setattr(link, "CONNECT_RETRY_SECONDS", 0.0)
    client = engine_client([engine.endpoint])
    with no_descriptors():
        await client.start()
        await until(lambda: num_retries(caplog) >= 2, "a second attempt")
        await client.close()
        attempts = num_retries(caplog)
        for _ in range(10):
            await asyncio.sleep(0)
    assert num_retries(caplog) == attempts
