"""Closes a listening socket without a reset for any client.

A close resets every connection that the kernel has completed and no process has accepted yet, and every handshake that is under
way. So the kernel first drops the packets that open new connections. Their clients repeat them a second later, and are then
refused. The event loop meanwhile accepts what is there.

    drop_new_connections    no new handshake begins, on any copy of the socket in any process
    accept_rest             the handshakes end, and the queue of connections that wait to be accepted is empty
    close

Only Linux has what this needs. On other systems a close may still reset connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator

log = logging.getLogger("tidegate.listening")

HANDSHAKE_SECONDS = 1.0  # longest wait for handshakes under way: a client that has not answered by then may never do so
CHECK_SECONDS = 0.01
SO_ATTACH_FILTER = 26  # from Linux's asm-generic/socket.h
# A classic BPF program. For the filter of a TCP socket, a packet begins with its TCP header.
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load byte 13, the flags
    (0x45, 0, 1, 0x02),  # if SYN is not set, skip one instruction
    (0x06, 0, 0, 0),  # drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # keep all of the packet
)
_QUEUE_OFFSET = 24  # of tcpi_unacked in struct tcp_info: for a listening socket, the connections that wait to be accepted
_SYN_RECEIVED = "03"  # the state of a handshake under way in /proc/net/tcp


def drop_new_connections(listener: socket.socket) -> None:
    """Let the kernel drop the packets that open a connection to `listener`. This concerns all copies of the socket, for good."""
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
    held = ctypes.create_string_buffer(code, len(code))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(_DROP_SYN), ctypes.addressof(held)))
    except OSError as error:  # a sandbox may forbid it
        log.warning("clients that connect while the server stops may be reset", extra={"reason": error.strerror})


async def accept_rest(listener: socket.socket) -> None:
    """Wait until no connection waits to be accepted from `listener`, which the event loop or another thread serves, and until
    no handshake is under way, for which it waits HANDSHAKE_SECONDS at most."""
    if sys.platform != "linux":
        return
    clock = asyncio.get_running_loop().time
    until = clock() + HANDSHAKE_SECONDS
    port = listener.getsockname()[1]
    while True:
        under_way = clock() < until and await asyncio.to_thread(has_handshake, port)
        if not under_way and num_waiting(listener) == 0:  # in this order: the end of a handshake adds to the queue
            return
        await asyncio.sleep(CHECK_SECONDS)


def num_waiting(listener: socket.socket) -> int:
    """Return how many connections wait to be accepted from `listener`. Linux only."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE_OFFSET + 4)
    return int(struct.unpack_from("I", info, _QUEUE_OFFSET)[0])


def has_handshake(port: int) -> bool:
    """Return whether a client has begun and not ended a handshake with `port`, on any address. Linux only."""
    end = f":{port:04X}"
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(path) as table:  # a kernel without IPv6 has one file
            for line in table:
                _, local, _, state, _ = line.split(maxsplit=4)
                if state == _SYN_RECEIVED and local.endswith(end):
                    return True
    return False


@contextlib.contextmanager
def copies_of_listeners(port: int) -> Iterator[list[socket.socket]]:
    """Provide copies of the TCP sockets with which this process listens on `port`, for sockets that a library owns.

    The copies are closed at the end. On systems other than Linux there are none.
    """
    numbers = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    found = [number for number in map(int, numbers) if _listens(number, port)]  # before the first copy takes a number of the list
    with contextlib.ExitStack() as stack:  # socket.dup would make the owner's calls block
        yield [stack.enter_context(socket.socket(fileno=os.dup(number))) for number in found]


def _listens(descriptor: int, port: int) -> bool:
    """Return whether `descriptor` is a listening TCP socket with this port. Another thread may close any other descriptor."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # not a socket, or closed meanwhile
        owned = socket.socket(fileno=descriptor)
        stack.callback(owned.detach)  # its owner closes it
        is_tcp = owned.family in (socket.AF_INET, socket.AF_INET6) and owned.type == socket.SOCK_STREAM
        return is_tcp and owned.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1 and owned.getsockname()[1] == port
    return False
