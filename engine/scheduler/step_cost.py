"""StepCost: predicts how long a step takes, and learns it from the steps that have run.

The controller of the batch asks how large a step may be, and admission asks when a prompt will be computed. Both rely on it only
while it is `trusted`: each kind of steps (decodes alone, steps with prompts) was seeded, or its latest predictions were right. It
does not matter how many steps were measured. A table that predicts few steps well is good enough for steps of these sizes, and
others are mostly predicted to take longer than they will (`cost_fit.py`).

A table that is wrong by half or more is noticed, reported in the log, scaled to what was measured and learnt again. While a table
is young, that is no news: the first steps of a device may be slow. It is then learnt from all steps alike until it predicts.
"""

from __future__ import annotations

import logging
import math
from collections import deque

from engine.scheduler.cost_fit import CostFit
from engine.scheduler.cost_table import CostTable, row_sizes, token_knots
from engine.scheduler.limits import LONG_PAIRS, StepShape

MATURE = 64  # measured steps of a kind after which an unseeded table is no longer young
RECENT = 64  # steps of a kind that the error of a table is measured on
JUDGED = 16  # latest steps of a kind that show a wrong table, and that the error of a young one is measured on
FEW = 4  # steps of a kind that say nothing about its table yet
PROVEN = 6  # predicted steps of a kind that may make a young table trusted
CHECKED_EVERY = 8  # steps of a kind between two judgements
TRUSTED_ERROR, DISTRUSTED_ERROR = 0.15, 0.25  # median relative errors
WRONG = math.log(1.5)  # median |log(measured / predicted)| of a table that is wrong
USUAL = 0.02  # smallest residual that counts as unusual, as a relative error
UPPER = 0.95  # quantile of measured / predicted that `spread` reports
WIDEST = 1.5  # largest `spread`; more than that is a wrong table, not a spread

log = logging.getLogger(__name__)


class _Record:
    """How the predictions of one kind of steps turned out. `trusted` is true from the start if the kind was seeded."""

    def __init__(self, name: str, seeded: bool) -> None:
        self.name = name
        self.trusted = seeded
        self.young = not seeded
        self.wrong = False  # the table was found wrong, and was not trusted since
        self.error = 0.0  # median relative error
        self.usual = USUAL  # a residual of this size, as a relative error, is usual
        self.spread = 1.0
        self.far_off: list[tuple[StepShape, float, float]] = []  # arguments of CostFit.add, for after the next judgement
        self._logs: deque[float] = deque(maxlen=RECENT)  # log(measured / predicted)
        self.seconds: deque[float] = deque(maxlen=JUDGED)  # measured
        self._num = 0

    def add(self, ratio: float, seconds: float) -> bool:
        """Add log(measured / predicted) of a step. Returns whether it is time for a judgement."""
        self._logs.append(ratio)
        self.seconds.append(seconds)
        self._num += 1
        if self.young:
            return self._num >= PROVEN
        return self._num >= JUDGED and self._num % CHECKED_EVERY == 0

    def judge(self) -> float | None:
        """Update the figures. Returns measured / predicted if the table is wrong."""
        logs = list(self._logs)[-JUDGED:] if self.young else list(self._logs)
        residual = _middle(sorted(map(abs, logs)))
        self.error = math.expm1(residual)
        self.usual = max(USUAL, 1.5 * residual)
        self.spread = min(WIDEST, max(1.0, math.exp(sorted(logs)[int(UPPER * (len(logs) - 1))])))
        ratio = _middle(sorted(logs[-JUDGED:]))
        if abs(ratio) > WRONG and not self.young:
            return math.exp(ratio)
        if self.error > DISTRUSTED_ERROR:
            self.trusted = False
        elif self.error < TRUSTED_ERROR:
            self.trusted, self.wrong = True, False
            self.young = self.young and self._num < MATURE
        return None

    def early_ratio(self, other: float) -> float | None:
        """Return measured / predicted if this kind seems to be wrong too, now that the other kind is wrong by `other`."""
        if len(self._logs) < FEW:
            return other
        ratio = _middle(sorted(list(self._logs)[-JUDGED:]))
        return math.exp(ratio) if abs(ratio) > WRONG else None

    def restart(self) -> None:
        """Forget how the predictions of a table turned out that was wrong."""
        self._logs.clear()
        self.seconds.clear()
        self.far_off.clear()
        self.trusted, self.wrong, self.usual, self._num = False, True, USUAL, 0


