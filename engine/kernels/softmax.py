"""The running softmax of the attention kernels: what one pass of their loops does.

Milakov and Gimelshein, 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_pass(score, v, best, total, acc, scale, PRECISION: tl.constexpr):
    """Take keys with `score` [ROWS, KEYS], before `scale` (positive, base 2) and minus infinity where a row must not look, and
    their values v [KEYS, DIM] into each row's largest score `best`, sum `total` and weighted values `acc` [ROWS, DIM].

    Every row must see a key in its first pass, or have seen one before.
    """
    new_best = tl.maximum(best, tl.max(score, 1) * scale)
    p = tl.exp2(score * scale - new_best[:, None])  # one fused multiply-add before the exponential
    keep = tl.exp2(best - new_best)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_best, total * keep + tl.sum(p, 1), acc
