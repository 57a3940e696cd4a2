"""Tests clients that leave or do not read, with a real uvicorn: the generation that runs for such a client must end soon."""

import contextlib
import json
import socket

import pytest

from engine.errors import InternalError
from server.http.app import build_app
from server.http.limits import HttpLimits
from server.metrics.registry import Metrics
from server.service.types import Chunk
from server.settings import Settings
from tests.support.children import wait_until
from tests.support.http_server import serving
from tests.unit.server.http.routes.scripted import ScriptedService, letters

PATHS = {
    "/v1/generate": {"prompt": "x"},
    "/v1/completions": {"model": "tiny", "prompt": ["x", "y"]},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
}


def request(path, body):
    """Return the bytes of an HTTP request, to be sent over a raw socket."""
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)


@contextlib.contextmanager
def app_server(service, limits=None):
    with serving(
        build_app(Settings(), service, Metrics("tiny", service.health)), limits or HttpLimits.from_settings(Settings())
    ) as port:
        yield port


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_the_generation_ends_when_the_client_leaves(path, stream, started):
    script = [*letters("ab", finish=None), 60] if started else [60]
    service = ScriptedService(*script)
    num_prompts = 2 if path == "/v1/completions" else 1
    with app_server(service) as port:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(request(path, {**PATHS[path], "stream": stream}))
            wait_until(lambda: len(service.requests) == num_prompts, "the generations run")
            if stream and started:
                assert b"200 OK" in client.recv(4096)
            assert service.closed == []
        wait_until(lambda: len(service.closed) == num_prompts, "the generations have ended")


def test_a_client_that_leaves_before_its_body_is_complete_starts_no_generation():
    """The test serves a second client after the first one left, so that the server has surely handled the first one's leaving."""
    service = ScriptedService(*letters("x"))
    with app_server(service) as port:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(request("/v1/generate", {"prompt": "first " * 1000})[:-10])
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(request("/v1/generate", {"prompt": "second"}))
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert [generation.prompt for generation in service.requests] == ["second"]


def test_the_stream_of_a_client_that_reads_nothing_is_held_back_and_then_ended():
    made = 0

    class Endless(ScriptedService):
        async def generate(self, request, identity, *, transport="http"):
            nonlocal made
            try:
                while True:
                    made += 1
                    yield Chunk(index=0, text="x" * 10_000, token_ids=[1])
            finally:
                self.closed.append(request.request_id)

    service = Endless()
    limits = HttpLimits.from_settings(Settings(send_timeout_s=0.7))
    with app_server(service, limits) as port, socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(request("/v1/generate", {"prompt": "x", "stream": True}))
        wait_until(lambda: service.closed, "the stream has ended")
        assert made < 2000  # chunks of 10 KB; the buffers of kernel and connection hold fewer


def test_a_connection_stays_usable_after_an_error_before_the_first_token():
    service = ScriptedService(InternalError("x"))
    with app_server(service) as port, socket.create_connection(("127.0.0.1", port), 5) as client:
        for _ in range(3):
            client.sendall(request("/v1/generate", {"prompt": "x", "stream": True}))
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 500")
            assert b"internal_error" in answer


def test_an_error_within_a_stream_completes_the_body():
    service = ScriptedService(Chunk(index=0, text="a", token_ids=[1]), InternalError("x"))
    with app_server(service) as port, socket.create_connection(("127.0.0.1", port), 5) as client:
        for _ in range(3):
            client.sendall(request("/v1/generate", {"prompt": "x", "stream": True}))
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                got += client.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")
            assert b'{"error":' in got
            assert b"[DONE]" not in got
