"""The two steps of a fit of step costs: least squares without negative values, and the closest list that never falls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def solve(matrix: Floats, vector: Floats, values: Floats, free: npt.NDArray[np.bool_]) -> Floats:
    """Solve for the `free` values, none of which may be negative. The others stay as they are.

    Values that come out negative are set to 0, and the rest is solved again (active set).
    """
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


def pool(values: Floats, weights: Floats) -> Floats:
    """Return the closest list that never falls: neighbours that fall share their weighted mean (Ayer et al. 1955)."""
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
