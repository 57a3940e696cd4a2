"""SpillSteps: the steps of the request that spills, whose context is larger than the GPU's cache. Each is a plan of one slice.

Such a step reads most of its context from the host, and may take longer than many ordinary steps. So it never shares a step
with others, and the scheduler plans it in turn with theirs. The window bounds a chunk of the prompt. The limits of a step bound
it too, but not below LEAST_CHUNK tokens: smaller chunks would make such steps many, and hardly shorter.
"""

from __future__ import annotations

from engine.kvcache.manager import KVCacheManager
from engine.plan import StepPlan
from engine.request import Request
from engine.scheduler.admission import Admission
from engine.scheduler.limits import StepLimits
from engine.scheduler.prompts import Admit
from engine.scheduler.running import RunningSet, row_of

LEAST_CHUNK = 512


class SpillSteps:
    """`admit` moves a waiting request, which has its window, to the running set. No step has more than `max_tokens`.

    `was_last` is true after such a step, until the caller has given the others their turn.
    """

    def __init__(self, cache: KVCacheManager, running: RunningSet, admission: Admission, admit: Admit, max_tokens: int) -> None:
        self._cache = cache
        self._running = running
        self._admission = admission
        self._admit = admit
        self._least = min(LEAST_CHUNK, max_tokens)
        self.was_last = False

    def plan(self, step: int, limits: StepLimits, now: float) -> tuple[StepPlan, list[Request]] | None:
        """Return a plan and the request of its slice. None if no request spills, or if it waits for a move or for a result."""
        plan = StepPlan(step)
        request = self._running.spilled
        if request is None and self._running.num_places(limits.seqs) > 0:
            request = self._admission.next_spilling(now)
            if request is not None:
                self._admit(plan, request)
        if request is None or request.num_tokens >= request.end_len:  # the request's last token is already submitted
            return None
        start, end = request.num_computed, self._cache.spill_reach(max(limits.tokens, self._least))
        if end == start:
            return None
        plan.rows, plan.starts, plan.nums = [row_of(request)], [start], [end - start]
        plan.num_decodes = int(start >= request.num_prompt and end == start + 1 == request.num_tokens)
        plan.spilled = self._cache.spilled()
        if end == request.num_tokens:
            plan.samples = [0]
            request.num_uncommitted += 1
        request.num_computed = end
        self.was_last = True
        return plan, [request]
