"""Defines LocalEngine, which replaces `EngineClient` and runs a Core with a FakeRunner in the event loop of a test.

A LocalEngine needs no process, no socket and no torch.

async with LocalEngine() as engine:
    service = GenerateService(engine, text, settings, metrics)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from types import TracebackType

from engine.config import CacheConfig, EngineConfig, ModelLimits, SchedulerConfig
from engine.core import Core
from engine.errors import Aborted, EngineUnavailable, TidegateError
from engine.fake import build_fake
from engine.messages import EngineInfo, Submit, TierName
from engine.request import FinishReason, TokenEvent
from server.engines.base import EngineHealth, error_of, size_of

# The vocabulary has the size of the tiny checkpoint's (tests/support/tiny_checkpoint.py).
LIMITS = ModelLimits(max_model_len=512, vocab_size=512, eos_token_ids=(1,), dtype="float32")
CONFIG = EngineConfig(
    model="demo",
    runner="fake",
    debug_checks=True,
    cache=CacheConfig(block_size=16, num_blocks=512),
    scheduler=SchedulerConfig(max_num_seqs=64, max_queue=64),
)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Let other tasks of the event loop run until `condition()` is true. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition may be any state of the engine
            await asyncio.sleep(0)


class LocalStream:
    """Holds the events of one request for its reader. Implements `server.engines.base.TokenStream`."""

    def __init__(self, engine: LocalEngine, request_id: str) -> None:
        self._engine = engine
        self._request_id = request_id
        self._events: deque[TokenEvent] = deque()
        self._error: TidegateError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()

    @property
    def unread(self) -> int:
        return sum(map(size_of, self._events))

    def abort(self) -> None:
        if not self._ended:
            self._engine.aborted.append(self._request_id)
            self._engine.drop(self._request_id)
            self.end(Aborted("the request was aborted"))

    def put(self, event: TokenEvent) -> None:
        if event.finish in (FinishReason.ABORT, FinishReason.ERROR):
            self.end(error_of(event))
            return
        self._events.append(event)
        self._ended = event.finish is not None
        self._wake()

    def end(self, error: TidegateError | None) -> None:
        self._error = error
        self._ended = True
        if isinstance(error, Aborted):
            self._events.clear()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class LocalEngine:
    """Runs the steps of a Core while it has requests. Implements `server.engines.base.EngineClientProtocol`.

    `pause()` stops the engine between two steps, so that a test can inspect running requests.
    """

    def __init__(self, config: EngineConfig = CONFIG, limits: ModelLimits = LIMITS, *, step_seconds: float = 0.0) -> None:
        self.core = Core(build_fake(config, limits))
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []  # request ids whose stream was aborted, in order
        self.unavailable: str | None = None  # if not None, every submit is refused with this reason
        self._step_seconds = step_seconds
        self._streams: dict[str, LocalStream] = {}
        self._work = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LocalEngine:
        self._task = asyncio.create_task(self._loop())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._task is None:
            return
        if self._task.done():
            self._task.result()  # an exception of the core fails the test
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.core.close()

    @property
    def info(self) -> EngineInfo:
        return self.core.info()

    @property
    def health(self) -> EngineHealth:
        ready = self.unavailable is None
        return EngineHealth(ready=ready, reason=self.unavailable, started=True, stats=self.core.stats())

    def submit(self, submit: Submit) -> LocalStream:
        if self.unavailable is not None:
            raise EngineUnavailable(self.unavailable)
        self.core.submit(submit)
        self.submitted.append(submit)
        stream = LocalStream(self, submit.request_id)
        self._streams[submit.request_id] = stream
        self._work.set()
        return stream

    async def reset_cache(self, tiers: Collection[TierName]) -> dict[TierName, int]:
        if self.unavailable is not None:
            raise EngineUnavailable(f"engine 0 is not ready ({self.unavailable}): no cache was reset, try again later")
        return self.core.reset_cache(tiers)

    def tend(self) -> None:
        """Let the disk tier go on without requests, as an idle engine does."""
        self.core.tend()
        if self.core.has_work:
            self._work.set()

    def drop(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self.core.abort(request_id)
        self._work.set()

    def fail(self, error: TidegateError) -> None:
        """End every running request with `error`, as EngineClient does if its engine does not restart in time."""
        for request_id, stream in list(self._streams.items()):
            self.drop(request_id)
            stream.end(error)

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    @property
    def idle(self) -> bool:
        """Return whether neither the core nor a stream has a request."""
        return not self.core.has_work and not self._streams

    async def _loop(self) -> None:
        while True:
            await self._work.wait()
            await self._running.wait()
            for event in self.core.step():
                self._deliver(event)
            if not self.core.has_work:
                self._work.clear()
            await asyncio.sleep(self._step_seconds)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:
            if event.finish is not None:
                del self._streams[event.request_id]
            stream.put(event)
