"""PromptPlanner: shares the tokens of a step that decodes leave among prompts that have started and prompts that may start.

If `StepLimits.chunk` is smaller than these tokens, the first prompt keeps that many, and the others go to prompts that are
computed completely beside it. A short prompt so need not wait for the end of a long one, and the long one takes at most twice
as long with a chunk of half the tokens. What is left goes to the prompts in their order, the first one's share included.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.plan import StepPlan
from engine.request import Request
from engine.scheduler.admission import Admission
from engine.scheduler.draft import Draft
from engine.scheduler.limits import StepLimits
from engine.scheduler.running import RunningSet

Admit = Callable[[StepPlan, Request], None]


class PromptPlanner:
    """Adds prompt chunks to drafts. `admit` moves a waiting request, which has its blocks, to the running prompts."""

    def __init__(self, running: RunningSet, admission: Admission, admit: Admit) -> None:
        self._running = running
        self._admission = admission
        self._admit = admit

    def plan(self, draft: Draft, limits: StepLimits, now: float, *, may_admit: bool) -> None:
        """Add chunks to `draft`, which has the step's decodes. If `may_admit` is False, no waiting request starts."""
        if limits.chunk < draft.left and (may_admit or len(self._running.prompts) > 1):
            self._add_short(draft, limits, now, may_admit=may_admit)
        above = None  # the level of the started prompts that waiting requests of higher classes were put before
        for request in list(self._running.prompts):
            level = self._admission.displaced_level(request, now) if may_admit else None
            if level is not None and level != above:
                above = level
                self._add_waiting(draft, limits, now, above=above)
            if not draft.left:
                return
            self._add_chunk(draft, request)
        if may_admit:
            self._add_waiting(draft, limits, now)

    def load_ahead(self, now: float) -> None:
        """Begin to load the prefixes of waiting requests, whether there is a place for them or not."""
        self._admission.load_ahead(now)

    def _add_short(self, draft: Draft, limits: StepLimits, now: float, *, may_admit: bool) -> None:
        """Add prompts that can be computed completely beside the first one, and keep the first one's share.

        The first prompt is the one of the best rank that has started or, if none has, the first that is admitted.
        """
        for request in list(self._running.prompts):
            if draft.first is None:
                draft.keep_for(request, limits.chunk)
            elif len(request.tokens) - request.num_computed <= draft.spare:
                self._add_chunk(draft, request)
        if not may_admit or draft.spare <= 0:
            return
        for request in self._admission.admissible(draft.prompts, now, limits.seqs, longest=draft.longest):
            self._admit(draft.plan, request)
            if draft.first is None:
                draft.keep_for(request, limits.chunk)
            else:
                self._add_chunk(draft, request)
            if draft.spare <= 0 or self._running.num_places(limits.seqs) < 1:
                return

    def _add_waiting(self, draft: Draft, limits: StepLimits, now: float, *, above: int | None = None) -> None:
        """Admit waiting requests while there are places and tokens, and add the first chunk of each."""
        if not draft.left or self._running.num_places(limits.seqs) < 1:
            return
        for request in self._admission.admissible(draft.prompts, now, limits.seqs, above=above):
            self._admit(draft.plan, request)
            self._add_chunk(draft, request)
            if not draft.left or self._running.num_places(limits.seqs) < 1:
                return

    def _add_chunk(self, draft: Draft, request: Request) -> None:
        """Add the next chunk of a prompt. The request becomes a decode if the chunk reaches its last token."""
        if draft.add_chunk(request):
            self._running.start_decoding(request)
