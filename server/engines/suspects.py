"""Suspects: finds the requests that make engines die, by sending the suspected ones to engines one at a time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from engine.errors import EngineUnavailable, InternalError, TidegateError
from engine.slo import SLO_CLASSES
from server.engines.stream import EngineStream

log = logging.getLogger("tidegate.client")


class Suspects:
    """Charges streams with engine deaths, and keeps a queue of the streams that can afford no further death.

    A death is charged to every stream that the engine may have been running and had made no progress with. A stream that
    progresses on any engine is innocent: all its charges are dropped (`EngineStream.put`). A stream with `max_deaths` charges
    is ended, and one with one charge less is a suspect. One suspect is at an engine at a time, until it has progressed or
    ended. So among many streams that shared a few deaths, only the stream that engines die of reaches the limit.
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._num_deaths = 0  # deaths of all engines of this worker
        self._queue: deque[EngineStream] = deque()
        self._probe: EngineStream | None = None

    @property
    def probe(self) -> EngineStream | None:
        """The suspect stream that is at an engine now and has not progressed there, or None."""
        return self._probe

    def is_suspect(self, stream: EngineStream) -> bool:
        return stream.deaths >= max(1, self._max_deaths - 1)

    def charge_death(self, sent: Sequence[EngineStream], max_num_seqs: int) -> dict[str, TidegateError]:
        """Charge an engine's death to `sent`, the streams that the engine had, in the order in which it received them.

        Streams that only waited in the engine's queue are spared: the engine starts streams about in order of class, priority
        and arrival, and runs `max_num_seqs` at most. Returns the streams to end, by request id, and the error of each.
        """
        self._num_deaths += 1
        by_start = sorted(sent, key=_by_start)
        charged = [stream for stream in by_start[:max_num_seqs] if not stream.has_progressed]
        for stream in charged:
            stream.deaths += 1
            if stream.deaths == 1:
                stream.deaths_since = self._num_deaths
        convicted = [stream for stream in charged if stream.deaths >= self._max_deaths]
        return {stream.request_id: self._verdict(stream, alone=len(convicted) == 1) for stream in convicted}

    def add(self, stream: EngineStream) -> None:
        """Add a suspect stream to the queue from which `next` takes."""
        self._queue.append(stream)

    def next(self) -> EngineStream | None:
        """Take the next suspect stream from the queue, to be sent to an engine. It becomes the probe.

        Returns None if another suspect is the probe already, or if the queue is empty.
        """
        while self._queue and self._probe is None:
            stream = self._queue.popleft()
            if not stream.ended:
                self._probe = stream
                return stream
        return None

    def release(self, stream: EngineStream) -> bool:
        """Record that a stream has progressed, has ended or has lost its engine. Returns True if the stream was the probe."""
        if stream is not self._probe:
            return False
        self._probe = None
        return True

    def _verdict(self, stream: EngineStream, *, alone: bool) -> TidegateError:
        """Return the error that ends a stream with too many engine deaths.

        The stream is to blame, and the error an InternalError, if no other stream reached the limit at the same death and if
        every engine death since its first charge was charged to it. Otherwise engines seem to die of something else.
        """
        times = "once" if stream.deaths == 1 else f"{stream.deaths} times"
        extra = {"request_id": stream.request_id, "deaths": stream.deaths}
        if alone and self._num_deaths - stream.deaths_since + 1 == stream.deaths:
            log.error("a request is ended, since engines die of it", extra=extra)
            return InternalError(f"the engine died {times} while it ran this request")
        log.error("a request is ended after several engine deaths, of which it need not be the cause", extra=extra)
        return EngineUnavailable(f"the engine died {times} while it ran this request and others: try again later")


def _by_start(stream: EngineStream) -> tuple[bool, int, int]:
    request = stream.request
    return not stream.has_begun, SLO_CLASSES[request.slo].rank, request.priority
