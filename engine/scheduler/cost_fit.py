"""CostFit: fits a CostTable to measured steps, online.

Every value of the table is a column of a least-squares problem of relative errors, so a pause of seconds in one step weighs
almost nothing. Observations are collected, and every REFIT of them go into the normal equations, where older ones fade. The
equations of decode steps and of steps with prompts fade separately: the rarer kind must not be forgotten for the other's sake.

Each refit solves for values close to the present ones (a proximal step), so that what no recent step tells apart stays as it is.
A change counts by the share of a step that it explains, and at least by a tenth of its share of the value itself: few steps that
read little KV must not make a token of KV a hundred times dearer, only because all of them took a little longer.
Negative values are set to 0 one after the other (active set). Then each list is made monotone by pooling adjacent violators
(Ayer et al. 1955). Residuals beyond twice their usual size weigh less (Huber 1964).

A size that no step has had is predicted from its neighbours: from the next larger one, or beyond all of them in proportion, which
is more than it will turn out to be.
"""

from __future__ import annotations

from bisect import bisect_left
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepShape

REFIT = 64  # observations between two refits
EARLY = (4, 8, 16, 32)  # numbers of observations after which a new fit does not wait for REFIT
MEMORY = 256  # observations of a kind after which an observation weighs 1/e
HELD = 2.0  # weight of the present values, in observations
FIRM = 0.1  # a change by the whole present value counts like an error by this part of a step, at least
FIRST = 3  # observations of a size from whose median its first value comes

