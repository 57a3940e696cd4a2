"""Scheduler: decides which requests run in the next step, how many tokens of each and in which blocks, and applies results.

    add -> WaitingQueue -> running: prompts (chunk by chunk) -> decodes (one token a step) -> ended
                 ^------------ preempted: blocks are short, or a higher class needs the row

A step has limits (`limits.py`). Decodes are planned first, then prompts that have started, then new admissions, except that
those of higher classes go before prompts of lower ones. The policy orders the waiting requests. Prompts run in rank order, and
preemption takes the worst rank first. Victims are chosen before any slice is made. The running request of the best rank is never
preempted while another request holds a block, and it advances in every step. There are two exceptions: it may wait for at most
two steps for the blocks of a request that is ending, and while requests of higher classes start, which then have better ranks.

A request that spills has steps of its own (`spill_steps.py`), in turn with those of the others.

With overlap, step N+1 is scheduled before step N is committed. A request's position then runs ahead of its known tokens by
`num_uncommitted`. A request of a step may have ended before that step is committed; its token is then dropped.

The scheduler never calls the runner, and it reads the time only from the clock it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from engine.config import EngineConfig
from engine.errors import InternalError, InvalidRequest, TidegateError
from engine.kvcache.disk_tier import DiskTier
from engine.kvcache.identity import BlockIdentity, identity_of
from engine.kvcache.manager import KVCacheManager
from engine.plan import NO_CHOICE, AdmittedRow, Arrival, KVFormat, StepPlan, StepResult
from engine.request import CachedTokens, FinishReason, Request, Status, TokenEvent
from engine.scheduler.admission import Admission
from engine.scheduler.counts import SchedulerCounts
from engine.scheduler.decodes import DecodePlanner
from engine.scheduler.draft import Draft
from engine.scheduler.forecast import Forecast
from engine.scheduler.intake import Intake
from engine.scheduler.limits import Load, StepLimits
from engine.scheduler.outcome import add_first, collect_prompt_logprobs, failure_event, no_choice_event, set_finish
from engine.scheduler.policy import FairPolicy, Policy
from engine.scheduler.prompts import PromptPlanner
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.running import RunningSet
from engine.scheduler.spill_steps import SpillSteps
from engine.scheduler.step_cost import StepCost


class _UncommittedStep(NamedTuple):
    """Describes a step that was scheduled, and whose result is not applied to the requests yet."""

    step: int
    requests: list[Request]  # parallel to the plan's slices


class Scheduler:
    """Plans the steps of one engine. `num_blocks` is the size of the runner's KV cache, and `kv` the format of its blocks.
    The runner has `host_slots` slots for blocks in host memory, below which there may be a `disk`. `identity` computes the
    digests of blocks, by default with a random key. `policy` is by default a FairPolicy.

    While `cost` is trusted, requests whose first token would come too late are refused. By default nothing is known of it.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        *,
        policy: Policy | None = None,
        cost: StepCost | None = None,
        clock: Callable[[], float] = time.monotonic,
        kv: KVFormat | None = None,
        host_slots: int = 0,
        disk: DiskTier | None = None,
        identity: BlockIdentity | None = None,
    ) -> None:
        size, cached = config.cache.block_size, config.cache.prefix_caching
        kv = kv or KVFormat()
        self.cache = KVCacheManager(
            num_blocks,
            size,
            prefix_caching=cached,
            identity=identity or identity_of(kv, size),
            host_slots=host_slots,
            disk=disk,
            kinds=kv.kinds,
            compute=self._compute_seconds,
            clock=clock,
            resident_tokens=config.cache.resident_tokens,
        )
        self.counts = SchedulerCounts()
        self.step = 0
        self._policy = policy or FairPolicy()
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._queue = WaitingQueue()
        self._running = RunningSet(config.scheduler.max_num_seqs)
        rows, tokens = config.scheduler.max_num_seqs, config.scheduler.max_step_tokens or config.scheduler.max_num_seqs
        self.forecast = Forecast(cost or StepCost.of_size(rows, tokens), self._queue, self._running, tokens)
        self.limits = StepLimits(tokens, rows, tokens)  # of the latest step; predictions for new requests go by them
        max_skips = config.scheduler.max_skips
        admission = Admission(self.cache, self._queue, self._running, self._requests, self._policy, max_skips)
        self._intake = Intake(self.cache, self._queue, config, self.forecast, admission.leader)
        self._decodes = DecodePlanner(self.cache, self._running, self._policy, self._preempt)
        self._prompts = PromptPlanner(self._running, admission, self._admit)
        self._spill_steps = SpillSteps(self.cache, self._running, admission, self._admit, tokens)
        self._uncommitted: deque[_UncommittedStep] = deque()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def has_prompts(self) -> bool:
        """Whether prompts wait or are partly computed. If not, the next step can only decode."""
        return len(self._queue) > 0 or bool(self._running.prompts) or self._running.num_spilled_left > 0

    @property
    def _spills(self) -> bool:
        """Whether a request spills, or waits to."""
        return self._running.spilled is not None or self._queue.num_spilling > 0

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request, *, resumed: bool = False) -> None:
        """Accept `request`, which then ends in exactly one terminal event. A `resumed` request is never refused for its latency.

        Raises InvalidRequest, ContextTooLong, Overloaded or RequestTimeout if the request is refused.
        """
        if request.request_id in self._requests:
            raise InvalidRequest(f"request {request.request_id!r} is already running or waiting", param="request_id")
        self._intake.check_size(request, self.limits)
        request.sequence = self.counts.num_accepted + 1
        self._policy.arrived(request)
        if not resumed:
            try:
                self._intake.check_latency(request, self.limits)
            except TidegateError:
                self.cache.release(request)
                self._policy.ended(request)
                raise
        self._requests[request.request_id] = request
        self.counts.num_accepted += 1
        self._queue.push(request)

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request and return its terminal event. Returns None if no such request is running or waiting."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request)
        self.counts.num_aborted += 1
        return TokenEvent(request_id, [], FinishReason.ABORT)

    def schedule(self, limits: StepLimits) -> StepPlan | None:
        """Plan the next step within `limits`. The caller must submit the plan to the runner.

        Returns None if no request can run until the result of an earlier step is applied.
        """
        self.limits = limits
        if self._spills and not self._spill_steps.was_last:
            plan = self._plan_spill_step(limits)
            if plan is not None:
                return plan
        self._spill_steps.was_last = False
        return self._plan_step(limits) or self._plan_spill_step(limits)

    def _plan_step(self, limits: StepLimits) -> StepPlan | None:
        """Plan a step of all requests but those that spill. Returns None if none of them can run."""
        if len(self._queue) and self._running.worst_level > self._queue.best_class:
            self._give_up_places(limits)
        draft = Draft(self.step + 1, limits.tokens, align=self.cache.align)
        plan, requests = draft.plan, draft.requests
        # If decodes were short of KV blocks, the step admits no request: requests would only preempt each other in turn. If the
        # last of them has outgrown the cache, none runs any more.
        may_start = (self._decodes.plan(draft) or not len(self._running)) and len(self._queue) > 0
        may_admit = may_start and self._running.num_places(limits.seqs) > 0
        if may_start and self.cache.has_tiers:
            self._prompts.load_ahead(self._clock())
        if may_admit or self._running.prompts:
            self._prompts.plan(draft, limits, self._clock(), may_admit=may_admit)
        if self.cache.has_copies:
            plan.copies = self.cache.take_copies()
        elif not requests:
            return None
        for request in requests[plan.num_decodes :]:
            self.cache.publish(request)
        return self._planned(plan, requests)

    def _plan_spill_step(self, limits: StepLimits) -> StepPlan | None:
        """Plan a step of the request that spills, or of moves that it waits for. Returns None if there is neither."""
        planned = self._spill_steps.plan(self.step + 1, limits, self._clock()) if self._spills else None
        if planned is None and not self.cache.has_copies:
            return None
        plan, requests = planned or (StepPlan(self.step + 1), [])
        plan.copies = self.cache.take_copies()
        return self._planned(plan, requests)

    def _planned(self, plan: StepPlan, requests: list[Request]) -> StepPlan:
        """Note that `plan` is submitted now. `requests` are parallel to its slices."""
        self.step = plan.step
        self._uncommitted.append(_UncommittedStep(plan.step, requests))
        return plan

    def load(self) -> Load:
        """Describe the work at hand, for the limits of the next step."""
        running = self._running
        prompts = running.prompts
        return Load(
            decodes=len(running.decodes),
            kv_tokens=sum(request.num_computed for request in running.decodes),
            running=len(running),
            waiting=len(self._queue),
            prompt_tokens=sum(len(r.tokens) - r.num_computed for r in prompts)
            + running.num_spilled_left
            + self._queue.num_tokens,
            context=prompts[0].num_computed if prompts else 0,
            itl=running.itl,
        )

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Apply the result of the oldest step whose result is not applied yet. Returns the events of that step.

        Results are applied in the order in which the plans were made.
        """
        step, requests = self._uncommitted.popleft()
        if not step == plan.step == result.step:
            raise InternalError(f"step {step} is due, not the plan of {plan.step} with the result of {result.step}")
        if result.prompt_logprobs:
            collect_prompt_logprobs(plan, requests, result.prompt_logprobs)
        if requests and plan.spilled is None:
            self.forecast.stepped(result.device_seconds)
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
                self.forecast.began(request, self._clock())
            if token in request.stop_ids or length >= request.end_len:
                if token < 0:
                    events[-1] = self._fail(request, step, token)
                elif set_finish(event, request):
                    self._end(request, finished=True)
                    self.counts.num_finished += 1
                    self.forecast.ended(request)
                    self.counts.output_tokens += len(event.tokens) - 1
        self.counts.output_tokens += len(events)
        return events

    def arrived(self, arrivals: list[Arrival]) -> None:
        """Note the ends of moves between tiers. Requests whose prefix is loaded may then start."""
        for request in self.cache.arrived(arrivals):
            request.status = Status.WAITING

    def tend(self, seconds: float = 0.0) -> None:
        """Take over what the disk tier has done, and give it work. If it has done nothing, wait up to `seconds` for it."""
        for request in self.cache.tend(seconds):
            request.status = Status.WAITING

    def check(self) -> None:
        """Raise InternalError if the queue, the running set, the batch rows, the KV blocks and the counters disagree."""
        running, spilled = self._running.prompts + self._running.decodes, self._running.spilled
        waiting = list(self._queue)
        self._queue.check()
        self._running.check()
        self.cache.check(running)
        if spilled is not self.cache.tiers.spill.owner or any(request.spills for request in running):
            raise InternalError("a request that spills has no window, or runs beside the others")
        running += [] if spilled is None else [spilled]
        for statuses, group in (((Status.RUNNING,), running), ((Status.WAITING, Status.LOADING), waiting)):
            for request in group:
                if request.status not in statuses or self._requests.get(request.request_id) is not request:
                    raise InternalError(f"{request} is in a list of requests of another status")
        for request in waiting:
            if request.blocks or request.num_computed or request.row is not None:
                raise InternalError(f"{request} is waiting, but has a block table or a row")
            if (request.status is Status.LOADING) != self.cache.is_loading(request):
                raise InternalError(f"{request} waits for moves that are not under way, or does not wait for some that are")
        if len(running) + len(waiting) != len(self._requests):
            raise InternalError("a request is neither running nor waiting")
        self.counts.check(len(self._requests))

    def _compute_seconds(self, first: int, end: int) -> float | None:
        """Predict how long the tokens of a prompt from position `first` to `end` take to compute. None: it is not known."""
        return self.forecast.part_seconds(first, end, self.limits)

    def _give_up_places(self, limits: StepLimits) -> None:
        """Preempt requests of lower classes for waiting requests of higher classes that lack a row or blocks.

        It makes room for no more requests than one step can begin.
        """
        tokens, taken, blocks_taken = limits.tokens, 0, self.cache.num_blocks // 100  # Admission keeps these blocks free
        for request in self._policy.order(self._queue.lanes, self._clock()):
            if tokens <= 0:
                return
            if request.num_uncommitted or request.status is Status.LOADING or request.spills:
                continue
            tokens, taken = tokens - len(request.tokens), taken + 1
            blocks_taken += self.cache.num_needed(request)
            if not self._preempt_lower(request.slo.rank, limits.seqs, places=taken, blocks=blocks_taken):
                return

    def _preempt_lower(self, slo: int, seqs: int, *, places: int, blocks: int) -> bool:
        """Preempt running requests of levels below class `slo` until there are so many places and free blocks.

        Waiting requests of lower classes give back what they hold before. Returns False, and nobody gives up anything, if that
        cannot be reached.
        """
        missing, missing_blocks = places - self._running.num_places(seqs), blocks - self.cache.num_free
        if missing <= 0 and missing_blocks <= 0:
            return True
        holders = [holder for holder in self.cache.holders() if holder.slo.rank > slo]
        lower = [request for request in self._running if request.rank[0] > slo]
        if missing > len(lower) or (missing_blocks > 0 and missing_blocks > self.cache.num_freed_by([*lower, *holders])):
            return False
        for holder in holders:
            if self.cache.num_free < blocks:
                self.cache.give_back(holder)
        while lower and (self._running.num_places(seqs) < places or self.cache.num_free < blocks):
            victim = self._policy.victim(lower)
            lower.remove(victim)
            self._preempt(victim)
        return True

    def _admit(self, plan: StepPlan, request: Request) -> None:
        """Move `request`, which already has its blocks, from the queue to the running prompts."""
        now = self._clock()
        self._queue.remove(request)
        request.skips = request.stalled = request.awaited = 0
        if request.scheduled_at is None:
            request.scheduled_at = now
            num = min(request.num_computed, request.num_prompt)
            request.cached = CachedTokens.split(num, request.num_computed, request.num_loaded, request.num_from_disk)
            self.counts.admitted(request.num_prompt, request.cached)
        self._policy.admitted(request, now)
        row = self._running.add(request)
        blocks = request.blocks.copy()
        plan.admitted.append(AdmittedRow(row, request.tokens[:], request.num_prompt, blocks, request.params, request.seed))

    def _preempt(self, request: Request) -> None:
        """Move a running request back to the queue and release its blocks. If it has outgrown the cache, it spills from now on.

        The request keeps its tokens, and a token that is not committed yet is still added. Their KV is computed again.
        """
        self._running.remove(request)
        self.cache.release(request)
        request.status = Status.WAITING
        request.spills = self.cache.outgrows(request)
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

    def _end(self, request: Request, *, finished: bool = False) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
        else:
            self._queue.remove(request)
        self.cache.release(request, finished=finished)
        self._policy.ended(request)
        request.status = Status.FINISHED
        del self._requests[request.request_id]
