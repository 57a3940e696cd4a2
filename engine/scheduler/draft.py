"""Draft: the plan of one step while it is made, the requests of its slices, and the tokens that are left."""

from __future__ import annotations

from operator import itemgetter

from engine.plan import StepPlan
from engine.request import Request
from engine.scheduler.running import row_of


class Draft:
    """A plan that grows slice by slice. `requests` is parallel to the plan's slices. `left` is the rest of the step's tokens.

    A part of these tokens may be kept for the step's first prompt, whose slice is added later. Slices of prompts end at multiples
    of `align` where they can, and at the last one before the prompt's end.
    """

    __slots__ = ("_align", "_kept", "first", "left", "plan", "requests")

    def __init__(self, step: int, tokens: int, *, align: int = 1) -> None:
        self.plan = StepPlan(step)
        self.requests: list[Request] = []
        self.left = tokens
        self._align = align
        self.first: Request | None = None
        self._kept = 0

    @property
    def prompts(self) -> list[Request]:
        """The requests of the prompt chunks so far."""
        return self.requests[self.plan.num_decodes :]

    @property
    def spare(self) -> int:
        """The tokens that are left and not kept for the first prompt."""
        return self.left - self._kept

    def longest(self) -> int | None:
        """Return how many tokens a prompt may have to be computed completely beside the first one. None if there is no first."""
        return None if self.first is None else self.spare

    def keep_for(self, first: Request, chunk: int) -> None:
        """Keep up to `chunk` tokens for the prompt of `first`."""
        self.first = first
        self._kept = min(len(first.tokens) - first.num_computed, chunk)

    def end_decodes(self) -> None:
        """Note that all slices so far are decodes of one token each, and that each samples."""
        plan, num = self.plan, len(self.requests)
        _longest_first(plan, self.requests)
        plan.num_decodes = num
        plan.nums = [1] * num
        plan.samples = list(range(num))
        self.left = max(1, self.left - num)  # one token at least, so that the prompt of the best rank advances in every step

    def add_chunk(self, request: Request) -> bool:
        """Add a slice of a request's prompt, as long as the tokens that are left allow.

        Returns whether the slice reaches the last token, so that the request samples. A request gets one slice in a step, even if
        `align` has cut that short.
        """
        if self._align > 1 and any(other is request for other in self.prompts):
            return False
        plan, start = self.plan, request.num_computed
        num = min(len(request.tokens) - start, self.left)
        if self._align > 1:
            num = self._aligned(start, num, len(request.tokens))
        is_last = start + num == len(request.tokens)
        if is_last:
            plan.samples.append(len(self.requests))
            request.num_uncommitted += 1
        plan.rows.append(row_of(request))
        plan.starts.append(start)
        plan.nums.append(num)
        self.requests.append(request)
        request.num_computed = start + num
        self.left -= num
        return is_last

    def _aligned(self, start: int, num: int, length: int) -> int:
        """Shorten a slice of `num` tokens at `start` so that it ends at a multiple of `align`, if there is one in it."""
        end = min(start + num, length - 1) // self._align * self._align
        return end - start if end > start else num


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