Floats = npt.NDArray[np.float64]


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
    """`decode_rows` and `step_tokens` are the sizes and knots of the table. `seed` is a table to start from."""

    def __init__(self, decode_rows: list[int], step_tokens: list[int], seed: CostTable | None) -> None:
        self._rows, self._knots = decode_rows, step_tokens
        self._first_knot = len(decode_rows)
        self._kv = self._first_knot + len(step_tokens)
        self._size = self._kv + 2
        self._values = np.zeros(self._size)
        self._known = np.zeros(self._size, bool)
        self._known[self._kv :] = True
        if seed is not None:
            seed = seed.resampled(decode_rows, step_tokens)
            self._values[:] = [*seed.decode_seconds, *seed.step_seconds, seed.kv_token_seconds, seed.attention_pair_seconds]
            self._known[:] = True
        self._largest = np.zeros(self._size)  # largest share of a step's seconds for a unit of each value
        self._evidence = {kind: _Evidence(self._size) for kind in (False, True)}
        self._firsts: dict[int, list[float]] = {}
        self._count = 0
        self.table = self._make_table()

    def knows(self, shape: StepShape) -> bool:
        """Return whether the size of `shape` was measured or seeded, so that its prediction is more than a guess."""
        return bool(self._known[self._nearest(shape)])

    def add(self, shape: StepShape, seconds: float, weight: float) -> None:
        """Add an observation with a weight from 0 to 1, and refit if it is time."""
        column = self._nearest(shape)
        self._evidence[shape.prompt_tokens > 0].new.append(_Row(*self._features(shape), seconds, weight))
        if not self._known[column]:
            self._add_first(column, shape, seconds)
        self._count += 1
        if self._count % REFIT == 0 or self._count in EARLY:
            self.refit()

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
        self._values = _solve(
            matrix + np.diag(held), vector + held * self._values, self._values, self._known & (self._largest > 0)
        )
        for prompts in (False, True):
            part = self._columns_of(prompts)
            known = np.flatnonzero(self._known[part]) + part.start
            weights = np.maximum((np.diag(matrix) + weights_held)[known], 1e-9)
            self._values[known] = _pool(self._values[known], weights)
        self.table = self._make_table()

    def _inverse(self) -> Floats:
        """Return 1 over each value, or 0 where the value is 0 or no step has told anything about it."""
        inverse = np.zeros(self._size)
        np.divide(1.0, self._values, out=inverse, where=(self._values > 0) & (self._largest > 0))
        return inverse

    def rescale(self, ratio: float, *, prompts: bool) -> None:
        """Multiply all values of one kind of steps by `ratio`, and forget the observations of that kind."""
        self._values[self._columns_of(prompts)] *= ratio
        self._values[self._kv + prompts] *= ratio
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
        decodes, kv_tokens, prompt_tokens, attention = shape
        if not prompt_tokens:
            return (self._nearest(shape), self._kv), (max(1.0, decodes / self._rows[-1]), float(kv_tokens))
        tokens, knots = decodes + prompt_tokens, self._knots
        above = bisect_left(knots, tokens)
        column = self._first_knot + above
        shared, factors = (self._kv, self._kv + 1), (float(kv_tokens), float(attention))
        if above == len(knots):
            return (column - 1, *shared), (tokens / knots[-1], *factors)
        if above == 0:
            return (column, *shared), (1.0, *factors)
        share = (tokens - knots[above - 1]) / (knots[above] - knots[above - 1])
        return (column - 1, column, *shared), (1.0 - share, share, *factors)

    def _add_first(self, column: int, shape: StepShape, seconds: float) -> None:
        """Remember an observation of a size that has no value yet. After FIRST of them the size has a value."""
        kv_seconds, pair_seconds = self._values[self._kv :].tolist()
        rest = max(0.0, seconds - shape.kv_tokens * kv_seconds - shape.attention * pair_seconds)
        if shape.prompt_tokens:
            rest *= self._knots[column - self._first_knot] / (shape.decodes + shape.prompt_tokens)
        firsts = self._firsts.setdefault(column, [])
        firsts.append(rest)
        if len(firsts) == FIRST:
            self._values[column] = median(self._firsts.pop(column))
            self._known[column] = True
            self.table = self._make_table()

    def _make_table(self) -> CostTable:
        self._fill(self._columns_of(False), self._rows)
        self._fill(self._columns_of(True), self._knots)
        values = self._values.tolist()
        kv_seconds, pair_seconds = values[self._kv :]
        return CostTable(
            self._rows, values[: self._first_knot], self._knots, values[self._first_knot : self._kv], kv_seconds, pair_seconds
        )

    def _fill(self, part: slice, sizes: list[int]) -> None:
        """Give each unknown value of a list that of the next larger known size, or beyond all of them one in proportion."""
        values, known = self._values[part], self._known[part]
        places = np.flatnonzero(known)
        if not len(places):
            return
        last = int(places[-1])
        for place in np.flatnonzero(~known).tolist():
            after = np.searchsorted(places, place)
            values[place] = values[last] * sizes[place] / sizes[last] if after == len(places) else values[places[after]]
        np.maximum.accumulate(values, out=values)


def _solve(matrix: Floats, vector: Floats, values: Floats, free: npt.NDArray[np.bool_]) -> Floats:
    """Solve for the `free` values, none of which may be negative. The others stay as they are."""
    values, free = values.copy(), free.copy()
    while free.any():
        index, fixed = np.flatnonzero(free), np.flatnonzero(~free)
        part = matrix[np.ix_(index, index)]
        right = vector[index] - matrix[np.ix_(index, fixed)] @ values[fixed]
        scale = 1.0 / np.sqrt(np.diag(part))
        solved = scale * np.linalg.solve(part * np.outer(scale, scale), right * scale)
        if (solved >= 0).all():
            values[index] = solved
            break
        values[index[solved < 0]] = 0.0
        free[index[solved < 0]] = False
    return values


def _pool(values: Floats, weights: Floats) -> Floats:
    """Return the closest list that never falls: neighbours that fall share their weighted mean."""
    if (np.diff(values) >= 0).all():
        return values
    pools: list[tuple[float, float, int]] = []  # mean, weight, number
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, number = value, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, count = pools.pop()
            mean = (mean * total + other * more) / (total + more)
            total, number = total + more, number + count
        pools.append((mean, total, number))
    return np.array([mean for mean, _, number in pools for _ in range(number)])
