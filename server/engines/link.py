"""EngineLink: keeps one API worker connected to one engine, also when that engine dies and is restarted.

    connecting --Welcome--> live --disconnection, or a second Welcome--> connecting

Each attempt to connect uses a new socket whose first message is a Hello, so a message of an earlier connection is never
delivered late. The engine aborts everything that a worker had sent before its Hello.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Protocol

import zmq

from engine.messages import (
    Abort,
    CacheReset,
    EngineInfo,
    EngineMessage,
    Heartbeat,
    Hello,
    ResetCache,
    StepEvents,
    Submit,
    TierName,
    Welcome,
)
from engine.request import TokenEvent
from server.engines.health import Clock, EngineHealthTracker
from server.engines.stream import EngineStream
from server.engines.zmq_connection import ZmqConnection

log = logging.getLogger("tidegate.client")

CONNECT_RETRY_SECONDS = 1.0  # pause before another attempt if the process has no descriptor free for the socket


class LinkListener(Protocol):
    """Receives what an EngineLink reports. All methods are called from the event loop."""

    def on_engine_found(self, link: EngineLink) -> None:
        """Called when the link becomes live: an engine has answered with its Welcome."""

    def on_engine_lost(self, link: EngineLink, sent: list[EngineStream], *, died: bool) -> None:
        """The link was live and connects again after this call.

        The streams `sent` were at the engine, in the order in which it received them.
        `died` is False if the engine still runs and has only dropped this worker.
        """

    def on_event(self, stream: EngineStream, event: TokenEvent) -> None:
        """Called when the engine has sent an event of a stream. Before a last event, the link has already removed the stream."""


class EngineLink:
    """Connects to one engine, reconnects after each loss, and records which streams the engine has."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        worker: str,
        listener: LinkListener,
        *,
        stall_timeout_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        """`worker` is the name by which the engine recognises this worker when it connects again."""
        self.info: EngineInfo | None = None  # what the engine that connected last says of itself
        self.live = False
        self.restarts = 0  # engines that took the place of an earlier one
        self.sent: dict[str, EngineStream] = {}  # streams at the engine by request id, in the order of submission
        self._context, self._endpoint, self._worker, self._listener = context, endpoint, worker, listener
        self._stall_timeout_s, self._clock = stall_timeout_s, clock
        self._unsent_aborts: list[str] = []
        self._resets: dict[int, asyncio.Future[dict[TierName, int]]] = {}  # the ResetCache messages without an answer, by number
        self._num_resets = 0
        self.health = EngineHealthTracker(stall_timeout_s, clock)  # tracks the engine that connected last
        self._connection: ZmqConnection | None = None
        self._retry: asyncio.TimerHandle | None = None  # runs while no socket can be opened

    @property
    def max_model_len(self) -> int:
        """The engine's context in tokens; 0 before the first engine has connected."""
        return 0 if self.info is None else self.info.limits.max_model_len

    def connect(self) -> None:
        """Start to connect, with a new socket; returns at once. If no socket can be opened, the link retries after a pause."""
        self._disconnect()
        try:
            self._connection = ZmqConnection(self._context, self._endpoint, self._on_message, self._on_disconnect)
        except zmq.ZMQError as error:  # most likely EMFILE: the process has as many files and sockets open as it may have
            log.error(
                "no socket to the engine at %s can be opened (%s); the next attempt is in %g s",
                self._endpoint,
                error.strerror,
                CONNECT_RETRY_SECONDS,
            )
            self._retry = asyncio.get_running_loop().call_later(CONNECT_RETRY_SECONDS, self.connect)
        else:
            self._connection.send(Hello(self._worker))

    def close(self) -> None:
        self._disconnect()

    def why_not_ready(self) -> str | None:
        """Return the reason why the engine cannot take requests now, for people, or None if it can."""
        if self.live:
            return self.health.why_unhealthy()
        return "the engine is still starting" if self.info is None else "the engine is restarting"

    def send(self, stream: EngineStream, submit: Submit) -> bool:
        """Send `submit`, the message of `stream`. Returns False if the engine has not read for so long that the queue is full.

        Aborts that are due are sent first, since one of them may be for an earlier request with the same id.
        """
        if self._connection is None or not self._send_aborts() or not self._connection.send(submit):
            return False
        self.sent[stream.request_id] = stream
        return True

    def reset_cache(self, tiers: Collection[TierName]) -> asyncio.Future[dict[TierName, int]]:
        """Ask the engine to forget the blocks that `tiers` have of prefixes. The result is how many blocks each of them had.

        The result is a ConnectionError instead if the engine is lost before it answers, or cannot be asked.
        """
        answer: asyncio.Future[dict[TierName, int]] = asyncio.get_running_loop().create_future()
        message = ResetCache(self._num_resets, list(tiers))
        if self._connection is None or not self._connection.send(message):
            answer.set_exception(ConnectionError("cannot be reached"))
            return answer
        self._num_resets += 1
        self._resets[message.number] = answer
        return answer

    def abort(self, request_id: str) -> None:
        """Abort a request if it is at the engine. An Abort that cannot be sent now is sent after the next heartbeat."""
        if self.sent.pop(request_id, None) is not None:
            self._unsent_aborts.append(request_id)
            self._send_aborts()

    def _disconnect(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.live = False
        self.sent = {}
        self._unsent_aborts = []
        resets, self._resets = self._resets, {}
        for answer in resets.values():
            if not answer.done():
                answer.set_exception(ConnectionError("was lost before it answered"))

    def _on_disconnect(self) -> None:
        self._lose(died=True)

    def _lose(self, *, died: bool) -> None:
        was_live, sent = self.live, list(self.sent.values())
        self._disconnect()
        if was_live:  # the listener first: it must hear of the loss even if no new socket can be opened
            log.warning("engine lost" if died else "the engine dropped this worker", extra={"streams": len(sent)})
            self._listener.on_engine_lost(self, sent, died=died)
        self.connect()

    def _on_message(self, message: EngineMessage) -> None:
        if isinstance(message, StepEvents):
            self.health.record_step()
            for event in message.events:
                stream = self.sent.get(event.request_id) if event.finish is None else self.sent.pop(event.request_id, None)
                if stream is not None:  # None if the stream was aborted meanwhile
                    self._listener.on_event(stream, event)
        elif isinstance(message, Heartbeat):
            self.health.record_heartbeat(message.stats, preparing=message.preparing)
            self._send_aborts()
        elif isinstance(message, CacheReset):
            answer = self._resets.pop(message.number, None)
            if answer is not None and not answer.done():
                answer.set_result(message.blocks)
        elif self.live:  # a second Welcome: this worker read too slowly, so the engine has dropped it and wants a new Hello
            self._lose(died=False)
        else:
            self._on_welcome(message)

    def _on_welcome(self, message: Welcome) -> None:
        if self.info is not None and message.info.pid != self.info.pid:
            self.restarts += 1
        self.info = message.info
        self.live = True
        self.health = EngineHealthTracker(self._stall_timeout_s, self._clock)
        log.info("engine found", extra={"engine_pid": message.info.pid})
        self._listener.on_engine_found(self)

    def _send_aborts(self) -> bool:
        """Send the Abort of the requests that were aborted and not reported yet. Returns False if it cannot be sent now."""
        if self._unsent_aborts:
            if self._connection is None or not self._connection.send(Abort(self._unsent_aborts)):
                return False
            self._unsent_aborts = []
        return True
