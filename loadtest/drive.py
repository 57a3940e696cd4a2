"""Sends the requests of a load from one event loop, and records each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from loadtest.clients.base import Call, Client
from loadtest.plan import WARM_UP, Order, Plan, Session
from loadtest.prompts import Conversation, Prompt, Prompts
from loadtest.record import Failure, Reading, Record, read_into
from loadtest.spec import Load, Target

_LAG_PERIOD = 0.02


class Share(NamedTuple):
    """The part of a load that one process sends: every `of`-th request or client, from `number` on."""

    number: int
    of: int


class Driver:
    def __init__(self, load: Load, target: Target, client: Client, share: Share) -> None:
        self.load, self.share = load, share
        self.plan = Plan(load)
        self._prompts = Prompts(self.plan, target)
        self._client = client
        self._times = self.plan.times() if load.steps or load.trace else []
        self._zero = 0.0
        self._stopped = asyncio.Event()
        self.records: list[Record] = []  # of ended requests; the process takes them out as it reports them
        self.lags: list[float] = []  # seconds by which the event loop ran late, sampled
        self.running = self.sent = 0

    async def run(self, zero: float) -> None:
        """Send everything. `zero` is the start of the measured window on the clock of `time.perf_counter`."""
        self._zero = zero
        sampler = asyncio.create_task(self._sample_lag())
        senders = {"open": self._open, "trace": self._open, "closed": self._closed, "sessions": self._sessions}
        sending = asyncio.create_task(senders[self.load.kind]())
        stopping = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sampler, stopping, sending):
            task.cancel()
        ended = await asyncio.gather(sending, sampler, stopping, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def stop(self) -> None:
        """End the load now. Requests that are under way are recorded as unfinished."""
        self._stopped.set()

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    async def _until(self, at: float) -> None:
        """Wait until the time `at`, and let other tasks run even if it has passed."""
        await asyncio.sleep(max(0.0, at - self._now()))
        while self._now() < at:  # noqa: ASYNC110 - uvloop rounds to milliseconds, and may end half a millisecond early
            await asyncio.sleep(0)

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.share.number, len(self._times), self.share.of):
                order = self.plan.timed(number, self._times[number])  # it is made while the loop waits for its time
                prompt = self._prompts.of(order)
                await self._until(order.at)
                group.create_task(self._order(order, prompt))

    async def _closed(self) -> None:
        await self._side_by_side(self.load.concurrency, self._client_loop)

    async def _sessions(self) -> None:
        assert self.load.sessions is not None
        await self._side_by_side(self.load.sessions.num, self._agent)

    async def _side_by_side(self, total: int, work: Callable[[int], Awaitable[None]]) -> None:
        await self._until(-self.load.warm_up)
        async with asyncio.TaskGroup() as group:
            for number in range(self.share.number, total, self.share.of):
                group.create_task(_run(work(number)))

    def _indices(self, first: int, stride: int) -> Iterable[int]:
        """Yield the numbers of the requests or sessions of one client, while there is time for a new one."""
        index = first
        while self._now() < self.load.seconds and (self.load.requests is None or index < self.load.requests):
            yield index
            index += stride

    async def _client_loop(self, number: int) -> None:
        for index in self._indices(number, self.load.concurrency):
            at = self._now()
            order = self.plan.order(index, at, self._step(at))
            await self._order(order, self._prompts.of(order))

    async def _agent(self, number: int) -> None:
        assert self.load.sessions is not None
        for index in self._indices(number, self.load.sessions.num):
            session = self.plan.session(index)
            await self._session(session, self._prompts.conversation(session.key))

    async def _session(self, session: Session, conversation: Conversation, first: int = 0) -> None:
        """Run the turns of a session, and its forks beside them. A turn that fails ends the session."""
        async with asyncio.TaskGroup() as group:
            for number, turn in enumerate(session.turns, first):
                due = self._now() + turn.think_s
                if due >= self.load.seconds:
                    return
                await self._until(due)
                if turn.fork is not None:
                    group.create_task(self._session(turn.fork, conversation.fork(turn.fork.key), number))
                call = Call(conversation.ask(turn.new_tokens), turn.output_tokens, self.load.slo_class)
                planned = turn.new_tokens if call.prompt.ids is None else len(call.prompt.ids)
                record = self._record(session.key, due, self._step(due), planned, call)
                record.session, record.turn = session.key, number
                reading = Reading(keep=True)
                await self._perform(record, call, reading, None)
                if record.outcome != "ok":
                    return
                conversation.answered(reading)

    def _step(self, at: float) -> int:
        return WARM_UP if at < 0 else 0

    async def _order(self, order: Order, prompt: Prompt) -> None:
        call = Call(prompt, order.output_tokens, order.slo_class, order.slow)
        record = self._record(order.number, order.at, order.step, self.load.prefix + order.prompt_tokens, call)
        await self._perform(record, call, Reading(), order.cancel_after)

    def _record(self, index: int, at: float, step: int, prompt_tokens: int, call: Call) -> Record:
        return Record(
            index=index,
            step=step,
            slo_class=call.slo_class,
            slow=call.slow,
            at=at,
            sent=0.0,
            e2e=0.0,
            max_tokens=call.max_tokens,
            prompt_tokens=prompt_tokens,
        )

    async def _perform(self, record: Record, call: Call, reading: Reading, cancel_after: float | None) -> None:
        """Send the request and wait for its end, whatever that is. Each request adds exactly one record."""
        self.running += 1
        self.sent += 1
        began = time.perf_counter()
        record.sent = began - self._zero
        limit = self.load.timeout if cancel_after is None else min(cancel_after, self.load.timeout)
        try:
            async with asyncio.timeout(limit):
                await self._client.stream(call, reading)
        except TimeoutError:
            cancelled = limit == cancel_after
            record.outcome, record.status = ("cancelled", "cancelled") if cancelled else ("failed", "timeout")
        except Failure as failure:
            record.outcome = "refused" if failure.refused and not reading.events else "failed"
            record.status, record.detail, record.retry_after = failure.status, failure.detail, failure.retry_after
        except asyncio.CancelledError:
            record.outcome = record.status = "unfinished"
            raise
        finally:
            record.e2e = time.perf_counter() - began
            self._finish(record, reading, began)

    def _finish(self, record: Record, reading: Reading, began: float) -> None:
        self.running -= 1
        read_into(record, reading, began)
        if record.outcome == "ok":
            if reading.events:
                record.e2e = reading.events[-1] - began
            else:
                record.outcome, record.status = "failed", "no token"
        self.records.append(record)

    async def _sample_lag(self) -> None:
        while True:
            due = time.perf_counter() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            if self._now() >= 0:  # the warm-up begins with everything at once
                self.lags.append(max(0.0, time.perf_counter() - due))


async def _run(work: Awaitable[None]) -> None:
    await work
