"""Code that both kernels for y = x W^T, `gemv.py` and `skinny.py`, use: fused operations and the layout of a gated weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

Norm = tuple[torch.Tensor, float]
"""Weight [K] and eps of a root-mean-square norm. `layers/linear.py` has the same alias; kernels may not import layers."""


class Extras(NamedTuple):
    """Operations that a kernel fuses into the product y = x W^T."""

    gated: bool = False  # W is gate's I rows, then up's I rows; the output is silu(gate) * up
    norm: Norm | None = None  # x is root-mean-square normalised before the product; x must be a single row
    add: bool = False  # the product is added to `out` instead of overwriting it; not together with `gated`


@triton.jit
def row_of_tile(tile, r, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Return the index of the row of W that is row r of a tile of ROWS rows. Rows past the last output repeat the last row.

    With GATED, the first half of a tile has gate rows, and the second half the matching up rows.
    """
    if GATED:
        HALF: tl.constexpr = ROWS // 2
        row = tl.minimum(tile * HALF + r % HALF, outputs - 1) + tl.where(r < HALF, 0, outputs)
    else:
        row = tl.minimum(tile * ROWS + r, outputs - 1)
    return row


@triton.jit
def silu_product(both, SHAPE: tl.constexpr, ORDER: tl.constexpr):
    """Compute silu(gate) * up. The first axis of `both` holds gate rows and then as many up rows.

    SHAPE splits this axis into (2, rows). ORDER then moves the axis of size 2 to the end, where `tl.split` needs it.
    """
    gate, up = tl.split(tl.permute(tl.reshape(both, SHAPE), ORDER))
    return gate / (1.0 + tl.exp(-gate)) * up
