"""DecodePlanner: adds the slices of decoding requests to a step, and finds the KV blocks that they need."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from engine.kvcache.manager import KVCacheManager
from engine.plan import GrownRow, StepPlan
from engine.request import Request
from engine.scheduler.draft import Draft
from engine.scheduler.policy import Policy
from engine.scheduler.running import RunningSet, row_of


class DecodePlanner:
    """`preempt` moves a running request back to the queue, which frees its blocks."""

    def __init__(self, cache: KVCacheManager, running: RunningSet, policy: Policy, preempt: Callable[[Request], None]) -> None:
        self._cache = cache
        self._running = running
        self._policy = policy
        self._preempt = preempt

    def plan(self, draft: Draft) -> bool:
        """Add one slice for each decoding request. Returns False if there were too few free KV blocks."""
        plan, requests = draft.plan, draft.requests
        # Each decode needs at most one block, so the blocks need not be counted while there is one for each.
        enough_blocks = self._cache.num_free >= len(self._running.decodes) or self._grow_best_first(plan)
        block_size = self._cache.block_size
        rows, starts = plan.rows, plan.starts
        for request in self._running.decodes:
            if len(request.tokens) + request.num_uncommitted >= request.end_len:
                continue  # the request's last token is already submitted
            start = request.num_computed
            if start == len(request.blocks) * block_size and not self._grow(plan, request):
                continue
            rows.append(request.row)  # type: ignore[arg-type]  # running requests have a row
            starts.append(start)
            requests.append(request)
            request.num_computed = start + 1
            request.num_uncommitted += 1
        draft.end_decodes()
        return enough_blocks

    def _grow_best_first(self, plan: StepPlan) -> bool:
        """Give one KV block to each decode that needs one, the best rank first. Returns False if there are too few.

        Waiting requests then give back the blocks that they hold. If that is not enough, requests are preempted, the worst rank
        first, until the rest have one each. No request is preempted while the last token of a running request is uncommitted.
        That request's blocks become free within two steps, and waiting for them costs less than computing a whole request again.
        """
        size = self._cache.block_size
        growing = [r for r in self._running.decodes if r.num_computed == len(r.blocks) * size and r.num_tokens < r.end_len]
        growing.sort(key=attrgetter("rank"))
        if len(growing) <= self._cache.num_free:
            return True
        while len(growing) > self._cache.num_free and (holders := self._cache.holders()):
            self._cache.give_back(self._policy.victim(holders))
        if not any(other.num_tokens >= other.end_len for other in self._running.decodes):
            while len(growing) > self._cache.num_free:
                if len(self._running) == 1 and self._cache.num_loading:
                    break  # the blocks that are missing come back when the loads have ended
                victim = self._policy.victim(self._running)
                self._preempt(victim)
                if victim in growing:
                    growing.remove(victim)
        for request in growing:
            self._grow(plan, request)
        return False

    def _grow(self, plan: StepPlan, request: Request) -> bool:
        """Give `request` one more KV block. Returns False if no block is free."""
        block = self._cache.extend(request)
        if block is None:
            return False
        plan.grown.append(GrownRow(row_of(request), len(request.blocks) - 1, [block]))
        return True
