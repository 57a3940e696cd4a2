"""Tests what unusual HTTP clients send, with raw sockets: HTTP/1.0, upgrades, half-closed connections, odd request lines."""

import asyncio
import contextlib
import json
import socket
import threading

import pytest

from server.http.app import build_app
from server.http.half_close import MAX_PROBES
from server.http.limits import HttpLimits
from server.metrics.registry import Metrics
from server.settings import Settings
from tests.support.children import wait_until
from tests.support.http_server import serving
from tests.unit.server.http.routes.scripted import ScriptedService, letters

SETTINGS = Settings(header_timeout_s=5)


@contextlib.contextmanager
def app_server(service):
    app = build_app(SETTINGS, service, Metrics("tiny", service.health))
    with serving(app, HttpLimits.from_settings(SETTINGS)) as port:
        yield port


@pytest.fixture(scope="module")
def service():
    return ScriptedService(*letters("tide"))


@pytest.fixture(scope="module")
def port(service):
    with app_server(service) as port:
        yield port


def post(body, version="1.1", path="/v1/generate", headers=b""):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: x\r\ncontent-length: {len(data)}\r\n".encode()
    return head + headers + b"\r\n" + data


def read_all(client):
    got = b""
    while piece := client.recv(65536):
        got += piece
    return got


def talk(port, sent, half_close=False):
    """Send `sent` and return everything that comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(sent)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        return read_all(client)


def parts(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), head.lower(), body


CLOSE = b"connection: close\r\n"


@pytest.mark.parametrize("keep", [b"", b"connection: keep-alive\r\n", b"expect: 100-continue\r\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_to_http_1_0_has_no_chunks_and_ends_with_the_connection(port, stream, keep):
    status, head, body = parts(talk(port, post({"prompt": "x", "stream": stream}, "1.0", headers=keep)))
    assert status == 200
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["outputs"][0]["text"] == "tide"


def test_a_get_by_http_1_0_needs_no_host(port):
    status, head, body = parts(talk(port, b"GET /v1/models HTTP/1.0\r\n\r\n"))
    assert (status, json.loads(body)["object"]) == (200, "list")
    assert b"content-length" in head


H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
UPGRADES = [
    H2C,
    b"upgrade: websocket\r\nconnection: keep-alive, upgrade\r\n",
    b"Upgrade: TLS/1.0, h2c\r\nConnection: UPGRADE\r\n",
]


@pytest.mark.parametrize("headers", UPGRADES)
def test_an_upgrade_is_ignored_and_the_body_is_read(service, port, headers):
    """Java's HttpClient asks for h2c in its first request on each connection."""
    one = post({"prompt": "first"}, headers=headers)
    answer = talk(port, one + one + post({"prompt": "last"}, headers=headers + CLOSE))
    assert answer.count(b"HTTP/1.1 200 ") == 3
    assert [request.prompt for request in service.requests[-3:]] == ["first", "first", "last"]


def test_a_body_of_an_upgrade_may_come_in_pieces(service, port):
    sent = post({"prompt": "é" * 50_000}, headers=H2C + CLOSE)
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        for start in range(0, len(sent), 7919):
            client.sendall(sent[start : start + 7919])
        assert parts(read_all(client))[0] == 200
    assert service.requests[-1].prompt == "é" * 50_000


def test_a_chunked_body_of_an_upgrade_is_read(service, port):
    head = b"POST /v1/generate HTTP/1.1\r\nhost: x\r\n" + H2C + b"transfer-encoding: chunked\r\n\r\n"
    sent = head + b'f\r\n{"prompt": "tid\r\n3\r\ne"}\r\n0\r\n\r\n'
    assert parts(talk(port, sent, half_close=True))[0] == 200
    assert service.requests[-1].prompt == "tide"


