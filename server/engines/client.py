"""EngineClient: an API worker's access to the engines.

EngineClient keeps each request and its received tokens until the last event. The death of an engine therefore delays a stream
and loses no tokens.

Each engine has an EngineLink. When a link loses its engine, the client submits the streams of that link again, with the tokens
received so far, to another live engine. If no engine is live, these streams and new requests wait for up to
`resume_timeout_s`. `Suspects` finds the streams that make engines die.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence

import zmq

from engine.errors import ContextTooLong, EngineUnavailable, InternalError, Overloaded, TidegateError
from engine.messages import EngineInfo, Submit, TierName
from engine.request import FinishReason, TokenEvent
from engine.scheduler.shares import Held, QueueShares
from server.engines.base import EngineHealth
from server.engines.cache_reset import reset_caches
from server.engines.health import Clock
from server.engines.link import EngineLink
from server.engines.stats import combined
from server.engines.stream import EngineStream
from server.engines.suspects import Suspects

log = logging.getLogger("tidegate.client")

RETRY_SECONDS = 0.25  # pause before a request that was accepted earlier is sent again to an engine whose queue is full
SHUTTING_DOWN = "the server is shutting down"


class EngineClient:
    """Sends one API worker's requests to the engines, and submits them again when an engine dies.

    Implements `server.engines.base.EngineClientProtocol` and `server.engines.link.LinkListener`.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        worker: str,
        *,
        stall_timeout_s: float,
        resume_timeout_s: float,
        max_deaths: int,
        max_queue: int,
        max_queue_tokens: int,
        clock: Clock = time.monotonic,
    ) -> None:
        """`endpoints` has a ZeroMQ address for each engine. `worker` is the name by which the engines know this worker."""
        self._context = zmq.Context(io_threads=1)
        self._links = [
            EngineLink(self._context, endpoint, worker, self, stall_timeout_s=stall_timeout_s, clock=clock)
            for endpoint in endpoints
        ]
        self._resume_timeout_s, self._stall_timeout_s = resume_timeout_s, stall_timeout_s
        self._shares = QueueShares(max_queue, max_queue_tokens)
        self._clock = clock
        self._streams: dict[str, EngineStream] = {}  # all streams that have not ended, by request id
        self._waiting: dict[str, EngineStream] = {}  # the streams that wait for an engine, by request id
        self._suspects = Suspects(max_deaths)
        self._info: EngineInfo | None = None  # what the engine that connected last says of itself
        self._found = asyncio.Event()  # set once an engine has connected
        self._give_up: asyncio.TimerHandle | None = None  # ends all streams when it fires; runs while no engine is live
        self._gave_up = False  # `_give_up` has fired, and no engine has connected since
        self._draining = False

    async def start(self) -> None:
        """Start to connect to the engines and return at once. An engine may start later, and may be replaced at any time."""
        for link in self._links:
            link.connect()

    def drain(self) -> None:
        """Report `ready` as False from now on. Requests that still arrive are accepted while an engine is live."""
        self._draining = True

    async def close(self) -> None:
        """End all streams with EngineUnavailable and disconnect. The engines then abort what they still run for this worker."""
        self._draining = True
        self._stop_timer()
        self._end_all(EngineUnavailable(SHUTTING_DOWN))
        for link in self._links:
            link.close()
        self._context.destroy(linger=0)

    async def wait_ready(self, timeout_s: float | None = None) -> EngineInfo:
        """Wait for the first engine. Raises EngineUnavailable if none has connected after `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._found.wait(), timeout_s)
        except TimeoutError:
            raise EngineUnavailable(f"no engine came within {timeout_s} s") from None
        return self.info

    @property
    def info(self) -> EngineInfo:
        """The live engine with the largest context or, if none is live, the engine that connected last.

        Raises EngineUnavailable before the first engine has connected.
        """
        live = [link.info for link in self._live_links() if link.info is not None]
        info = max(live, key=lambda info: info.limits.max_model_len, default=self._info)
        if info is None:
            raise EngineUnavailable("the engine is still starting: try again shortly")
        return info

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
            restarts=sum(link.restarts for link in self._links),
            stats=combined([link.health.stats for link in self._links if link.health.stats is not None]),
            startup={} if self._info is None else self._info.startup,
        )

    def submit(self, submit: Submit) -> EngineStream:
        """Send a request to an engine. While no engine is live, keep the request for the first engine that connects.

        Raises EngineUnavailable if no engine has connected yet or none is expected, and Overloaded if too many requests wait.
        """
        live = self._live_links()
        self._shares.note(submit.tenant)
        if not live:
            self._check_may_wait(submit)
        if submit.request_id in self._streams:
            raise InternalError(f"request {submit.request_id!r} is under way already")
        stream = EngineStream(submit, self._abort, self._clock())
        if not live:
            self._waiting[submit.request_id] = stream
        elif not choose(submit, live).send(stream, submit):
            raise Overloaded("the engine does not keep up with new requests: try again later")
        self._streams[submit.request_id] = stream
        return stream

    async def reset_cache(self, tiers: Collection[TierName]) -> dict[TierName, int]:
        return await reset_caches(self._links, tiers, self._stall_timeout_s)

    def on_engine_found(self, link: EngineLink) -> None:
        self._info = link.info
        self._gave_up = False
        self._stop_timer()
        self._found.set()
        self._place_waiting()

    def on_engine_lost(self, link: EngineLink, sent: list[EngineStream], *, died: bool) -> None:
        convicted: dict[str, TidegateError] = {}
        if died and link.info is not None:
            convicted = self._suspects.charge_death(sent, link.info.max_num_seqs)
        for stream in sent:
            stream.lose_engine()
            self._suspects.release(stream)
            if stream.request_id in convicted:
                self._end(stream, convicted[stream.request_id])
            else:
                self._waiting[stream.request_id] = stream
        self._place_waiting()

    def on_event(self, stream: EngineStream, event: TokenEvent) -> None:
        if stream.resumed and _is_overload(event):
            # An engine accepted this request before, so a full queue delays the request now and does not end it.
            self._retry_later(stream)
            return
        stream.put(event)
        if stream.ended:
            self._forget(stream)
        elif stream is self._suspects.probe and stream.has_progressed:
            self._release(stream)

    def _live_links(self) -> list[EngineLink]:
        return [link for link in self._links if link.live]

    def _check_may_wait(self, submit: Submit) -> None:
        if self._info is None or self._draining or self._gave_up:
            raise EngineUnavailable(self._why_not_ready() or "the engine is restarting")
        max_num_seqs = sum(link.info.max_num_seqs for link in self._links if link.info is not None)
        waiting, own = self._held(None), self._held(submit.tenant)
        why = self._shares.refusal(submit.num_prompt, waiting, own, more=max_num_seqs)
        if why is not None:
            raise Overloaded(f"the engine is restarting, and {why}: try again later")

    def _held(self, tenant: str | None) -> Held:
        """Return the streams of `tenant`, or all. Prompts that an engine had before take no room of the queue."""
        streams = [stream for stream in self._streams.values() if tenant in (None, stream.request.tenant)]
        return Held(len(streams), sum(stream.request.num_prompt for stream in streams if not stream.resumed))

    def _why_not_ready(self) -> str | None:
        if self._draining:
            return SHUTTING_DOWN
        reasons = [link.why_not_ready() for link in self._links]
        return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))

    def _place_waiting(self) -> None:
        """Submit the streams that wait for an engine, or start the timer that ends them if no engine is live."""
        if not self._live_links():
            if self._give_up is None:
                loop = asyncio.get_running_loop()
                self._give_up = loop.call_later(self._resume_timeout_s, self._no_engine_came)
            return
        waiting, self._waiting = self._waiting, {}
        for stream in waiting.values():
            if self._suspects.is_suspect(stream):
                self._suspects.add(stream)
            else:
                self._resume(stream)
        self._send_suspect()

    def _send_suspect(self) -> None:
        """Send the next suspect stream to an engine, unless a suspect is at an engine already.

        If that stream cannot be sent, try the suspect after it.
        """
        while self._live_links() and (stream := self._suspects.next()) is not None:
            self._resume(stream)

    def _resume(self, stream: EngineStream) -> None:
        """Submit a stream to a live engine. Retry later if the stream cannot be sent now.

        If the stream is too long for the engine's context, end it with ContextTooLong.
        """
        link = choose(stream.request, self._live_links())
        try:
            submit = stream.resumption(link.max_model_len, self._clock())
        except ContextTooLong as error:
            self._end(stream, error)
        else:
            if not link.send(stream, submit):
                self._retry_later(stream)

    def _retry_later(self, stream: EngineStream) -> None:
        """Submit a stream again after RETRY_SECONDS. A suspect stream goes to the end of the queue of suspects."""
        asyncio.get_running_loop().call_later(RETRY_SECONDS, self._retry, stream)
        self._release(stream)

    def _retry(self, stream: EngineStream) -> None:
        if not stream.ended:
            self._waiting[stream.request_id] = stream
            self._place_waiting()

    def _no_engine_came(self) -> None:
        self._give_up = None
        self._gave_up = True
        self._end_all(EngineUnavailable(f"the engine died, and none took its place within {self._resume_timeout_s:g} s"))

    def _abort(self, stream: EngineStream) -> None:
        for link in self._links:
            link.abort(stream.request_id)
        self._forget(stream)

    def _end_all(self, error: TidegateError) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, error)

    def _end(self, stream: EngineStream, error: TidegateError) -> None:
        stream.end(error)
        self._forget(stream)

    def _forget(self, stream: EngineStream) -> None:
        """Remove a stream that has ended and that no engine is running. Every stream leaves the client through this method."""
        self._streams.pop(stream.request_id, None)
        self._waiting.pop(stream.request_id, None)
        self._release(stream)

    def _release(self, stream: EngineStream) -> None:
        """If `stream` was the suspect at an engine, schedule the sending of the next suspect."""
        if self._suspects.release(stream):
            asyncio.get_running_loop().call_soon(self._send_suspect)

    def _stop_timer(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None


def choose(submit: Submit, links: Sequence[EngineLink]) -> EngineLink:
    """Choose the engine for a request among `links`, which are live and at least one.

    A fork goes to the engine of its sibling, whose prompt blocks it shares. Other requests go to the engine with the fewest
    streams of this worker, among the engines that are ready and whose context can hold prompt and max_tokens. If no engine's
    context can hold both, the engine with the largest context is chosen.
    """
    if len(links) == 1:
        return links[0]
    for link in links:
        if submit.fork_of is not None and submit.fork_of in link.sent:
            return link
    needed = submit.num_prompt + submit.params.max_tokens
    largest = max(link.max_model_len for link in links)
    fitting = [link for link in links if link.max_model_len >= min(needed, largest)]
    ready = [link for link in fitting if link.why_not_ready() is None]
    return min(ready or fitting, key=lambda link: len(link.sent))


def _is_overload(event: TokenEvent) -> bool:
    return event.finish is FinishReason.ERROR and event.failure is not None and event.failure.error == Overloaded.__name__
