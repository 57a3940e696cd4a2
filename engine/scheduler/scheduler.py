"""Scheduler: decides which requests run in the next step, how many tokens of each and in which blocks, and applies results.

    add -> WaitingQueue -> running: prompts (chunk by chunk) -> decodes (one token a step) -> ended
                 ^------------ preempted when blocks are short

A step has one token budget. Decodes are planned first, then prompts that have started, then new admissions. All three lists
are in rank order (priority, then arrival), and preemption takes the worst rank first. The running request of the best rank
is never preempted while another request holds a block. It advances in every step, except that it may wait for at most two
steps for the blocks of a request that is ending.

With overlap, step N+1 is scheduled before step N is committed. A request's position then runs ahead of its known tokens by
`num_uncommitted`. A request of a step may have ended before that step is committed; its token is then dropped.

The scheduler never calls the runner, and it reads the time only from the clock it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

from engine.config import EngineConfig
from engine.errors import ContextTooLong, InternalError, InvalidRequest, Overloaded
from engine.kvcache.manager import KVCacheManager
from engine.plan import NO_CHOICE, AdmittedRow, GrownRow, StepPlan, StepResult
from engine.request import FinishReason, Request, Status, TokenEvent
from engine.scheduler.admission import Admission
from engine.scheduler.counts import SchedulerCounts
from engine.scheduler.outcome import add_first, collect_prompt_logprobs, failure_event, no_choice_event, set_finish
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.running import RunningSet, row_of


class _UncommittedStep(NamedTuple):
    """Describes a step that was scheduled, and whose result is not applied to the requests yet."""

    step: int
    requests: list[Request]  # parallel to the plan's slices


class Scheduler:
    """Plans the steps of one engine. `config` must be resolved. `num_blocks` is the size of the runner's KV cache."""

    def __init__(self, config: EngineConfig, num_blocks: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if config.scheduler.max_step_tokens is None:
            raise InternalError("the scheduler needs a resolved config")
        self.cache = KVCacheManager(num_blocks, config.cache.block_size, prefix_caching=config.cache.prefix_caching)
        self.counts = SchedulerCounts()
        self.step = 0
        self._max_step_tokens = config.scheduler.max_step_tokens
        self._max_queue = config.scheduler.max_queue
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._queue = WaitingQueue()
        self._running = RunningSet(config.scheduler.max_num_seqs)
        self._admission = Admission(self.cache, self._queue, self._running, self._requests, config.scheduler.max_skips)
        self._uncommitted: deque[_UncommittedStep] = deque()

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
        """Accept `request`, which then ends in exactly one terminal event.

        Raises InvalidRequest, ContextTooLong or Overloaded if the request is refused.
        """
        if request.request_id in self._requests:
            raise InvalidRequest(f"request {request.request_id!r} is already running or waiting", param="request_id")
        # The last token is never fed back to the model, so it needs no slot in the cache.
        needed = self.cache.blocks_for(request.end_len - 1)
        if needed > self.cache.num_blocks:
            capacity = self.cache.num_blocks * self.cache.block_size
            raise ContextTooLong(
                f"This model's maximum context length is {capacity} tokens, which this server's KV cache can hold. However, you "
                f"requested {request.end_len} tokens: send a shorter prompt or a smaller max_tokens.",
                param="max_tokens",
            )
        if len(self._queue) >= self._max_queue:
            raise Overloaded(f"{len(self._queue)} requests are already waiting: try again later")
        self._requests[request.request_id] = request
        self._queue.push(request)
        self.counts.num_accepted += 1

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request and return its terminal event. Returns None if no such request is running or waiting."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request)
        self.counts.num_aborted += 1
        return TokenEvent(request_id, [], FinishReason.ABORT)

    def schedule(self) -> StepPlan | None:
        """Plan the next step, which the caller must submit to the runner.

        Returns None if no request can run until the result of an earlier step is applied.
        """
        plan = StepPlan(self.step + 1)
        requests: list[Request] = []
        enough_blocks = self._plan_decodes(plan, requests)
        budget = self._max_step_tokens - len(requests)
        budget = self._plan_prompts(plan, requests, budget)
        # If decodes were short of KV blocks, the step admits no request: requests would only preempt each other in turn.
        if enough_blocks and budget and self._running.free_rows and len(self._queue):
            self._plan_admissions(plan, requests, budget)
        if not requests:
            return None
        for request in requests[plan.num_decodes :]:
            self.cache.publish(request)
        self.step = plan.step
        self._uncommitted.append(_UncommittedStep(plan.step, requests))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Apply the result of the oldest step whose result is not applied yet. Returns the events of that step.

        Results are applied in the order in which the plans were made.
        """
        step, requests = self._uncommitted.popleft()
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
            if token in request.stop_ids or length >= request.end_len:
                if token < 0:
                    events[-1] = self._fail(request, step, token)
                elif set_finish(event, request):
                    self._end(request)
                    self.counts.num_finished += 1
                    self.counts.output_tokens += len(event.tokens) - 1
        self.counts.output_tokens += len(events)
        return events

    def check(self) -> None:
        """Raise InternalError if the queue, the running set, the batch rows, the KV blocks and the counters disagree."""
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
                raise InternalError(f"{request} is waiting, but holds blocks or a row")
        if len(running) + len(waiting) != len(self._requests):
            raise InternalError("a request is neither running nor waiting")
        self.counts.check(len(self._requests))

    def _plan_decodes(self, plan: StepPlan, requests: list[Request]) -> bool:
        """Add to `plan` one slice for each decoding request. Returns False if there were too few free KV blocks."""
        enough_blocks = True
        block_size = self.cache.block_size
        rows, starts = plan.rows, plan.starts
        for request in self._running.decodes:  # a preemption shortens this list from its end during the loop
            if len(request.tokens) + request.num_uncommitted >= request.end_len:
                continue  # the request's last token is already submitted
            start = request.num_computed
            if start == len(request.blocks) * block_size:
                if not self.cache.num_free:
                    enough_blocks = False
                    self._free_a_block(request)
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
        return enough_blocks

    def _free_a_block(self, request: Request) -> None:
        """Preempt requests, worst rank first, until a block is free or `request` itself was preempted.

        No request is preempted while the last token of a running request is uncommitted. That request's blocks become free
        within two steps, and waiting for them costs less than computing a whole request again.
        """
        while not self.cache.num_free:
            if any(other.num_tokens >= other.end_len for other in self._running.decodes):
                return
            victim = self._running.worst()
            self._preempt(victim)
            if victim is request:
                return

    def _grow(self, plan: StepPlan, request: Request) -> bool:
        """Give `request` one more KV block. Returns False if no block is free, or if `request` was preempted to free blocks."""
        block = self.cache.extend(request) if request.status is Status.RUNNING else None
        if block is None:
            return False
        plan.grown.append(GrownRow(row_of(request), len(request.blocks) - 1, [block]))
        return True

    def _plan_prompts(self, plan: StepPlan, requests: list[Request], budget: int) -> int:
        """Add to `plan` the next chunk of each prompt that has started. Returns the rest of the budget, in tokens."""
        for request in list(self._running.prompts):
            if budget == 0:
                break
            budget -= self._plan_chunk(plan, requests, request, budget)
        return budget

    def _plan_chunk(self, plan: StepPlan, requests: list[Request], request: Request, budget: int) -> int:
        """Add to `plan` a slice of a request's prompt, at most `budget` tokens long. Returns the slice's number of tokens.

        The request becomes a decode if the slice reaches its last token.
        """
        start = request.num_computed
        num = min(len(request.tokens) - start, budget)
        if start + num == len(request.tokens):
            plan.samples.append(len(requests))
            request.num_uncommitted += 1
            self._running.start_decoding(request)
        plan.rows.append(row_of(request))
        plan.starts.append(start)
        plan.nums.append(num)
        requests.append(request)
        request.num_computed = start + num
        return num

    def _plan_admissions(self, plan: StepPlan, requests: list[Request], budget: int) -> None:
        """Admit waiting requests while there are free batch rows and budget, and add the first chunk of each to `plan`."""
        for request, copies in self._admission.admissible(requests[plan.num_decodes :]):
            plan.copies += copies
            plan.admitted.append(self._admit(request))
            budget -= self._plan_chunk(plan, requests, request, budget)
            if not budget or not self._running.free_rows:
                break

    def _admit(self, request: Request) -> AdmittedRow:
        """Move `request`, which already has its blocks, from the queue to the running prompts."""
        self._queue.remove(request)
        row = self._running.add(request)
        request.skips = request.stalled = request.awaited = 0
        if request.scheduled_at is None:
            request.scheduled_at = self._clock()
            request.num_cached = min(request.num_computed, request.num_prompt)
            self.counts.prompt_tokens += request.num_prompt
            self.counts.cached_tokens += request.num_cached
        return AdmittedRow(row, request.tokens[:], request.num_prompt, request.blocks.copy(), request.params, request.seed)

    def _preempt(self, request: Request) -> None:
        """Move a running request back to the queue and release its blocks.

        The request keeps its tokens, and a token that is not committed yet is still added. Their KV is computed again.
        """
        self._running.remove(request)
        self.cache.release(request)
        request.status = Status.WAITING
        self._queue.push(request)
        self.counts.num_preemptions += 1

    def _fail(self, request: Request, step: int, token: int) -> TokenEvent:
        """End a request whose newest token is NO_TOKEN or NO_CHOICE, and return its last event.

        After NO_TOKEN the request's blocks may hold NaN, so they are removed from the prefix cache.
        """
        request.tokens.pop()
        self.counts.output_tokens -= 1  # `commit` counts one token per event
        self.counts.num_failed += 1
        if token == NO_CHOICE:
            event = no_choice_event(request)
        else:
            event = failure_event(request, step)
            self.cache.withdraw(request)
        self._end(request)
        return event

    def _end(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
        else:
            self._queue.remove(request)
        self.cache.release(request)
        request.status = Status.FINISHED
        del self._requests[request.request_id]


def _longest_first(plan: StepPlan, requests: list[Request]) -> None:
    """Sort the decodes of a plan by context length, longest first.

    The attention kernel starts with the first rows. A long row that started last would leave most of the device idle at the end.
    """
    if len(requests) < 2:
        return
    in_order = itemgetter(*sorted(range(len(requests)), key=plan.starts.__getitem__, reverse=True))
    plan.rows = list(in_order(plan.rows))
    plan.starts = list(in_order(plan.starts))
    requests[:] = in_order(requests)