def test_thousands_of_pipelined_upgrades_are_answered(port):
    one = b"GET /version HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"
    answer = talk(port, one * 2000 + b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2001


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip,\tchunked", b"deflate", b"gzip\r\ntransfer-encoding: chunked"])
def test_a_transfer_coding_other_than_chunked_is_501(port, coding):
    sent = b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: " + coding + b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    status, _, body = parts(talk(port, sent))
    assert status == 501
    assert "chunked" in json.loads(body)["error"]["message"]


def test_http_1_0_has_no_transfer_coding(port):
    assert parts(talk(port, b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"))[0] == 400


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /version", 400),
        (b"GET /version\r\nhost: x", 400),
        (b"\r\nPOST /v1/generate", 400),
        (b"GET /version HTTP/2.0\r\nhost: x", 505),
        (b"GET /version HTTP/1.2\r\nhost: x", 400),
        (b"GET /version HTTP/0.9\r\nhost: x", 400),
        (b"GET /version http/1.1\r\nhost: x", 400),
    ],
)
def test_a_request_line_with_another_version_or_none_is_refused(port, line, status):
    got, head, body = parts(talk(port, line + b"\r\n\r\n"))
    assert got == status
    assert b"x-request-id: req-" in head
    assert json.loads(body)["error"]["message"]


def test_a_request_line_without_a_version_is_refused_before_the_time_for_headers_is_over(port):
    """A client of HTTP/0.9 sends one line and then waits."""
    with socket.create_connection(("127.0.0.1", port), 3) as client:
        client.sendall(b"GET /version\r\n")
        assert parts(read_all(client))[0] == 400


@pytest.mark.parametrize(
    "second", [b"GET /version\r\n", b"\x16\x03\x01\x00", b"GET / FTP/1.1\r\n\r\n", b"GET /x HTTP/1.1\r\n\r\n"]
)
def test_a_refusal_does_not_have_the_id_of_the_request_before(port, second):
    with socket.create_connection(("127.0.0.1", port), 3) as client:
        client.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\nx-request-id: first\r\n\r\n")
        assert b"x-request-id: first\r\n" in client.recv(65536)
        client.sendall(second)
        status, head, _ = parts(read_all(client))
    assert status == 400
    assert b"x-request-id: req-" in head


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_closes_its_sending_side_gets_its_answer(path, stream, version):
    """The answer takes longer than the first probe, so a whole answer by HTTP/1.1 follows a `100 Continue`."""
    body = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    with app_server(ScriptedService(0.8, *letters("tide"))) as port:
        answer = talk(port, post({**body, "stream": stream}, version, path=path), half_close=True)
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b'"length"' in answer
    assert not stream or b"[DONE]" in answer


def test_a_quick_answer_to_a_half_closed_connection_is_all_that_is_sent(port):
    assert talk(port, post({"prompt": "x"}), half_close=True).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_of_a_half_closed_connection_are_all_answered(port):
    answer = talk(port, post({"prompt": "x"}) * 3, half_close=True)
    assert answer.count(b"HTTP/1.1 200 ") == 3


def test_a_client_that_closes_its_sending_side_late_gets_its_answer_too():
    go = threading.Event()

    class Waiting(ScriptedService):
        async def generate(self, request, identity, *, transport="http"):
            await asyncio.to_thread(go.wait)
            async for item in super().generate(request, identity, transport=transport):
                yield item

    with app_server(Waiting(*letters("tide"))) as port, socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(post({"prompt": "x"}))
        with contextlib.suppress(TimeoutError):
            client.settimeout(0.3)
            client.recv(1)
        client.settimeout(10)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        go.set()
        assert read_all(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [[], letters("ab", finish=None)])
def test_a_client_that_leaves_after_it_closed_its_sending_side_ends_its_request(stream, first):
    service = ScriptedService(*first, 60)
    with app_server(service) as port:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(post({"prompt": "x", "stream": stream}))
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: service.requests, "the generation runs")
        wait_until(lambda: service.closed, "the generation has ended", seconds=5)


def forward(source, sink):
    """Forward bytes like a proxy that knows no HTTP. It passes the end of the input on. A failed write ends both directions."""
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def byte_proxy(port):
    """Forward one connection to `port` by two threads, and yield the port to connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run():
            with listener.accept()[0] as client, socket.create_connection(("127.0.0.1", port)) as upstream:
                back = threading.Thread(target=forward, args=(upstream, client))
                back.start()
                forward(client, upstream)
                back.join()

        proxy = threading.Thread(target=run)
        proxy.start()
        yield listener.getsockname()[1]
        proxy.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_behind_a_proxy_that_forwards_bytes_ends_its_request(stream):
    """To the server, the proxy's connection is half-closed. The proxy notices at its second write that nobody reads."""
    service = ScriptedService(*letters("ab", finish=None), 60)
    with app_server(service) as port, byte_proxy(port) as proxy:
        with socket.create_connection(("127.0.0.1", proxy), 10) as client:
            client.sendall(post({"prompt": "x", "stream": stream}))
            wait_until(lambda: service.requests, "the generation runs")
        wait_until(lambda: service.closed, "the generation has ended", seconds=8)


def test_a_client_that_waits_behind_a_proxy_that_forwards_bytes_gets_its_answer():
    with app_server(ScriptedService(3.0, *letters("tide"))) as port, byte_proxy(port) as proxy:
        answer = talk(proxy, post({"prompt": "x"}), half_close=True)
    *probes, answer = answer.rpartition(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert b"".join(probes) == b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_PROBES
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"length"' in answer
