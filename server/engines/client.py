"""EngineClient: an API worker's side of the ZeroMQ boundary. Keeps each request whole until it ends, so that an engine's
death costs its streams nothing but time.

    connecting --Welcome--> synced --disconnect, or a Welcome nobody asked for--> connecting
                  |            |
                  |            '-- resume_timeout_s later, still connecting: every stream ends with EngineUnavailable
                  '-- every live stream is submitted again, with the tokens it has as `outputs`

A request that comes meanwhile waits in the same way. A death counts against the streams that the engine may have begun; one
that can afford no further death is a suspect. Suspects are sent one at a time, each once the one before has a token, and with a
token it is cleared for that engine: of many streams that shared a few deaths, only the one that engines die of is ended.

Each connection is a fresh socket with a Hello as its first message, so nothing of an older one is ever delivered late.
The event loop reads the socket itself: one decode a step and one dictionary look-up an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

import zmq

from engine.errors import EngineUnavailable, InternalError, Overloaded, TidegateError
from engine.messages import (
    Abort,
    EngineInfo,
    EngineMessage,
    Heartbeat,
    Hello,
    StepEvents,
    Submit,
    Welcome,
    WorkerMessage,
)
from engine.request import FinishReason, TokenEvent
from server.engines.base import EngineHealth
from server.engines.health import Pulse
from server.engines.stream import EngineStream
from server.engines.zmq_connection import Connection

log = logging.getLogger("tidegate.client")

RETRY_SECONDS = 0.25  # until a resumed request that found the queue full is sent again


class EngineClient:
    """One for each API worker; `worker` is its name, by which the engine knows it again."""

    def __init__(
        self,
        endpoint: str,
        worker: str,
        *,
        stall_timeout_s: float = 30.0,
        resume_timeout_s: float = 120.0,
        max_deaths: int = 3,
        max_queue: int = 4096,
    ) -> None:
        self._endpoint = endpoint
        self._worker = worker
        self._stall_timeout = stall_timeout_s
        self._resume_timeout = resume_timeout_s
        self._max_deaths = max_deaths
        self._max_queue = max_queue
        self._streams: dict[str, EngineStream] = {}
        self._suspects: deque[EngineStream] = deque()  # not yet sent to this engine
        self._probe: EngineStream | None = None  # the suspect sent last, while it has no answer
        self._unsent_aborts: list[str] = []
        self._pulse = Pulse(stall_timeout_s)
        self._info: EngineInfo | None = None
        self._synced = False
        self._restarts = 0
        self._draining = False
        self._closed = False
        self._give_up: asyncio.TimerHandle | None = None  # set while connecting again
        self._gave_up = False
        self._context = zmq.Context(io_threads=1)
        self._connection: Connection | None = None
        self._arrived = asyncio.Event()  # a first Welcome came

    async def start(self) -> None:
        """Begin to connect; returns at once. The engine may come later, and more than once."""
        self._loop = asyncio.get_running_loop()
        self._connect()

    def drain(self) -> None:
        """Say that we are not ready from here on. Requests are still taken, of connections that are still open."""
        self._draining = True

    async def close(self) -> None:
        """End what is left with EngineUnavailable, and the engine forgets it."""
        self._draining = self._closed = True
        self._end_all(EngineUnavailable("the server is shutting down"))
        if self._give_up is not None:
            self._give_up.cancel()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._synced = False
        self._context.destroy(linger=0)

    async def wait_ready(self, timeout_s: float | None = None) -> EngineInfo:
        """Wait for the first engine. Raises EngineUnavailable when `timeout_s` seconds pass without one."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except TimeoutError:
            raise EngineUnavailable(f"no engine came within {timeout_s} s") from None
        return self.info

    @property
    def info(self) -> EngineInfo:
        """Of the engine reached last. Raises EngineUnavailable before the first one was."""
        if self._info is None:
            raise EngineUnavailable("the engine is still starting: try again shortly")
        return self._info

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def health(self) -> EngineHealth:
        reason = self._why_not_ready()
        return EngineHealth(
            ready=reason is None,
            reason=reason,
            started=self._info is not None,
            restarts=self._restarts,
            stats=self._pulse.stats,
            startup={} if self._info is None else self._info.startup,
        )

    def submit(self, submit: Submit) -> EngineStream:
        """Send a request off, or keep it for an engine that is being started again. Raises EngineUnavailable where there was
        none yet, or there will be none."""
        if not self._synced:
            self._check_may_wait()
        if submit.request_id in self._streams:
            raise InternalError(f"request {submit.request_id!r} is under way already")
        stream = EngineStream(submit, self._abort)
        if self._synced and not self._send_off(stream):
            raise Overloaded("the engine does not keep up with new requests: try again later")
        self._streams[submit.request_id] = stream
        return stream

    def _check_may_wait(self) -> None:
        if self._info is None or self._draining or self._gave_up:
            raise EngineUnavailable(self._why_not_synced())
        if len(self._streams) >= self._max_queue + self._info.max_num_seqs:
            raise Overloaded("the engine is restarting, and its queue is full already: try again later")

    def _why_not_ready(self) -> str | None:
        if self._draining:
            return "the server is shutting down"
        return self._pulse.reason() if self._synced else self._why_not_synced()

    def _why_not_synced(self) -> str:
        if self._closed:
            return "the server is shutting down"
        return "the engine is still starting" if self._info is None else "the engine is restarting"

    def _abort(self, request_id: str) -> None:
        """A stream that has ended by itself; the engine is told, or learns it by not getting it again."""
        stream = self._streams.pop(request_id, None)
        if stream is None or not self._synced:
            return
        if stream.sent and not self._send(Abort([request_id])):
            self._unsent_aborts.append(request_id)
        self._cleared(stream)

    def _connect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._synced = False
        self._unsent_aborts.clear()
        self._suspects.clear()
        self._probe = None
        for stream in self._streams.values():
            stream.lose_engine()
        self._connection = Connection(self._context, self._loop, self._endpoint, self._on_message, self._on_disconnect)
        self._connection.send(Hello(self._worker))

    def _send(self, message: WorkerMessage) -> bool:
        return self._connection is not None and self._connection.send(message)

    def _send_off(self, stream: EngineStream) -> bool:
        stream.sent = self._send(stream.submission())
        return stream.sent

    def _on_disconnect(self) -> None:
        if self._synced:
            log.warning("engine lost", extra={"streams": len(self._streams)})
            self._count_death()
        self._reconnect()

    def _count_death(self) -> None:
        """Streams that only waited are spared: the engine begins them in this order, and has so many at a time at most."""
        sent = sorted((stream for stream in self._streams.values() if stream.sent), key=_order)
        for stream in sent[: self.info.max_num_seqs]:
            if not (stream.answered and self._is_suspect(stream)):
                stream.deaths += 1

    def _reconnect(self) -> None:
        if self._give_up is None:
            self._give_up = self._loop.call_later(self._resume_timeout, self._no_engine_came)
        self._connect()

    def _no_engine_came(self) -> None:
        self._gave_up = True
        self._end_all(EngineUnavailable(f"the engine died, and none took its place within {self._resume_timeout:g} s"))

    def _end_all(self, error: TidegateError) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.end(error)

    def _on_message(self, message: EngineMessage) -> None:
        if isinstance(message, StepEvents):
            if self._synced:
                self._pulse.moved()
                for event in message.events:
                    self._on_event(event)
        elif isinstance(message, Heartbeat):
            self._pulse.beat(message.stats, preparing=message.preparing)
            if self._unsent_aborts and self._send(Abort(self._unsent_aborts)):
                self._unsent_aborts = []
        elif self._synced:  # a Welcome nobody asked for: we read too slowly, and the engine let us go
            log.warning("the engine dropped this worker; connecting again", extra={"streams": len(self._streams)})
            self._reconnect()
        else:
            self._on_welcome(message)

    def _on_event(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return  # aborted meanwhile
        if event.finish is FinishReason.ERROR and stream.resumed and event.failure and event.failure.error == "Overloaded":
            # It was admitted once and is not to be refused now, for a queue that is full of its neighbours.
            stream.sent = False
            self._loop.call_later(RETRY_SECONDS, self._retry, stream, self._connection)
            return
        if event.finish is not None:
            del self._streams[event.request_id]
        stream.put(event)
        self._cleared(stream)

    def _on_welcome(self, message: Welcome) -> None:
        if self._info is not None and message.info.pid != self._info.pid:
            self._restarts += 1
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None
        self._info = message.info
        self._synced = True
        self._gave_up = False
        self._pulse = Pulse(self._stall_timeout)
        self._arrived.set()
        for stream in list(self._streams.values()):
            if self._is_suspect(stream):
                self._suspects.append(stream)
            else:
                self._resume(stream)
        self._send_suspect()
        log.info("engine found", extra={"engine_pid": message.info.pid, "resumed": len(self._streams)})

    def _is_suspect(self, stream: EngineStream) -> bool:
        return stream.deaths >= max(1, self._max_deaths - 1)

    def _send_suspect(self) -> None:
        self._probe = None
        while self._suspects and self._probe is None:
            stream = self._suspects.popleft()
            if self._streams.get(stream.request_id) is stream:
                self._resume(stream)
                self._probe = stream if stream.sent else None

    def _cleared(self, stream: EngineStream) -> None:
        """It has an answer or is gone, and the next suspect may go."""
        if stream is self._probe:
            self._send_suspect()

    def _retry(self, stream: EngineStream, connection: Connection | None) -> None:
        """Unless a new engine came meanwhile, which has been sent everything."""
        if self._connection is connection and self._streams.get(stream.request_id) is stream:
            self._resume(stream)

    def _resume(self, stream: EngineStream) -> None:
        if stream.deaths >= self._max_deaths:
            del self._streams[stream.request_id]
            log.error("a request is ended, since engines die of it", extra={"request_id": stream.request_id})
            stream.end(InternalError(f"the engine died {stream.deaths} times while it ran this request"))
        elif not self._send_off(stream):
            del self._streams[stream.request_id]
            stream.end(EngineUnavailable("the engine does not take requests"))


def _order(stream: EngineStream) -> tuple[bool, int]:
    return not stream.answered, stream.priority
