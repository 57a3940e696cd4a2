"""Draws the times at which an open loop sends its requests, whatever the server does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.spec import Step


def arrivals(steps: Sequence[Step], burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the times of all arrivals in seconds from the start of the first step.

    Intervals have a gamma distribution with the shape `burstiness` and the mean 1. They are summed, and each sum is mapped to the
    time at which the integral of the rate reaches it. So a rate may change between two arrivals. With burstiness 1 this is a
    Poisson process.
    """
    ends = np.cumsum([(step.rate + step.end_rate) / 2 * step.seconds for step in steps])
    sums: NDArray[np.float64] = np.empty(0)
    while not len(sums) or sums[-1] < ends[-1]:
        more = rng.gamma(burstiness, 1 / burstiness, size=max(16, int(ends[-1] * 1.2)))
        sums = np.concatenate([sums, np.cumsum(more) + (sums[-1] if len(sums) else 0.0)])
    sums = sums[sums < ends[-1]]
    which = np.searchsorted(ends, sums, side="right")
    times: NDArray[np.float64] = np.empty_like(sums)
    start, before = 0.0, 0.0
    for i, step in enumerate(steps):
        here = which == i
        times[here] = start + _into(step, sums[here] - before)
        start, before = start + step.seconds, float(ends[i])
    return times


def _into(step: Step, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the seconds into a step after which the number of `expected` arrivals is reached: the root of
    rate x + (end_rate - rate) / (2 seconds) x^2 = expected, in the form that is exact when the rate does not move."""
    slope = (step.end_rate - step.rate) / step.seconds
    found: NDArray[np.float64] = 2 * expected / (step.rate + np.sqrt(np.maximum(step.rate**2 + 2 * slope * expected, 0.0)))
    return found
