"""Forecast: predicts when the first token of a request comes, and refuses a request whose first token would come too late.

    seconds until the first token  =  the step in flight  +  the wait behind others  +  the request's own prompt

The wait behind others is the longer of two: until the prompts that go before are computed, and until enough running requests have
ended to free a place, unless lower classes give up enough. Prompts that go before are those that have started, and what
`WaitingQueue.work_before` finds. Places become free at the rate of the running requests over the usual length of an output.

Predictions are compared with what comes of them, and later ones of the same tenant are corrected by the usual ratio
(`accuracy.py`). A prediction is a median: if requests were accepted up to a prediction of their target, half of the last ones
would be late in an overload. So a promised request is refused if the delay by others, longer by its usual deviation, would be
too long. Nothing is refused while the cost of steps is not trusted, and an idle engine refuses only a prompt that alone takes
too long: if it refused others, it would get no first token from which to correct its prediction, and would refuse them for
good.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.errors import Overloaded, RequestTimeout
from engine.request import Request
from engine.scheduler.accuracy import MEMORY, AccuracyByTenant
from engine.scheduler.limits import StepLimits, StepShape, pairs
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.running import RunningSet
from engine.scheduler.step_cost import StepCost
from engine.scheduler.work import Work, rest_of, total, work_of
from engine.slo import STANDARD, SloClass

TELLING = 0.25  # a prediction tells about the deviation if it is this share of the target; a shorter one is off by a step or two


class Expected(NamedTuple):
    seconds: float  # until the first token
    alone: float  # the same if nothing else ran or waited
    margin: float  # how many times the predicted delay by others is hardly exceeded

    @property
    def late(self) -> float:
        """A time that the first token hardly exceeds."""
        return self.alone + (self.seconds - self.alone) * self.margin


class Forecast:
    """Looks at the queue and the running set, and changes neither. Times are in seconds. No step has more than `max_tokens`."""

    def __init__(self, cost: StepCost, queue: WaitingQueue, running: RunningSet, max_tokens: int) -> None:
        self._cost = cost
        self._queue = queue
        self._running = running
        self._max_tokens = max_tokens
        self._output_tokens = 0.0  # usual number of tokens of an output; 0 before the first has ended
        self._step_seconds = 0.0  # usual duration of a step
        self._accuracy = AccuracyByTenant()
        self._typical_tokens = 1.0  # usual number of prompt tokens that are not cached
        self._slo = STANDARD  # class of the latest request that has a target

    def check(self, request: Request, limits: StepLimits) -> None:
        """Raise Overloaded or RequestTimeout if the request's first token would come later than promised, or after its deadline.

        The request is not in the queue yet, and its `num_matched` is known.
        """
        self._typical_tokens += MEMORY * (len(request.tokens) - request.num_matched - self._typical_tokens)
        if request.slo.ttft is not None:
            self._slo = request.slo
        if not self._cost.trusted:
            return
        expected = self.expected(request, limits)
        if request.deadline is not None:
            _check_alone(expected.alone, request.deadline - request.arrival)
        is_idle = not (len(self._running) or len(self._queue))
        if request.deadline is not None and not is_idle:
            _check_deadline(expected, request.deadline - request.arrival)
        if request.promised and not is_idle and request.slo.ttft is not None:
            _check_class(expected, request)
        request.expected_at = request.arrival + expected.seconds

    def expected(self, request: Request, limits: StepLimits) -> Expected:
        """Predict the first token of a request that is not in the queue yet."""
        request.num_queued = len(request.tokens)
        own = work_of(request)
        accuracy = self._accuracy.of(request.tenant)
        seconds = self._seconds(self._queue.work_before(request), own, request.slo, limits) * accuracy.factor
        alone = self._cost.prompt_seconds(int(own.tokens), int(own.pairs), decodes=0, kv_tokens=0, budget=self._max_tokens)
        return Expected(max(alone, seconds), alone, accuracy.margin)

    def waiting_seconds(self, limits: StepLimits) -> float:
        """Return how long it takes to compute all prompts that wait or have started. 0 while the cost is not trusted."""
        if not self._cost.trusted:
            return 0.0
        return self._prompt_seconds(total(map(rest_of, self._running.prompts)).plus(self._queue.work()), limits)

    def part_seconds(self, first: int, end: int, limits: StepLimits) -> float | None:
        """Return how long it takes to compute the tokens of a prompt from position `first` to `end` beside what runs.

        None while the cost is not trusted.
        """
        return self._prompt_seconds(Work(1, end - first, pairs(end - first, first)), limits) if self._cost.trusted else None

    def ttft_over_target(self, limits: StepLimits) -> float:
        """Return the predicted time to first token over its target, for a usual request that arrives now.

        Its class is that of the latest request that has a target. Returns 0 while the cost is not trusted.
        """
        if not self._cost.trusted or self._slo.ttft is None:
            return 0.0
        usual, accuracy = Work(1, self._typical_tokens, 0), self._accuracy.all
        seconds = self._seconds(self._queue.work(self._slo.rank), usual, self._slo, limits)
        return seconds * accuracy.factor * accuracy.margin / self._slo.ttft

    def itl_over_target(self, shape: StepShape) -> float:
        """Return the predicted duration of a step over the tightest inter-token target of the decodes. 0 if there is none."""
        target = self._running.itl
        return self._cost.predict(shape) / target if self._cost.trusted and target is not None else 0.0

    def began(self, request: Request, now: float) -> None:
        """Learn from the first token of a request."""
        if request.expected_at is None:
            return
        predicted, actual = request.expected_at - request.arrival, now - request.arrival
        request.expected_at = None
        if predicted > 0 and actual > 0:
            telling = request.slo.ttft is not None and predicted >= TELLING * request.slo.ttft
            self._accuracy.observe(request.tenant, math.log(actual / predicted), telling=telling)

    def ended(self, request: Request) -> None:
        """Learn from the length of an output."""
        if not self._output_tokens:
            self._output_tokens = float(request.num_outputs)
        self._output_tokens += MEMORY * (request.num_outputs - self._output_tokens)

    def stepped(self, seconds: float) -> None:
        """Learn from the duration of a step. 0 means that it was not measured."""
        if not self._step_seconds:
            self._step_seconds = seconds
        elif seconds > 0:
            self._step_seconds += MEMORY * (seconds - self._step_seconds)

    def _seconds(self, waiting: Work, own: Work, slo: SloClass, limits: StepLimits) -> float:
        """Return the seconds until a request of class `slo` has its first token, without a correction.

        `own` is its work, and `waiting` waits before it.
        """
        before = total(rest_of(r) for r in self._running.prompts if r.rank[0] <= slo.rank).plus(waiting)
        seconds = max(self._prompt_seconds(before, limits), self._place_seconds(waiting.requests, slo, limits))
        return seconds + self._step_seconds + self._prompt_seconds(own, limits)

    def _prompt_seconds(self, work: Work, limits: StepLimits) -> float:
        decodes = self._running.decodes
        return self._cost.prompt_seconds(
            int(work.tokens),
            int(work.pairs),
            decodes=len(decodes),
            kv_tokens=sum(request.num_computed for request in decodes),
            budget=max(1, limits.tokens - len(decodes)),
        )

    def _place_seconds(self, waiting: float, slo: SloClass, limits: StepLimits) -> float:
        """Return how long it takes until `waiting` requests and one more of class `slo` have had a place.

        Prompts that run hold theirs, and requests of lower classes give theirs up.
        """
        lower = self._running.num_lower(slo.rank)
        missing = waiting + 1 - max(0, self._running.num_places(limits.seqs) + lower)
        if missing <= 0 or not self._running.decodes:
            return 0.0
        return missing * self._output_tokens * self._step_seconds / len(self._running.decodes)


def _check_alone(alone: float, deadline: float) -> None:
    if alone > deadline:
        raise RequestTimeout(
            f"the prompt alone takes about {alone:.2g} s here, and the deadline is {deadline:.2g} s: allow more time, "
            "or send a shorter prompt",
            param="deadline_ms",
        )


def _check_deadline(expected: Expected, deadline: float) -> None:
    if expected.seconds > deadline:
        raise Overloaded(
            f"the first token is expected after {expected.seconds:.2g} s, and the deadline is {deadline:.2g} s: try again later, "
            "or allow more time",
            retry_after=expected.seconds - deadline,
            param="deadline_ms",
        )


def _check_class(expected: Expected, request: Request) -> None:
    """Refuse a request that others delay for longer than its class allows. A prompt that needs more than that alone may do so."""
    target = request.slo.ttft or math.inf
    allowed = target if expected.alone <= target else target + expected.alone
    if expected.late > allowed:
        raise Overloaded(
            f"the first token may come only after {expected.late:.2g} s, and the class {request.slo.name} promises it within "
            f"{target:g} s: try again later, or name a class that waits longer",
            retry_after=(expected.late - allowed) / expected.margin,
            param="slo_class",
        )
