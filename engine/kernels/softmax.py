"""The running (online) softmax of the attention kernels. `add_pass` is one iteration of a kernel's loop over tiles of keys.

Source: Milakov and Gimelshein, 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # log2(e); callers multiply `scale` by it, since the kernels use exp2 and log2


@triton.jit
def add_pass(score, v, best, total, acc, scale, PRECISION: tl.constexpr):
    """Add KEYS keys to the running softmax of ROWS query rows. Returns the new (best, total, acc).

    score [ROWS, KEYS] is q . k before scaling, and minus infinity where a row must not see a key. v [KEYS, DIM] are the keys'
    values. `scale` is positive and includes log2(e). Per row, `best` is the largest scaled score so far, `total` the sum of
    2^(score - best), and acc [ROWS, DIM] the same sum of weighted values.

    A row must see at least one key in its first pass. Otherwise `best` stays at minus infinity and the row becomes NaN.
    """
    new_best = tl.maximum(best, tl.max(score, 1) * scale)
    p = tl.exp2(score * scale - new_best[:, None])  # the argument takes one fused multiply-add
    keep = tl.exp2(best - new_best)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_best, total * keep + tl.sum(p, 1), acc
