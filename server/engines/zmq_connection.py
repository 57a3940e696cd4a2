"""ZmqConnection: one ZeroMQ socket to an engine. The asyncio event loop reads it. A reconnection needs a new ZmqConnection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from engine.messages import EngineMessage, WorkerMessage, decode_engine_message, encode

log = logging.getLogger("tidegate.client")

READ_SECONDS = 0.01  # longest uninterrupted read: other tasks of the event loop must run, however fast the engine sends
SEND_QUEUE = 65536  # messages that ZeroMQ keeps for an engine that does not read


class ZmqConnection:
    """Wraps a DEALER socket and the monitor socket that reports its disconnection. The running event loop reads both.

    ZeroMQ's file descriptor signals only that its state has changed, and a send can consume that signal. So a read goes on
    until the socket is empty, or else schedules the next read; and every send, failed ones included, schedules a read.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        on_message: Callable[[EngineMessage], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        """Raises zmq.ZMQError if a socket cannot be opened, for example because the process has no descriptor free."""
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_disconnect = on_message, on_disconnect
        self._read_scheduled = False
        self._closed = False
        self._socket = context.socket(zmq.DEALER)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._socket.close)
            self._socket.setsockopt(zmq.RCVHWM, 0)
            self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.RECONNECT_IVL, 20)  # milliseconds
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            on_failure.callback(self._monitor.close)
            self._fds = int(self._socket.getsockopt(zmq.FD)), int(self._monitor.getsockopt(zmq.FD))
            self._socket.connect(endpoint)
            on_failure.pop_all()
        for fd in self._fds:
            self._loop.add_reader(fd, self._read)
        self._schedule_read()

    def send(self, message: WorkerMessage) -> bool:
        """Queue a message and return at once. Returns False if the queue is full because the engine has not read for long."""
        self._schedule_read()
        frame = encode(message)
        if self._try_send(frame):
            return True
        # A send checks at most once in about a millisecond whether a full queue has space again. A poll checks it now.
        return self._socket.poll(0, zmq.POLLOUT) != 0 and self._try_send(frame)

    def close(self) -> None:
        self._closed = True
        for fd in self._fds:
            self._loop.remove_reader(fd)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def _try_send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _schedule_read(self) -> None:
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._read_scheduled = False
        until = self._loop.time() + READ_SECONDS
        while not self._closed:  # handling a message may close this connection
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode_engine_message(frame)
            except msgspec.MsgspecError as error:
                log.error("a message of the engine is dropped, since it cannot be decoded: %s", error)
                continue
            self._on_message(message)
            if self._loop.time() > until:
                self._schedule_read()
                return
        if not self._closed and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._on_disconnect()
