"""Scheduler: who runs in the next step, how many tokens of each, in which blocks; and what a step's tokens mean.

    add -> WaitingQueue -> running: prompts (chunk by chunk) -> decodes (one token a step) -> ended
                 ^------------ preempted: blocks are short ------------'

One token budget a step. Decodes come first, then the prompts under way, then new requests. All three lists are in rank
order (priority, then arrival), so what is preempted always stands behind what already got its slice. The running request
of the best rank is never preempted while another one holds a block. It gets on in every step, or waits two at most for
blocks of one that is just ending.

With overlap, step N+1 is scheduled before step N is committed. A request's position then runs ahead of its tokens by
`num_uncommitted`, and a step's requests may have ended by the time that it is committed: their tokens are dropped there.

Never calls the runner; knows no clock but the one it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from engine.config import EngineConfig
from engine.errors import ContextTooLong, InternalError, InvalidRequest, Overloaded
from engine.kvcache.manager import KVCacheManager
from engine.plan import AdmittedRow, BlockCopy, GrownRow, StepPlan, StepResult
from engine.request import FinishReason, Request, Status, TokenEvent
from engine.scheduler.outcome import add_first, collect_prompt_logprobs, set_finish
from engine.scheduler.queue import WaitingQueue, rank
from engine.scheduler.running import RunningSet, row_of

MAX_BLOCKED = 16  # requests that do not fit which one step looks at, before it stops searching for one that does


@dataclass(slots=True)
class SchedulerCounts:
    """Counters since start. What is accepted is finished, aborted, running or waiting, at every moment."""

    num_accepted: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class _UncommittedStep(NamedTuple):
    step: int
    requests: list[Request]  # parallel to the plan's slices


class Scheduler:
    """`config` is resolved and `num_blocks` is what the runner has."""

    def __init__(self, config: EngineConfig, num_blocks: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if config.scheduler.max_step_tokens is None:
            raise InternalError("the scheduler needs a resolved config")
        self.cache = KVCacheManager(num_blocks, config.cache.block_size, prefix_caching=config.cache.prefix_caching)
        self.counts = SchedulerCounts()
        self.step = 0
        self._max_step_tokens = config.scheduler.max_step_tokens
        self._max_queue = config.scheduler.max_queue
        self._max_skips = config.scheduler.max_skips
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._queue = WaitingQueue()
        self._running = RunningSet(config.scheduler.max_num_seqs)
        self._in_flight: deque[_UncommittedStep] = deque()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Accept `request`, which from here on ends in exactly one terminal event, or raise."""
        if request.request_id in self._requests:
            raise InvalidRequest(f"request {request.request_id!r} is under way already", param="request_id")
        # The last token is never fed back, so it needs no place in the cache.
        needed = self.cache.blocks_for(request.end_len - 1)
        if needed > self.cache.num_blocks:
            raise ContextTooLong(
                f"prompt and max_tokens come to {request.end_len} tokens, more than this server's KV cache can hold "
                f"({self.cache.num_blocks * self.cache.block_size}): send a shorter prompt or a smaller max_tokens",
                param="max_tokens",
            )
        if len(self._queue) >= self._max_queue:
            raise Overloaded(f"{len(self._queue)} requests are waiting already: try again later")
        self._requests[request.request_id] = request
        self._queue.push(request)
        self.counts.num_accepted += 1

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request and return its terminal event; None where no such request is under way."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request)
        self.counts.num_aborted += 1
        return TokenEvent(request_id, [], FinishReason.ABORT)

    def schedule(self) -> StepPlan | None:
        """Plan the next step and count it as submitted; None where there is nothing to run before another commit."""
        plan = StepPlan(self.step + 1)
        requests: list[Request] = []
        roomy = self._plan_decodes(plan, requests)
        budget = self._max_step_tokens - len(requests)
        budget = self._plan_prompts(plan, requests, budget)
        # A step in which blocks were short lets nobody in: they would only take turns in throwing each other out.
        if roomy and budget and self._running.free_rows and self._queue:
            self._plan_admissions(plan, requests, budget)
        if not requests:
            return None
        for request in requests[plan.num_decodes :]:
            self.cache.publish(request)
        self.step = plan.step
        self._in_flight.append(_UncommittedStep(plan.step, requests))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Take in what the oldest uncommitted step sampled. Plans are committed in the order they were made."""
        step, requests = self._in_flight.popleft()
        if not step == plan.step == result.step:
            raise InternalError(f"step {step} is due, not the plan of {plan.step} with the result of {result.step}")
        if result.prompt_logprobs:
            collect_prompt_logprobs(plan, requests, result.prompt_logprobs)
        logprobs = result.logprobs
        events: list[TokenEvent] = []
        finished = Status.FINISHED
        for index, token in zip(plan.samples, result.tokens, strict=True):
            request = requests[index]
            if request.status is finished:
                continue
            tokens = request.tokens
            tokens.append(token)
            request.num_uncommitted -= 1
            length = len(tokens)
            event = TokenEvent(request.request_id, [token])
            events.append(event)
            if logprobs and index in logprobs:
                event.logprobs = [logprobs[index]]
            if length == request.num_prompt + 1:
                add_first(event, request)
            if (token in request.stop_ids or length >= request.end_len) and set_finish(event, request):
                self._end(request)
                self.counts.num_finished += 1
        self.counts.output_tokens += len(events)
        return events

    def check(self) -> None:
        """Lists, rows, blocks and counters agree with each other."""
        running = self._running.prompts + self._running.decodes
        waiting = list(self._queue)
        self._queue.check()
        self._running.check()
        self.cache.check(running)
        for status, group in ((Status.RUNNING, running), (Status.WAITING, waiting)):
            for request in group:
                if request.status is not status or self._requests.get(request.request_id) is not request:
                    raise InternalError(f"{request} is listed as {status.value}")
        for request in waiting:
            if request.blocks or request.num_computed or request.row is not None:
                raise InternalError(f"{request} is waiting and holds something")
        if len(running) + len(waiting) != len(self._requests):
            raise InternalError("a request is neither running nor waiting")
        counts = self.counts
        if counts.num_accepted != counts.num_finished + counts.num_aborted + len(self._requests):
            raise InternalError("requests accepted and ended do not add up")

    def _plan_decodes(self, plan: StepPlan, requests: list[Request]) -> bool:
        """One slice for each decoding request. False: blocks were short."""
        roomy = True
        block_size = self.cache.block_size
        rows, starts = plan.rows, plan.starts
        for request in self._running.decodes:  # loses from its end while we go, where somebody is preempted
            if len(request.tokens) + request.num_uncommitted >= request.end_len:
                continue  # its pending token is its last
            start = request.num_computed
            if start == len(request.blocks) * block_size:
                if not self.cache.num_free:
                    roomy = False
                    self._make_room(request)
                if not self._grow(plan, request):
                    continue
            rows.append(request.row)  # type: ignore[arg-type]  # running requests have a row
            starts.append(start)
            requests.append(request)
            request.num_computed = start + 1
            request.num_uncommitted += 1
        _longest_first(plan, requests)
        plan.num_decodes = len(requests)
        plan.nums = [1] * len(requests)
        plan.samples = list(range(len(requests)))
        return roomy

    def _make_room(self, request: Request) -> None:
        """Preempt from the worst rank on until a block is free, or until it was the turn of `request` itself.

        Nobody is thrown out while a running request's last token is under way: its blocks are free at the latest two
        steps on, and to wait for them costs less than to compute a whole request again.
        """
        while not self.cache.num_free:
            if any(other.num_tokens >= other.end_len for other in self._running.decodes):
                return
            victim = self._running.worst()
            self._preempt(victim)
            if victim is request:
                return

    def _grow(self, plan: StepPlan, request: Request) -> bool:
        """One more block, where `request` still runs and there is one."""
        block = self.cache.extend(request) if request.status is Status.RUNNING else None
        if block is None:
            return False
        plan.grown.append(GrownRow(row_of(request), len(request.blocks) - 1, [block]))
        return True

    def _plan_prompts(self, plan: StepPlan, requests: list[Request], budget: int) -> int:
        """Next chunk of each prompt under way; returns what is left of the budget."""
        for request in list(self._running.prompts):
            if budget == 0:
                break
            budget -= self._plan_chunk(plan, requests, request, budget)
        return budget

    def _plan_chunk(self, plan: StepPlan, requests: list[Request], request: Request, budget: int) -> int:
        """A slice of a request among the prompts, which moves on to the decodes where the slice reaches its last token."""
        start = request.num_computed
        num = min(len(request.tokens) - start, budget)
        if start + num == len(request.tokens):
            plan.samples.append(len(requests))
            request.num_uncommitted += 1
            self._running.promote(request)
        plan.rows.append(row_of(request))
        plan.starts.append(start)
        plan.nums.append(num)
        requests.append(request)
        request.num_computed = start + num
        return num

    def _plan_admissions(self, plan: StepPlan, requests: list[Request], budget: int) -> None:
        """Let waiting requests in, best rank first. One that does not fit is passed at most `max_skips` times."""
        blocked: list[Request] = []
        for request in list(self._queue):
            if not budget or not self._running.free_rows or len(blocked) == MAX_BLOCKED:
                break
            if request.num_uncommitted or self._must_wait(request, requests[plan.num_decodes :]):
                continue
            copies = self._reserve(request)
            if copies is None:
                blocked.append(request)
            else:
                plan.copies += copies
                plan.admitted.append(self._admit(request))
                budget -= self._plan_chunk(plan, requests, request, budget)
                for other in blocked:
                    other.skips += 1
            if any(other.skips >= self._max_skips for other in blocked):
                break

    def _must_wait(self, request: Request, in_step: list[Request]) -> bool:
        """Whether `request` can soon fork a sibling whose prompt is not computed by an earlier step yet."""
        leader = self._leader(request)
        if leader is None:
            return False
        if leader.status is Status.WAITING:
            return rank(leader) < rank(request)
        return leader.num_computed < leader.num_prompt or any(other is leader for other in in_step)

    def _leader(self, request: Request) -> Request | None:
        """The sibling to fork, where there is one and forking gives all that was asked for."""
        leader = self._requests.get(request.fork_of) if request.fork_of is not None else None
        if leader is None or leader is request or request.num_outputs or request.params.prompt_logprobs is not None:
            return None
        return leader if leader.num_prompt == request.num_prompt and leader.salt == request.salt else None

    def _reserve(self, request: Request) -> list[BlockCopy] | None:
        """Blocks for all the tokens that `request` has; None where it does not fit."""
        # Those who run will grow: a little stays free for them, so that letting one in does not throw another one out.
        spare = self.cache.num_blocks // 100 if self.num_running else 0
        leader = self._leader(request)
        if leader is not None and leader.status is Status.RUNNING and leader.tokens[: leader.num_prompt] == request.tokens:
            return self.cache.fork(request, leader, spare=spare)
        match = request.params.prompt_logprobs is None or request.num_outputs > 0
        return [] if self.cache.admit(request, spare=spare, match=match) else None

    def _admit(self, request: Request) -> AdmittedRow:
        """Move `request`, which has its blocks, from the queue to the prompts under way."""
        self._queue.remove(request)
        row = self._running.add(request)
        request.skips = 0
        if request.scheduled_at is None:
            request.scheduled_at = self._clock()
            request.num_cached = min(request.num_computed, request.num_prompt)
            self.counts.prompt_tokens += request.num_prompt
            self.counts.cached_tokens += request.num_cached
        return AdmittedRow(row, request.tokens[:], request.num_prompt, request.blocks.copy(), request.params, request.seed)

    def _preempt(self, request: Request) -> None:
        """Back to the queue. Its tokens stay, also the one still pending; their KV is computed again."""
        self._running.remove(request)
        self.cache.release(request)
        request.status = Status.WAITING
        self._queue.push(request)
        self.counts.num_preemptions += 1

    def _end(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
        else:
            self._queue.remove(request)
        self.cache.release(request)
        request.status = Status.FINISHED
        del self._requests[request.request_id]


def _longest_first(plan: StepPlan, requests: list[Request]) -> None:
    """Put a plan of decodes in the order of their contexts. Attention begins with those that come first, and while one that
    takes long and came last is at work, most of the device is idle.
    """
    order = sorted(range(len(requests)), key=plan.starts.__getitem__, reverse=True)
    plan.rows = [plan.rows[i] for i in order]
    plan.starts = [plan.starts[i] for i in order]
    requests[:] = [requests[i] for i in order]
