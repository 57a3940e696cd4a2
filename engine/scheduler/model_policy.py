"""ModelPolicy: the largest step whose predicted time keeps the tightest target among the running requests.

The target is the time between tokens that a request was promised. Limits lie on a geometric grid. They fall at once when a step
of the present limits would take too long. They rise only after a while, and only if the larger step keeps a margin, so that they
do not follow the noise of predictions. A fall soon after a rise doubles the wait. A rise need not wait when steps of a size were
measured for the first time: limits that end where the costs are not known yet move on with what is learnt.

While only the cost of decodes is known, the policy sets the number of requests, and is told the number of tokens.

While nothing is promised to a decode, or nothing decodes, a step may have all tokens that the settings allow. That is no change
of the limits: they hold again with the next decode.
"""

from __future__ import annotations

from bisect import bisect_right

from engine.scheduler.changes import LimitChanges
from engine.scheduler.chunks import FEWEST_SEQS, FEWEST_TOKENS, RELIEF, ROOM, make_limits, with_room
from engine.scheduler.limits import Load, StepLimits, StepShape
from engine.scheduler.step_cost import StepCost

GRID = 2**0.25  # ratio of neighbouring token limits
HEADROOM = 0.9  # share of the target that a predicted step may take; the rest is for what happens between two steps
RISE_MARGIN = 0.9  # a rise needs steps that take this share of what is allowed
DECODE_SHARE = 0.9  # share of the allowed time that decodes may take, so that prompts advance too
RISE_SECONDS = 2.0  # shortest time from a change to a rise
LONGEST_RISE_SECONDS = 16.0
CHECK_SECONDS = 0.25  # shortest time between two looks for a rise


class ModelPolicy:
    """Publishes its limits to `changes`. `largest` bounds them."""

    def __init__(self, largest: StepLimits, cost: StepCost, changes: LimitChanges) -> None:
        self._largest = make_limits(largest.tokens, largest.seqs)
        self._cost = cost
        self._changes = changes
        self._grid = _grid(largest.tokens)
        self._sizes = [size for size in cost.table.decode_rows if size < largest.seqs] + [largest.seqs]
        self._tokens, self._seqs = largest.tokens, largest.seqs
        self._kv_per_decode = 0.0
        self._changed_at = self._rise_at = float("-inf")
        self._rise_seconds = RISE_SECONDS
        self._rose = False  # the last change was a rise
        self._num_found = cost.num_found  # when a rise was last looked for
        self._told = False  # the number of tokens is another policy's

    @property
    def present(self) -> StepLimits:
        return make_limits(self._tokens, self._seqs)

    def start_at(self, limits: StepLimits, now: float) -> None:
        """Continue from the limits of another policy."""
        self._tokens, self._seqs, self._rose = limits.tokens, limits.seqs, False
        self._changed_at, self._rise_at = now, now  # the limits of the other policy may be far too small

    def limits(self, load: Load, now: float, tokens: int | None = None) -> StepLimits:
        """Return the limits of the next step. While the cost of prompts is not known, `tokens` is the limit of another policy."""
        self._told = tokens is not None
        if tokens is not None:
            self._tokens = tokens
        if load.itl is None or not load.decodes:
            return self._largest if tokens is None else make_limits(tokens, self._largest.seqs)
        self._kv_per_decode = load.kv_tokens / load.decodes
        allowed = self._allowed(load.itl * HEADROOM / self._cost.spread)
        if not (self._tokens_fit(self._tokens, load, allowed) and self._seqs_fit(self._seqs, allowed)):
            self._fall(load, allowed, now)
        elif now >= self._rise_at or self._cost.num_found > self._num_found:
            self._rise(load, allowed * RISE_MARGIN, now)
        return with_room(self.present, load.decodes, self._largest.tokens)

    def _allowed(self, wanted: float) -> float:
        """Return `wanted`, or a longer time if the smallest step takes most of that: see `chunks`.

        A step with prompts counts only once such a step was measured. Until then it is predicted to take as long as a larger one.
        """
        smallest = StepShape(FEWEST_SEQS, int(FEWEST_SEQS * self._kv_per_decode), FEWEST_TOKENS, 0)
        if not self._cost.knows(smallest):
            smallest = smallest._replace(prompt_tokens=0)
        seconds = self._cost.predict(smallest)
        return wanted if ROOM * seconds <= wanted else max(wanted, RELIEF * seconds)

    def _decodes(self, seqs: int) -> float:
        return self._cost.predict(StepShape(seqs, int(seqs * self._kv_per_decode), 0, 0))

    def _fall(self, load: Load, allowed: float, now: float) -> None:
        tokens, seqs = min(self._tokens, self._fitting_tokens(load, allowed)), min(self._seqs, self._fitting_seqs(allowed))
        if (tokens, seqs) == (self._tokens, self._seqs):
            return
        soon = self._rose and now - self._changed_at < 2 * self._rise_seconds
        self._rise_seconds = min(LONGEST_RISE_SECONDS, 2 * self._rise_seconds) if soon else RISE_SECONDS
        self._set(tokens, seqs, now)
        self._rose, self._rise_at = False, now + self._rise_seconds
        self._changes.set(self.present, "predicted_over_target", now)

    def _rise(self, load: Load, allowed: float, now: float) -> None:
        self._num_found = self._cost.num_found
        tokens, seqs = max(self._tokens, self._fitting_tokens(load, allowed)), max(self._seqs, self._fitting_seqs(allowed))
        if (tokens, seqs) == (self._tokens, self._seqs):
            self._rise_at = now + CHECK_SECONDS
            return
        self._set(tokens, seqs, now)
        self._rose, self._rise_at = True, now + self._rise_seconds
        self._changes.set(self.present, "predicted_under_target", now)

    def _set(self, tokens: int, seqs: int, now: float) -> None:
        self._tokens, self._seqs, self._changed_at = tokens, seqs, now

    def _tokens_fit(self, tokens: int, load: Load, allowed: float) -> bool:
        """Return whether a step of `tokens` keeps the allowed time, or has the least number of prompt tokens anyway."""
        prompt_tokens = tokens - load.decodes
        if self._told or prompt_tokens <= FEWEST_TOKENS:
            return True
        shape = StepShape.with_chunk(load.decodes, load.kv_tokens, prompt_tokens, load.context)
        return self._cost.predict(shape) <= allowed

    def _fitting_tokens(self, load: Load, allowed: float) -> int:
        """Return the largest token limit of the grid that keeps the allowed time."""
        if self._told:
            return self._tokens
        most = self._largest.tokens - load.decodes
        num = self._cost.prompt_tokens_within(
            allowed,
            decodes=load.decodes,
            kv_tokens=load.kv_tokens,
            context=load.context,
            most=max(0, most),
        )
        return self._grid[max(0, bisect_right(self._grid, load.decodes + num) - 1)]

    def _seqs_fit(self, seqs: int, allowed: float) -> bool:
        if seqs <= FEWEST_SEQS:
            return True
        return self._decodes(seqs) <= allowed * DECODE_SHARE

    def _fitting_seqs(self, allowed: float) -> int:
        """Return the largest size whose decodes, with as much KV as the present ones, leave time for prompts."""
        fitting = [size for size in self._sizes if self._seqs_fit(size, allowed)]
        return fitting[-1]


def _grid(most: int) -> list[int]:
    """Return token limits up to `most`, each GRID times the one before."""
    sizes, size = [], float(FEWEST_TOKENS)
    while size < most:
        sizes.append(round(size))
        size *= GRID
    return [*sizes, most]
