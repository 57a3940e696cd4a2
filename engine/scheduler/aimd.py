"""AimdPolicy: halves a limit when steps take too long, and raises it when they are short.

The bare rule (halve over `step_high_ms`, double under `step_low_ms`) oscillates for good where half a batch takes less than the
lower bound and a whole one more than the upper bound. So, as in TCP's congestion avoidance (Jacobson 1988), doublings end below
the value that was too much, and small steps follow. That value itself is tried again only after a while, which doubles each
time. Steps between the two bounds leave the limit as it is. The median of the latest steps is judged, so a single pause changes
nothing.

Two limits are kept apart, since they have different causes. Steps of decodes alone judge the number of requests. Steps that
contain prompts judge the number of tokens, and the number of requests only if prompts already have the least that they may have.

A lower number of requests works slowly: those that run go on. There is no further cut until they have ended.
"""

from __future__ import annotations

from collections import deque

from engine.config import BatchingConfig
from engine.scheduler.changes import LimitChanges, Reason
from engine.scheduler.chunks import FEWEST_TOKENS, RELIEF, ROOM, make_limits, with_room
from engine.scheduler.limits import Load, StepLimits, StepShape

FIRST_TOKENS = 512  # tokens of a step at first
FULL = 0.75  # a step with prompts tells about the token limit if it has this share of it
STEPS = 5  # steps that a decision needs, since the last change
SKIPPED = 1  # steps after a change that were planned before it
STALE_SECONDS = 1.0  # steps this far apart do not belong together
GROWTH_SECONDS = 1.0  # shortest time between a change and a small step
SMALL_STEP = 16  # a small step is this part of the value, or a quarter of the way to a value that was too much
BAD_SECONDS = 30.0  # a value that was too much is not tried again for so long, and twice as long each time
BAD_DOUBLINGS = 4
PROVEN_SECONDS = 10.0  # a value that was good within this time is what a cut falls back to


