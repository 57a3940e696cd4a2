"""Tests that a real `tidegate serve` resets no client's connection while it stops."""

import contextlib
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from tests.support.children import ServerChild

REQUEST = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_REQUEST = REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # the preface and an empty SETTINGS frame
NUM_IDLE, NUM_QUEUED, NUM_CLIENTS = 10, 30, 3  # each port has NUM_CLIENTS clients that open connections again and again
DROPPED_SECONDS = 0.1  # a connection that takes longer met a port that is about to close. The kernel would try again after 1 s


def connect(port, seconds=20):
    return socket.create_connection(("127.0.0.1", port), seconds)


def read_all(client):
    return b"".join(iter(lambda: client.recv(65536), b""))


def ask(port, request):
    """Send a request on a new connection, which must be answered, unless the kernel drops the attempt to connect."""
    try:
        client = connect(port, DROPPED_SECONDS)
    except TimeoutError:
        return
    with client:
        client.settimeout(20)
        client.sendall(request)
        assert client.recv(10)


def ask_until_refused(port, request, started):
    """Open connections one after the other. The barrier `started` is reached after the first one."""
    ask(port, request)
    started.wait(20)
    with contextlib.suppress(ConnectionRefusedError):
        while True:
            ask(port, request)


@pytest.mark.parametrize("api_workers", [1, 2])
def test_a_server_that_stops_resets_no_client(api_workers):
    """The workers are stopped while clients connect, so that the kernel has completed connections that no worker has accepted."""
    with ServerChild(api_workers=api_workers) as server, contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(3 * NUM_CLIENTS))
        workers = [pid for title, pid in server.children().items() if title.startswith("tidegate: api")]
        idle = [stack.enter_context(connect(server.port)) for _ in range(NUM_IDLE)]
        for client in idle:
            client.sendall(REQUEST)
            assert client.makefile("rb", 0).readline() == b"HTTP/1.1 200 OK\r\n"
        ports = [(server.port, LAST_REQUEST), (server.admin_port, LAST_REQUEST), (server.grpc_port, HTTP2_START)]
        started = Barrier(3 * NUM_CLIENTS + 1)
        coming = [pool.submit(ask_until_refused, *port, started) for port in ports for _ in range(NUM_CLIENTS)]
        started.wait(20)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        queued = [stack.enter_context(connect(server.port)) for _ in range(NUM_QUEUED)]
        for client in queued[::2]:
            client.sendall(LAST_REQUEST)
        server.process.send_signal(signal.SIGTERM)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        for client in [*queued[1::2], *idle]:
            client.sendall(LAST_REQUEST)
        for client in [*queued, *idle]:
            assert read_all(client).count(b"HTTP/1.1 200 OK\r\n") == 1
        for client in coming:
            client.result()  # raises the client's ConnectionResetError
        assert server.process.wait(10) == 0
