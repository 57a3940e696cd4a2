"""Tests how HttpServer ends connections when it stops. Its listening socket and its clients are real."""

import asyncio
import contextlib
import socket

import pytest
import uvicorn

from server.http import guard
from server.http.limits import HttpLimits
from server.settings import Settings
from server.supervise.http_server import HttpServer
from tests.support.children import wait_until

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def stopping(idle_seconds, sent):
    """Yield a client's reader and writer, and the task of a server that stops and has closed its port.

    The client has sent `sent`, and has had the answer if that is a request.
    """
    protocol = guard.guarded(HttpLimits.from_settings(Settings()))
    server = HttpServer(uvicorn.Config(app, http=protocol, lifespan="off", log_config=None), idle_seconds=idle_seconds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.opened.wait()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        if sent == REQUEST:
            assert b"connection: close" not in await reader.readuntil(b"\r\n\r\nok")
        server.should_exit = True
        await asyncio.to_thread(wait_until, lambda: listener.fileno() == -1, "the port is closed")
        try:
            async with asyncio.timeout(10):
                yield reader, writer, serving
        finally:
            writer.close()
            await asyncio.wait_for(serving, 10)


@pytest.mark.parametrize("idle_seconds", [0, 3600])
@pytest.mark.parametrize("cut", [1, len(REQUEST) - 1])
async def test_a_request_that_has_begun_is_answered(cut, idle_seconds):
    async with stopping(idle_seconds, REQUEST[:cut]) as (reader, writer, _):
        writer.write(REQUEST[cut:])
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize("sent", [b"", REQUEST], ids=["new", "used"])
async def test_a_request_on_an_idle_connection_is_answered_for_some_time(sent):
    async with stopping(3600, sent) as (reader, writer, _):
        writer.write(REQUEST)
        assert b"\r\nconnection: close\r\n" in await reader.read()


@pytest.mark.parametrize("sent", [b"", REQUEST], ids=["new", "used"])
async def test_a_request_that_comes_too_late_meets_the_end_of_the_connection_and_no_reset(sent, monkeypatch):
    monkeypatch.setattr(guard, "LINGER_SECONDS", 3600)
    async with stopping(0, sent) as (reader, writer, _):
        assert await reader.read() == b""
        for _ in range(2):
            writer.write(REQUEST)
            await writer.drain()
        assert await reader.read() == b""
        assert not writer.is_closing()


async def test_an_idle_connection_is_closed_in_the_end():
    """The client does not close its side."""
    async with stopping(0, REQUEST) as (reader, _, serving):
        assert await reader.read() == b""
        await asyncio.wait_for(serving, 10)