class RecentSteps:
    """The latest steps since the last change. Their median ignores a single step that a compilation or a pause made long."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=STEPS)
        self._skip = 0
        self._at = float("-inf")

    def restart(self) -> None:
        """Forget all steps, and ignore those that were planned before."""
        self._latest.clear()
        self._skip = SKIPPED

    def add(self, seconds: float, now: float) -> None:
        if now - self._at > STALE_SECONDS:
            self._latest.clear()
        self._at = now
        if self._skip:
            self._skip -= 1
        else:
            self._latest.append(seconds)

    def median(self, now: float) -> float | None:
        """Return the median duration in seconds, or None if there are too few steps for a decision."""
        if len(self._latest) < STEPS or now - self._at > STALE_SECONDS:
            return None
        return sorted(self._latest)[STEPS // 2]


class AdaptiveLimit:
    """One limit between `low` and `high`, and what is known about values that are too much."""

    def __init__(self, value: int, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.value = max(low, min(high, value))
        self._changed_at = float("-inf")
        self._bad: int | None = None  # a value that was too much
        self._bad_until = float("-inf")
        self._num_bad = 0
        self._proven, self._proven_at = 0, float("-inf")

    def start_at(self, value: int, now: float) -> None:
        self.value, self._changed_at = max(self.low, min(self.high, value)), now

    def keeps_bound(self, now: float) -> None:
        """Note that steps of the present value are short enough."""
        self._proven, self._proven_at = self.value, now
        if self._bad is not None and self.value >= self._bad:
            self._bad, self._num_bad = None, 0

    def cut(self, used: int, halvings: int, now: float) -> bool:
        """Halve the limit `halvings` times, if steps of `used` take too long. Returns whether it has changed.

        If a larger value was proven good lately, the limit falls to that one only.
        """
        if self.value == self.low:
            return False
        used = min(used, self.value)
        target = used >> halvings
        if halvings == 1 and self._proven < used and now - self._proven_at <= PROVEN_SECONDS:
            target = max(target, self._proven)
        again = self._bad is not None and used * 4 >= self._bad * 3
        self._num_bad = min(BAD_DOUBLINGS, self._num_bad + 1) if again else 0
        self._bad, self._bad_until = used, now + BAD_SECONDS * 2**self._num_bad
        return self._set(target, now)

    def grow(self, now: float, *, small: bool = False, relieved: bool = False) -> bool:
        """Raise the limit if it is time: double it, or take a small step near the value that was too much or if `small` is set.

        Values were too much for the bounds that the settings name. While longer bounds hold (`relieved`), that says nothing.
        Returns whether the limit has changed.
        """
        bad = None if relieved else self._bad
        if not small and (bad is None or 2 * self.value <= bad // 2):
            return self._set(2 * self.value, now)
        if now - self._changed_at < GROWTH_SECONDS:
            return False
        step = self.value // SMALL_STEP
        if bad is not None and now < self._bad_until:
            if self.value >= bad - 1:
                return False
            step = (bad - self.value) // 4
        return self._set(self.value + max(1, step), now)

    def _set(self, value: int, now: float) -> bool:
        value = max(self.low, min(self.high, value))
        if value == self.value:
            return False
        self.value, self._changed_at = value, now
        return True


class AimdPolicy:
    """Publishes its limits to `changes`. `largest` bounds them, beside the bounds of `batching`."""

    def __init__(self, largest: StepLimits, batching: BatchingConfig, changes: LimitChanges) -> None:
        low, high = (min(number, largest.seqs) for number in (batching.min_batch, batching.max_batch))
        self._most_tokens = largest.tokens
        self._bounds = batching.step_low_ms / 1e3, batching.step_high_ms / 1e3
        self._short, self._long = self._bounds
        self._relieved_until = float("-inf")  # until then the bounds are longer, since the smallest steps take most of them
        self._seqs = AdaptiveLimit(low, low, high)
        self._tokens = AdaptiveLimit(FIRST_TOKENS, min(FEWEST_TOKENS, largest.tokens), largest.tokens)
        self._all_steps, self._decode_steps, self._full_steps = RecentSteps(), RecentSteps(), RecentSteps()
        self._full_tokens = 0  # tokens of the latest step in `_full_steps`
        self._changes = changes

    def start_at(self, limits: StepLimits, now: float) -> None:
        """Continue from the limits of another policy, which may have been too large."""
        self._seqs.start_at(limits.seqs, now)
        self._tokens.start_at(min(limits.tokens, self._tokens.value), now)
        for steps in (self._all_steps, self._decode_steps, self._full_steps):
            steps.restart()
        self._changes.set(self.present, "policy", now)

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        """Learn that a step took `seconds`. 0 is less than can be measured, and no reason against a larger step."""
        self._all_steps.add(seconds, now)
        tokens = shape.decodes + shape.prompt_tokens
        if not shape.prompt_tokens:
            self._decode_steps.add(seconds, now)
        elif seconds > self._bounds[1] or tokens >= FULL * self._tokens.value:
            self._full_steps.add(seconds, now)
            self._full_tokens = tokens

    def limits(self, load: Load, now: float) -> StepLimits:
        reason = self.adjust_tokens(load, now) or self._adjust_seqs(load, now)
        if reason is not None:
            self._changes.set(self.present, reason, now)
        return with_room(self.present, load.decodes, self._most_tokens)

    def adjust_tokens(self, load: Load, now: float) -> Reason | None:
        """Adapt the number of tokens alone. Returns the reason if it has changed."""
        if now >= self._relieved_until:
            self._short, self._long = self._bounds
        return self._adjust_tokens(load, now)

    @property
    def present(self) -> StepLimits:
        return make_limits(self._tokens.value, self._seqs.value)

    def _prompts_have_least(self, load: Load) -> bool:
        return self._tokens.value <= load.decodes + FEWEST_TOKENS

    def _adjust_tokens(self, load: Load, now: float) -> Reason | None:
        limit, seconds = self._tokens, self._full_steps.median(now)
        if seconds is None:
            return None
        if not self._is_relieved and self._are_smallest(load) and ROOM * seconds > self._long:
            self._relieve(seconds, now)
            return None
        if seconds > self._long:
            halvings = int(seconds / self._long).bit_length()
            if not self._prompts_have_least(load) and limit.cut(self._full_tokens, halvings, now):
                self._full_steps.restart()
                return "prompt_steps_long"
            return None
        limit.keeps_bound(now)
        if seconds < self._short and limit.grow(now, relieved=self._is_relieved):
            self._full_steps.restart()
            return "prompt_steps_short"
        return None

    @property
    def _is_relieved(self) -> bool:
        return self._long > self._bounds[1]

    def _are_smallest(self, load: Load) -> bool:
        """Return whether no limits allow smaller steps than the present ones."""
        return self._prompts_have_least(load) and self._seqs.value == self._seqs.low and load.running <= self._seqs.low

    def _relieve(self, seconds: float, now: float) -> None:
        """Allow longer steps for a while, since the smallest take `seconds`, which is most of the upper bound."""
        high = max(self._bounds[1], RELIEF * seconds)
        self._short, self._long = (bound * high / self._bounds[1] for bound in self._bounds)
        self._relieved_until = now + BAD_SECONDS

    def _adjust_seqs(self, load: Load, now: float) -> Reason | None:
        limit = self._seqs
        if load.running > limit.value:
            self._decode_steps.restart()  # these steps have more decodes than the limit allows
            return None
        if self._decodes_are_long(load, now):
            if limit.cut(load.running, 1, now):
                self._decode_steps.restart()
                return "decode_steps_long"
            return None
        if load.waiting and load.running >= limit.value and self._grow_seqs(now):
            self._decode_steps.restart()
            self._all_steps.restart()
            return "decode_steps_short"
        return None

    def _decodes_are_long(self, load: Load, now: float) -> bool:
        """Return whether decodes make steps too long, alone or beside the least number of prompt tokens."""
        alone, full = self._decode_steps.median(now), self._full_steps.median(now)
        if alone is not None:
            return alone > self._long
        return full is not None and full > self._long and self._prompts_have_least(load)

    def _grow_seqs(self, now: float) -> bool:
        """Raise the number of requests if the steps allow it.

        If every step contains prompts, they fill the steps up to the upper bound, whatever the decodes take. Then steps between
        the bounds do not speak against more requests, but these come in small steps.
        """
        alone, mixed = self._decode_steps.median(now), self._all_steps.median(now)
        if alone is not None and alone <= self._long:
            self._seqs.keeps_bound(now)
        seconds = mixed if alone is None else alone
        if seconds is None:
            return False
        if seconds < self._short:
            return self._seqs.grow(now, relieved=self._is_relieved)
        return alone is None and seconds < self._long and self._seqs.grow(now, small=True)
