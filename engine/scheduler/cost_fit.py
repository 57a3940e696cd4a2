"""CostFit: fits a CostTable to measured steps, online.

Every value of the table is a column of a least-squares problem of relative errors, so a pause of seconds in one step weighs
almost nothing. Observations are collected, and every REFIT of them go into the normal equations, where older ones fade. The
equations of decode steps and of steps with prompts fade separately: the rarer kind must not be forgotten for the other's sake.

Each refit solves for values close to the present ones (a proximal step), so that what no recent step tells apart stays as it is.
A change counts by the share of a step that it explains, and at least by a tenth of its share of the value itself: few steps that
read little KV must not make a token of KV a hundred times dearer, only because all of them took a little longer.
No value is negative, and no list falls (`cost_solve.py`). Residuals beyond twice their usual size weigh less (Huber 1964).

A size that no step has had is predicted from its neighbours: from the next larger one if there is one. Beyond all of them, steps
with prompts are predicted in proportion, which is more than they will turn out to take. Decodes mostly wait for the same weights,
however many there are, so in proportion they would seem far too long, and no larger batch would ever be tried. They are predicted
along the slope between the two largest known sizes, but never flatter than a part of proportion (FLATTEST).

A step may be slow by accident, for example because a kernel is compiled, but it is never fast by accident. So a size has a value
as soon as one step takes no longer than predicted from the neighbours, and else once it has had FIRST steps.
"""

from __future__ import annotations

from bisect import bisect_left
from statistics import median
from typing import NamedTuple

import numpy as np

from engine.scheduler.cost_solve import Floats, pool, solve
from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepShape

REFIT = 64  # observations between two refits
EARLY = (4, 8, 16, 32)  # numbers of observations after which a new fit does not wait for REFIT
MEMORY = 256  # observations of a kind after which an observation weighs 1/e
HELD = 2.0  # weight of the present values, in observations
FIRM = 0.1  # a change by the whole present value counts like an error by this part of a step, at least
KV_PER_STEP = 50_000  # tokens of KV that take as long as reading the weights, in usual models
PAIRS_PER_TOKEN = 20_000  # pairs in the attention that take as long as a prompt token's arithmetic, in usual models
LEAST_LIKELY = 0.03  # part of a likely cost of KV or attention that a seeded one may be
FIRST = 3  # observations of a size from whose median its first value comes, if they take longer than its neighbours suggest
NOISE = 1.1  # a step that takes this many times its prediction may still be right
DISPROPORTION = (
    2.0  # a size that takes this many times as long as in proportion to a smaller one was measured under other conditions
)
FLATTEST = 0.25  # decodes beyond the largest known size grow at least by this part of what they would in proportion


class _Row(NamedTuple):
    """One observation: features by column, and seconds."""

    columns: tuple[int, ...]
    features: tuple[float, ...]
    seconds: float
    weight: float  # from 0 to 1


class _Evidence:
    """The faded normal equations of one kind of steps."""

    def __init__(self, size: int) -> None:
        self.matrix = np.zeros((size, size))
        self.vector = np.zeros(size)
        self.new: list[_Row] = []

    def fold(self) -> Floats:
        """Put the new rows into the equations. Returns the rows as a matrix of features over seconds."""
        rows, self.new = self.new, []
        dense = np.zeros((len(rows), self.vector.size))
        places = [i for i, row in enumerate(rows) for _ in row.columns]
        columns = [column for row in rows for column in row.columns]
        dense[places, columns] = [feature / row.seconds for row in rows for feature in row.features]
        weights = np.array([row.weight for row in rows])
        fade = np.exp(-len(rows) / MEMORY)
        self.matrix = self.matrix * fade + (dense.T * weights) @ dense
        self.vector = self.vector * fade + dense.T @ weights
        return dense


