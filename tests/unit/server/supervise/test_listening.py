"""Tests how a listening socket is closed: what the kernel drops, and what the server waits for."""

import asyncio
import os
import socket
import struct

import pytest

from server.supervise.listening import accept_rest, copies_of_listeners, drop_new_connections, has_handshake, num_waiting

SYN_SENT, ESTABLISHED = 2, 1  # states in struct tcp_info


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request):
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as bound:
        yield bound


def connecting(listener):
    """Return a client's socket that has sent its first packet. On the loopback interface, an answer has arrived already."""
    client = socket.socket(listener.family)
    client.setblocking(False)
    client.connect_ex(listener.getsockname())
    return client


def state(client):
    return struct.unpack("B", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1))[0]


def test_new_connections_are_dropped_and_those_that_wait_stay_usable(listener):
    with connecting(listener) as early, listener.dup() as copy:
        drop_new_connections(copy)
        with connecting(listener) as late:
            assert (state(early), state(late)) == (ESTABLISHED, SYN_SENT)
        assert num_waiting(listener) == 1
        accepted, _ = listener.accept()
        with accepted:
            early.sendall(b"request")
            assert accepted.recv(10) == b"request"


async def test_the_rest_is_accepted_once_the_queue_is_empty(listener):
    with connecting(listener):
        rest = asyncio.create_task(accept_rest(listener))
        done, _ = await asyncio.wait({rest}, timeout=0.1)
        assert not done
        listener.accept()[0].close()
        await asyncio.wait_for(rest, 5)


def test_a_handshake_under_way_is_seen(listener):
    port = listener.getsockname()[1]
    with socket.socket(listener.family) as client:
        drop_new_connections(client)  # the client drops the server's answer, so the handshake does not end
        client.setblocking(False)
        assert not has_handshake(port)
        client.connect_ex(listener.getsockname())
        assert has_handshake(port)
        assert num_waiting(listener) == 0


def test_copies_of_a_listener_leave_it_as_it_is(listener):
    listener.setblocking(False)
    with connecting(listener), copies_of_listeners(listener.getsockname()[1]) as copies:
        assert [copy.getsockname() for copy in copies] == [listener.getsockname()]
        assert not os.get_blocking(listener.fileno())
    assert copies[0].fileno() == -1
    assert listener.fileno() >= 0
    listener.accept()[0].close()
