"""Computes a uniform random number for each pair of seed and position. Sampling has no other randomness.

The number is a hash and there is no generator state. A request's tokens therefore do not depend on the other requests of its
batch, on how it was batched, or on whether it was preempted or resubmitted after a crash.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Compute a number in [0, 1) with 53 random bits for each seed and position. A position is that of a token to sample."""
    keys = _mix(seeds) + positions.astype(np.uint64) * _GOLDEN
    bits: npt.NDArray[np.float64] = (_mix(keys) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Compute one output of the splitmix64 generator from state `x`."""
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