class CostFit:
    """`decode_rows` and `step_tokens` are the sizes and knots of the table.

    `seed` is a table to start from. It says nothing of sizes beyond its own.
    """

    def __init__(self, decode_rows: list[int], step_tokens: list[int], seed: CostTable | None) -> None:
        self._rows, self._knots = decode_rows, step_tokens
        self._first_knot = len(decode_rows)
        self._kv = self._first_knot + len(step_tokens)
        self._size = self._kv + 3
        self._values = np.zeros(self._size)
        self._known = np.zeros(self._size, bool)
        self._known[self._kv :] = True
        if seed is not None:
            largest = seed.decode_rows[-1], seed.step_tokens[-1]
            seed = seed.resampled(decode_rows, step_tokens)
            shared = seed.kv_token_seconds, seed.attention_pair_seconds, seed.long_pair_seconds
            self._values[:] = [*seed.decode_seconds, *seed.step_seconds, *shared]
            self._known[: self._first_knot] = np.array(decode_rows) <= largest[0]
            self._known[self._first_knot : self._kv] = np.array(step_tokens) <= largest[1]
        self._largest = np.zeros(self._size)  # largest share of a step's seconds for a unit of each value
        self._evidence = {kind: _Evidence(self._size) for kind in (False, True)}
        self._firsts: dict[int, list[float]] = {}
        self._least_likely = 1.0 if seed is None else LEAST_LIKELY
        self.num_found = 0  # how often a size or knot was measured that was not known
        self._count = 0
        self.table = self._make_table()

    def known_table(self) -> CostTable:
        """Return the table without the sizes and knots that are predicted from their neighbours. Each kind must have one."""
        table = self.table
        rows, knots = (np.flatnonzero(self._known[self._columns_of(kind)]).tolist() for kind in (False, True))
        return table._replace(
            decode_rows=[table.decode_rows[i] for i in rows],
            decode_seconds=[table.decode_seconds[i] for i in rows],
            step_tokens=[table.step_tokens[i] for i in knots],
            step_seconds=[table.step_seconds[i] for i in knots],
        )

    def knows(self, shape: StepShape) -> bool:
        """Return whether the size of `shape` was measured or seeded, so that its prediction is more than a guess."""
        return bool(self._known[self._nearest(shape)])

    def add(self, shape: StepShape, seconds: float, weight: float) -> None:
        """Add an observation with a weight from 0 to 1, and refit if it is time."""
        column = self._nearest(shape)
        if not self._known[column]:
            self._add_first(column, shape, seconds)
        if self._known[column]:  # else the fit would explain the whole step by the KV and the attention alone
            self._evidence[shape.prompt_tokens > 0].new.append(_Row(*self._features(shape), seconds, weight))
        self._count += 1
        if self._count % REFIT == 0 or self._count in EARLY:
            self.refit()

    def lower(self, shape: StepShape, seconds: float) -> None:
        """Correct a young table by a step that was far faster than predicted: whatever made earlier steps slow is over.

        The size of `shape` and smaller ones take no longer from now on. Earlier observations of this kind of steps are forgotten.
        """
        kind = shape.prompt_tokens > 0
        part = self._columns_of(kind)
        place = self._nearest(shape) - part.start
        shared = self._shared_seconds(shape)
        if shared > seconds / 2:
            self._values[self._kv :] *= seconds / (shared + self._values[part][place])
        value = seconds - self._shared_seconds(shape)
        np.minimum(self._values[part][: place + 1], value, out=self._values[part][: place + 1])
        self._forget_beyond(shape)
        self._evidence[kind] = _Evidence(self._size)
        self.table = self._make_table()

    def _forget_beyond(self, shape: StepShape) -> None:
        """Make sizes beyond that of `shape` unknown if they take out of proportion longer.

        They were measured while something made the device slow. Limits would else never reach them again.
        """
        kind = shape.prompt_tokens > 0
        part, sizes = self._columns_of(kind), self._knots if kind else self._rows
        place = self._nearest(shape) - part.start
        values, known = self._values[part], self._known[part]  # views
        most = DISPROPORTION * values[place] * np.array(sizes[place + 1 :]) / sizes[place]
        known[place + 1 :] &= values[place + 1 :] <= most

    def refit(self) -> None:
        """Fit the table to all observations so far."""
        for evidence in self._evidence.values():
            dense = evidence.fold()
            if len(dense):
                self._largest = np.maximum(self._largest, dense.max(0))
        matrix = sum(evidence.matrix for evidence in self._evidence.values())
        vector = sum(evidence.vector for evidence in self._evidence.values())
        weights_held = HELD * np.square(self._largest)
        held = HELD * np.square(np.maximum(self._largest, FIRM * self._inverse()))
        self._values = solve(
            matrix + np.diag(held), vector + held * self._values, self._values, self._known & (self._largest > 0)
        )
        for prompts in (False, True):
            part = self._columns_of(prompts)
            known = np.flatnonzero(self._known[part]) + part.start
            weights = np.maximum((np.diag(matrix) + weights_held)[known], 1e-9)
            self._values[known] = pool(self._values[known], weights)
        self.table = self._make_table()

    def _inverse(self) -> Floats:
        """Return 1 over each value, or 0 where no step has told anything about it.

        A cost of KV or attention that was not seeded changes as if it were a likely one. Noise of the first steps would else
        decide it, and then hold it there. One that was seeded may be smaller, down to a part of that.
        """
        values = self._values.copy()
        pair = self._likely_pair()
        for column, likely in zip(range(self._kv, self._size), (self._likely_kv(), pair, pair), strict=True):
            values[column] = max(values[column], self._least_likely * likely)
        inverse = np.zeros(self._size)
        np.divide(1.0, values, out=inverse, where=(values > 0) & (self._largest > 0))
        return inverse

    def _likely_kv(self) -> float:
        """Return seconds for a token of KV of usual models. 0 if no size of decodes is known."""
        known = np.flatnonzero(self._known[: self._first_knot])
        return float(self._values[known[0]] / KV_PER_STEP) if len(known) else 0.0

    def _likely_pair(self) -> float:
        """Return seconds for a pair of a prompt token and a token that it attends to of usual models. 0 if no knot is known."""
        known = np.flatnonzero(self._known[self._first_knot : self._kv])
        if not len(known):
            return 0.0
        last = int(known[-1])
        return float(self._values[self._first_knot + last] / (self._knots[last] * PAIRS_PER_TOKEN))

    def rescale(self, ratio: float, *, prompts: bool) -> None:
        """Multiply all values of one kind of steps by `ratio`, and forget the observations of that kind."""
        self._values[self._columns_of(prompts)] *= ratio
        self._values[self._kv + 1 :] *= ratio if prompts else 1.0
        self._values[self._kv] *= 1.0 if prompts else ratio
        self._evidence[prompts] = _Evidence(self._size)
        self._count = 0
        self.table = self._make_table()

    def _columns_of(self, prompts: bool) -> slice:
        return slice(self._first_knot, self._kv) if prompts else slice(0, self._first_knot)

    def _nearest(self, shape: StepShape) -> int:
        """Return the column of the size or knot that is nearest to `shape`."""
        if not shape.prompt_tokens:
            return min(bisect_left(self._rows, shape.decodes), self._first_knot - 1)
        tokens, knots = shape.decodes + shape.prompt_tokens, self._knots
        above = min(bisect_left(knots, tokens), len(knots) - 1)
        if above and knots[above] - tokens > tokens - knots[above - 1]:
            above -= 1
        return self._first_knot + above

    def _features(self, shape: StepShape) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the columns that the predicted seconds of `shape` depend on, and the factor of each."""
        decodes, kv_tokens, prompt_tokens, *attention = shape
        if not prompt_tokens:
            return (self._nearest(shape), self._kv), (max(1.0, decodes / self._rows[-1]), float(kv_tokens))
        tokens, knots = decodes + prompt_tokens, self._knots
        above = bisect_left(knots, tokens)
        column = self._first_knot + above
        shared, factors = range(self._kv, self._size), (float(kv_tokens), *map(float, attention))
        if above == len(knots):
            return (column - 1, *shared), (tokens / knots[-1], *factors)
        if above == 0:
            return (column, *shared), (1.0, *factors)
        share = (tokens - knots[above - 1]) / (knots[above] - knots[above - 1])
        return (column - 1, column, *shared), (1.0 - share, share, *factors)

    def _add_first(self, column: int, shape: StepShape, seconds: float) -> None:
        """Learn from an observation of a size that has no value yet."""
        rest = max(0.0, seconds - self._shared_seconds(shape))
        scale = self._knots[column - self._first_knot] / (shape.decodes + shape.prompt_tokens) if shape.prompt_tokens else 1.0
        predicted = float(self._values[column])  # from neighbours; 0 if the kind has none
        firsts = self._firsts.setdefault(column, [])
        firsts.append(scale * rest)
        if rest <= NOISE * predicted:
            self._set_first(column, shape, min(predicted, scale * rest))
        elif len(firsts) == FIRST:
            self._set_first(column, shape, median(firsts))

    def _shared_seconds(self, shape: StepShape) -> float:
        """Return the predicted seconds for KV and attention."""
        kv_seconds, pair_seconds, long_seconds = self._values[self._kv :].tolist()
        return float(shape.kv_tokens * kv_seconds + shape.attention * pair_seconds + shape.long_attention * long_seconds)

    def _set_first(self, column: int, shape: StepShape, value: float) -> None:
        self._values[column] = value
        self._known[column] = True
        self._forget_beyond(shape)
        self.num_found += 1
        del self._firsts[column]
        self.table = self._make_table()

    def _make_table(self) -> CostTable:
        self._fill(self._columns_of(False), self._rows, FLATTEST)
        self._fill(self._columns_of(True), self._knots, 1.0)
        values = self._values.tolist()
        return CostTable(
            self._rows, values[: self._first_knot], self._knots, values[self._first_knot : self._kv], *values[self._kv :]
        )

    def _fill(self, part: slice, sizes: list[int], flattest: float) -> None:
        """Give each unknown value of a list that of the next larger known size.

        Beyond all known sizes, values grow by the last known slope, and at least by the part `flattest` of proportion.
        """
        values, known = self._values[part], self._known[part]
        places = np.flatnonzero(known)
        if not len(places):
            return
        last = int(places[-1])
        slope = flattest * values[last] / sizes[last]
        if len(places) > 1 and flattest < 1:
            before = int(places[-2])
            slope = max(slope, (values[last] - values[before]) / (sizes[last] - sizes[before]))
        for place in np.flatnonzero(~known).tolist():
            after = np.searchsorted(places, place)
            beyond = after == len(places)
            values[place] = values[last] + slope * (sizes[place] - sizes[last]) if beyond else values[places[after]]
        np.maximum.accumulate(values, out=values)
