"""What the two kernels for y = x W^T, `gemv.py` and `skinny.py`, share: fused extras and the layout of a gated weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

Norm = tuple[torch.Tensor, float]
"""Weight [K] and eps of a root-mean-square norm. `layers/linear.py` has the same alias; kernels may not import layers."""


class Extras(NamedTuple):
    """Operations that are fused into a product."""

    gated: bool = False  # W is gate's I rows, then up's I rows; the output is silu(gate) * up
    norm: Norm | None = None  # x is normed before the product; for one row only
    add: bool = False  # the product is added to `out` instead of overwriting it; not together with `gated`


@triton.jit
def row_of_tile(tile, r, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """The row of W that is row r of a tile of ROWS rows. Rows past the last output repeat the last row.

    With GATED, the first half of a tile is gate rows and the second half the matching up rows.
    """
    if GATED:
        HALF: tl.constexpr = ROWS // 2
        row = tl.minimum(tile * HALF + r % HALF, outputs - 1) + tl.where(r < HALF, 0, outputs)
    else:
        row = tl.minimum(tile * ROWS + r, outputs - 1)
    return row


@triton.jit
def silu_product(both, SHAPE: tl.constexpr, ORDER: tl.constexpr):
    """silu(gate) * up, where the first axis of `both` holds gate rows and then as many up rows.

    SHAPE splits that axis in (2, rows); ORDER then moves the 2 to the end, where `tl.split` wants it.
    """
    gate, up = tl.split(tl.permute(tl.reshape(both, SHAPE), ORDER))
    return gate / (1.0 + tl.exp(-gate)) * up
