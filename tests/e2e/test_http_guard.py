"""Tests `server.http.guard` with hostile clients on raw sockets, and a real uvicorn with a small ASGI app behind the guard."""

import contextlib
import json
import logging
import re
import resource
import select
import socket
import time

import psutil
import pytest

from server.http.limits import HttpLimits
from server.settings import Settings
from tests.support.children import ServerChild, wait_until
from tests.support.http_server import serving

LIMITS = HttpLimits.from_settings(
    Settings(header_timeout_s=0.4, body_timeout_s=0.6, idle_timeout_s=1, send_timeout_s=0.5, max_body_bytes=100_000)
)


class EchoApp:
    """An ASGI app that answers the length of the body. On /flood it streams without end; on /ignore it answers without reading
    the body."""

    def __init__(self):
        self.disconnects = 0

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/flood":
            await self.flood(receive, send)
            return
        num_bytes, more = 0, scope["path"] != "/ignore"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            num_bytes += len(message["body"])
            more = message["more_body"]
        body = str(num_bytes).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def flood(self, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        self.disconnects += 1


@pytest.fixture(scope="module")
def app():
    return EchoApp()


@pytest.fixture(scope="module")
def port(app):
    with serving(app, LIMITS) as port:
        yield port


def talk(port, *pieces, timeout=5.0, pause=0.0):
    """Send the pieces over a new connection, and return all bytes that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout) as client:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
        return read_all(client)


def read_all(client):
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            got += piece
    return got


def status(answer):
    return int(answer.split(b" ", 2)[1]) if answer else None


def error(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


CLOSE = b"host: x\r\nconnection: close\r\n"


def test_a_plain_request_passes(port):
    assert talk(port, b"POST / HTTP/1.1\r\n" + CLOSE + b"content-length: 3\r\n\r\nabc").endswith(b"\r\n\r\n3")


def test_keep_alive_and_pipelining_pass(port):
    one = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    answer = talk(port, one + one + b"POST / HTTP/1.1\r\n" + CLOSE + b"content-length: 1\r\n\r\na")
    assert answer.count(b"HTTP/1.1 200") == 3


def test_no_content_length_means_no_body(port):
    assert talk(port, b"POST / HTTP/1.1\r\n" + CLOSE + b"\r\n").endswith(b"\r\n\r\n0")


def test_one_huge_header_is_refused_without_being_kept(port):
    before = psutil.Process().memory_info().rss
    answer = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\na: ", *[b"y" * 65536] * 64)
    assert answer == b"" or status(answer) == 431
    assert psutil.Process().memory_info().rss - before < 30 << 20


def test_a_header_just_over_the_limit_gets_its_answer(port):
    answer = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"y" * 33_000)
    assert status(answer) == 431
    assert error(answer)["code"] == "payload_too_large"


def test_two_hundred_thousand_header_lines_are_refused_and_others_are_served(port):
    answer = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n" * 200_000)
    assert answer == b"" or status(answer) == 431
    assert status(talk(port, b"GET / HTTP/1.1\r\n" + CLOSE + b"\r\n")) == 200


def test_a_hundred_and_one_headers_are_431(port):
    answer = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 100 + b"\r\n")
    assert status(answer) == 431
    assert "100 headers" in error(answer)["message"]


def test_a_long_url_is_414(port):
    assert status(talk(port, b"GET /" + b"u" * 9000 + b" HTTP/1.1\r\n" + CLOSE + b"\r\n")) == 414


def test_endless_blank_lines_are_refused(port):
    assert status(talk(port, *[b"\r\n" * 5000] * 20)) in (408, 431, None)


@pytest.mark.parametrize("sent", [b"P", b"POST / HTTP/1.1\r\nhost: x\r\n", b"POST / HTTP/1.1\r\nhost: x\r\na: b"])
def test_a_half_sent_head_is_408(port, sent):
    answer = talk(port, sent)
    assert status(answer) == 408
    assert error(answer)["type"] == "timeout_error"


def test_a_head_sent_byte_by_byte_is_408(port):
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 5
    assert status(talk(port, *[head[i : i + 1] for i in range(len(head))], pause=0.05)) in (408, None)


def test_a_second_half_sent_head_on_a_kept_connection_is_408(port):
    """Without the guard, uvicorn drops its keep-alive timer at the first byte of a request, and then waits for the rest without
    limit."""
    answer = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET", pause=0.1)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1 408") == 1


def test_a_connection_that_sends_nothing_is_closed(port):
    assert talk(port) == b""


@pytest.mark.parametrize("framing", [b"content-length: 10\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\na\r\nabc"])
def test_a_half_sent_body_is_408_and_the_app_gets_a_disconnect(port, app, framing):
    before = app.disconnects
    answer = talk(port, b"POST / HTTP/1.1\r\nhost: x\r\n" + framing)
    assert status(answer) == 408
    assert "body" in error(answer)["message"]
    assert app.disconnects == before + 1


def test_a_body_far_over_the_limit_is_413(port):
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    answer = talk(port, b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", *[chunk] * 200)
    assert answer == b"" or status(answer) == 413


def test_many_tiny_chunks_are_refused(port):
    answer = talk(port, b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 3000)
    assert status(answer) == 400
    assert "chunks" in error(answer)["message"]


def test_chunks_of_64_bytes_pass(port):
    body = b"".join(b"40\r\n" + b"x" * 64 + b"\r\n" for _ in range(1200)) + b"0\r\n\r\n"
    assert talk(port, b"POST / HTTP/1.1\r\n" + CLOSE + b"transfer-encoding: chunked\r\n\r\n" + body).endswith(b"76800")


def test_too_many_trailers_are_431(port):
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    assert status(talk(port, head + b"t: v\r\n" * 200 + b"\r\n")) == 431


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 3\r\ncontent-length: 4\r\n",
        b"content-length: -1\r\n",
        b"content-length: 99999999999999999999999\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"bad header\r\n",
        b"a: b\nc: d\x00\r\n",
    ],
)
def test_broken_framing_is_400(port, head):
    answer = talk(port, b"POST / HTTP/1.1\r\nhost: x\r\n" + head + b"\r\nabc")
    assert status(answer) == 400
    assert error(answer)["code"] == "malformed_request"


@pytest.mark.parametrize("hosts", [b"", b"host: a\r\nhost: b\r\n"])
def test_no_host_header_or_two_are_400(port, hosts):
    assert status(talk(port, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n")) == 400


@pytest.mark.parametrize(
    "line", [b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"{}\r\n"]
)
def test_what_is_not_http_is_400(port, line):
    assert status(talk(port, line)) == 400


def test_what_is_not_http_leaves_no_line_in_the_log(port, monkeypatch):
    """The guard does not log bytes that are not HTTP, since any client could fill the disk with such log lines."""
    lines = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "warning", lambda *arguments: lines.append(arguments))
    assert status(talk(port, b"\x16\x03\x01\x02\x00")) == 400
    assert not lines


def test_an_upgrade_is_not_followed(port):
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n"
    assert status(talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n")) == 200


def test_an_answer_nobody_reads_is_cut_off(port, app):
    before = app.disconnects
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_until(lambda: app.disconnects == before + 1, "the app gets a disconnect")


def test_a_body_that_stops_after_the_answer_has_its_connection_closed(port):
    answer = talk(port, b"POST /ignore HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc")
    assert status(answer) == 200


def test_a_pipelined_request_behind_a_long_answer_hides_no_disconnect():
    """uvicorn without the guard reports a disconnect only to the newest request of a connection, so an older request that is
    still being answered would run to its end."""
    app = EchoApp()
    with serving(app, HttpLimits.from_settings(Settings())) as port:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n")
            client.recv(1000)
        wait_until(lambda: app.disconnects, "the app gets a disconnect")
    assert app.disconnects == 1


def test_three_hundred_slow_clients_do_not_hold_up_a_fast_one(port):
    slow = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(300)]
    try:
        for client in slow:
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\n")
        assert status(talk(port, b"GET / HTTP/1.1\r\n" + CLOSE + b"\r\n")) == 200
        assert status(read_all(slow[-1])) == 408
    finally:
        for client in slow:
            client.close()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), 10)


KEEP = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def test_connections_past_the_limit_get_503_and_the_others_are_served(caplog):
    limits = HttpLimits.from_settings(Settings(max_connections=3))
    refusals = []
    with serving(EchoApp(), limits, refusals.append) as port:
        kept = [connect(port) for _ in range(3)]
        for client in kept:
            client.sendall(KEEP)
            assert status(client.recv(1000)) == 200
        for _ in range(5):
            answer = talk(port)
            assert status(answer) == 503
            assert error(answer)["code"] == "overloaded"
            assert b"retry-after: 1\r\n" in answer
        kept[0].sendall(KEEP)
        assert status(kept[0].recv(1000)) == 200
        kept.pop().close()
        wait_until(lambda: status(talk(port, b"GET / HTTP/1.1\r\n" + CLOSE + b"\r\n")) == 200, "a place is free again")
        for client in kept:
            client.close()
    assert refusals.count(503) >= 5
    (line,) = [line for line in caplog.records if "connections are refused" in line.message]  # many refusals give one log line
    assert line.limit == 3


class FewDescriptors(ServerChild):
    """Runs a server whose processes may have at most 100 files and sockets open."""

    def start(self):
        super().start()
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (100, 100))


def test_more_idle_connections_than_descriptors_are_counted_and_logged_and_others_are_served():
    with FewDescriptors() as server:
        idle = [connect(server.port) for _ in range(150)]
        with connect(server.port) as last:
            assert status(read_all(last)) == 503  # all earlier connections are accepted or refused by now
        wait_until(lambda: [line for line in server.lines if "connections are refused" in line["message"]], "a log line")
        idle[0].sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        found = re.search(rb'tidegate_http_refused_total{status="503"} (\S+)', read_all(idle[0]))
        answers = [client.recv(100) for client in idle[1:] if is_closed(client)]
        assert float(found[1]) == len(answers) + 1 > 100
        assert {status(answer) for answer in answers} == {503}
        for client in idle:
            client.close()
        wait_until(lambda: status(talk(server.port, b"GET /health/ready HTTP/1.1\r\n" + CLOSE + b"\r\n")) == 200, "it serves")
        assert len(server.children()) == 2


def is_closed(client):
    """Return whether the server has closed or refused a connection on which the client has sent nothing."""
    return bool(select.select([client], [], [], 0)[0])