class StepCost:
    """`decode_rows` are the numbers of rows that decode steps are padded to. `max_tokens` is the largest step, in tokens.

    A prediction is 0 for a kind of steps of which nothing is known, and such a StepCost is not trusted.
    """

    def __init__(self, decode_rows: list[int], max_tokens: int, seed: CostTable | None = None) -> None:
        self._fit = CostFit(decode_rows, token_knots(max_tokens), seed)
        self._num_measured = 0
        self._records = tuple(_Record(name, seed is not None) for name in ("decodes", "prompts"))

    @staticmethod
    def of_size(max_rows: int, max_tokens: int, seed: CostTable | None = None) -> StepCost:
        """Return a StepCost of usual sizes, for an engine that does not say what sizes it captures."""
        return StepCost(row_sizes(max_rows), max_tokens, seed)

    def predict(self, shape: StepShape) -> float:
        """Return the predicted seconds of a step. They never fall when a field of `shape` grows."""
        return self._fit.table.predict(shape)

    def knows(self, shape: StepShape) -> bool:
        """Return whether a step of about this size was measured or seeded. If not, its prediction is only a bound."""
        return self._fit.knows(shape)

    @property
    def table(self) -> CostTable:
        return self._fit.table

    @property
    def learnt(self) -> CostTable | None:
        """The sizes and knots that were measured or seeded, for a later engine. None while that is not worth keeping."""
        if not self.trusted or self._num_measured < MATURE or any(record.young for record in self._records):
            return None
        return self._fit.known_table()

    @property
    def num_found(self) -> int:
        """How often steps of a size were measured that was not known."""
        return self._fit.num_found

    @property
    def trusted(self) -> bool:
        return all(record.trusted for record in self._records)

    @property
    def trusted_for_decodes(self) -> bool:
        """Whether decodes alone are predicted well, and steps with prompts too, unless they are not known yet."""
        decodes, prompts = self._records
        return decodes.trusted and (prompts.trusted or prompts.young)

    @property
    def error(self) -> float:
        """Recent median relative error, of the kind of steps that is predicted worse. 0 if nothing was measured yet."""
        return max(record.error for record in self._records)

    @property
    def spread(self) -> float:
        """How much longer than predicted a long step takes: the 95th percentile of recent measured / predicted, at least 1."""
        return max(record.spread for record in self._records)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn that a step of `shape` took `seconds`. A step that was not measured (0 seconds) is ignored."""
        if not (shape.decodes or shape.prompt_tokens) or not seconds > 0:
            return
        self._num_measured += 1
        predicted = self.predict(shape)
        if predicted > 0 and self._fit.knows(shape):
            self._compare(shape, seconds, math.log(seconds / predicted))
        else:
            self._fit.add(shape, seconds, 1.0)

    def _compare(self, shape: StepShape, seconds: float, ratio: float) -> None:
        """Learn from a step that took exp(`ratio`) times as long as predicted.

        Steps that are far off are learnt from after the next judgement. If the whole table is wrong, they would else have changed
        a part of it before it is scaled.
        """
        record = self._records[shape.prompt_tokens > 0]
        if record.young:
            if ratio < -WRONG:
                self._fit.lower(shape, seconds)
            else:
                self._fit.add(shape, seconds, 1.0)
            if record.add(ratio, seconds):
                record.judge()
            return
        weight = min(1.0, 2 * record.usual / max(abs(ratio), USUAL))
        if abs(ratio) > WRONG:
            record.far_off.append((shape, seconds, weight))
        else:
            self._fit.add(shape, seconds, weight)
        if record.add(ratio, seconds):
            self._judge(record)

    def _judge(self, record: _Record) -> None:
        """Compare a record with what was predicted. If the table is wrong, start to learn again.

        A table of another device or model is wrong for both kinds of steps. The kind that is rarer now need not wait for its own
        judgement.
        """
        ratio = record.judge()
        if ratio is None:
            for observation in record.far_off:
                self._fit.add(*observation)
            record.far_off.clear()
            return
        for kind in self._records:
            own = ratio if kind is record else kind.early_ratio(ratio)
            if own is not None:
                self._relearn(kind, own)

    def _relearn(self, record: _Record, ratio: float) -> None:
        if not (record.young or record.wrong) and record.seconds:
            measured = 1e3 * _middle(sorted(record.seconds))
            log.warning(
                "step cost is wrong and is learnt again",
                extra={"kind": record.name, "predicted_ms": round(measured / ratio, 3), "measured_ms": round(measured, 3)},
            )
        self._fit.rescale(ratio, prompts=record is self._records[1])
        record.restart()

    def prompt_tokens_within(self, seconds: float, *, decodes: int, kv_tokens: int, context: int, most: int) -> int:
        """Return the largest number of prompt tokens, at most `most`, with which a step is predicted to stay within `seconds`.

        The prompt continues after `context` tokens, beside `decodes` that read `kv_tokens`. Returns 0 if the decodes alone take
        longer.
        """
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(StepShape.with_chunk(decodes, kv_tokens, middle, context)) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def prompt_seconds(self, tokens: int, attention: int, *, decodes: int, kv_tokens: int, budget: int) -> float:
        """Return the predicted seconds until `tokens` prompt tokens are computed, in steps of at most `budget` of them.

        `attention` is the number of pairs of all these tokens (see `pairs`). Each step also runs `decodes` that read `kv_tokens`.
        """
        budget = max(1, budget)
        full, rest = divmod(tokens, budget)
        seconds = full * self.predict(StepShape(decodes, kv_tokens, budget, 0))
        if rest:
            seconds += self.predict(StepShape(decodes, kv_tokens, rest, 0))
        within = min(attention, (full + (rest > 0)) * LONG_PAIRS)  # as if each step had one chunk, and all as many pairs
        return seconds + self.predict(StepShape(0, attention // budget, 1, within, attention - within)) - self.table.prompts(1)


def _middle(ascending: list[float]) -> float:
    """Return the median. The lower one of an even number is near enough here, and much faster than `statistics.median`."""
    return ascending[(len(ascending) - 1) // 2]
