"""Settings of every kernel that calls `tl.dot`: the smallest tile that `tl.dot` accepts, and its precision mode."""

from __future__ import annotations

import torch

MIN_DOT_ROWS = 16  # `tl.dot` needs at least this many rows, columns and summed numbers


def precision(dtype: torch.dtype) -> str:
    """Choose the `input_precision` of `tl.dot` for operands of `dtype`.

    A float32 product takes three passes of tf32, which is near full precision; a single pass has a relative error of 3e-4.
    Narrower types are multiplied exactly and ignore the mode.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"
