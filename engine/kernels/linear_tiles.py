"""Which kernel of `linear.py`, and which tiles, for how many rows and which W: rules from what was measured on one H200."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

GEMV_ROWS = 2  # with more, tensor cores win
BUCKETS = (1, GEMV_ROWS, 16, 32, 64, 128)
MAX_ROWS = BUCKETS[-1]
MOST_NORMED = 16 << 20  # numbers of W, below which the product of one row norms it
WIDE_NUMBERS = 100 << 20  # of W, from which it is ours with more than 64 rows
WARP = 256  # numbers that one 16-byte load of a warp's 32 threads brings

_WAVE = 132  # multiprocessors of a Hopper GPU


class Gemv(NamedTuple):
    rows: int  # of W per program
    columns: int  # numbers of a row that the warps load at once: 256 for each warp that shares a row
    parts: int  # such loads, one behind the other, that are under way together; best 1 where all warps share a row
    warps: int


class Skinny(NamedTuple):
    rows: int  # of W per program, at least 64 for the wide tensor-core instructions
    columns: int  # numbers of a row in a stage
    splits: int  # of K
    warps: int
    stages: int  # of loads under way, less one


def bucket(num_rows: int) -> int:
    return next(most for most in BUCKETS if num_rows <= most)


def is_ours(m: int, n: int, k: int) -> bool:
    """Whether m rows of x, at most MAX_ROWS, and W [n, k] are for these kernels rather than for cuBLAS. Above 64 rows cuBLAS is
    the faster for all but the largest W (of Llama 8B, gate and up in one).
    """
    return m <= 64 or n * k >= WIDE_NUMBERS


@cache
def choose(m: int, n: int, k: int, *, gated: bool) -> Gemv | Skinny:
    """Kernel and tiles for m rows of x and W [n, k]; m counts by its bucket alone. From `loadtest/results/kernels.jsonl`: for
    the shapes of Qwen3 0.6B, Llama 8B and DeepSeek-V2-Lite mostly within 6% of the best of 15 to 20, and 14% at worst.
    """
    rows = bucket(m)
    return _gemv_rule(n, k) if rows <= GEMV_ROWS else _skinny_rule(rows, n, k)


def _gemv_rule(n: int, k: int) -> Gemv:
    """All warps of a program share each row of W."""
    if k <= 4 * WARP and n >= 64 * _WAVE:
        return Gemv(rows=4, columns=WARP, parts=2, warps=4)
    if k >= 32 * WARP or n <= 16 * _WAVE:  # long rows, or few: more bytes under way in each program
        return Gemv(rows=8 if k <= 8 * WARP else 4, columns=8 * WARP, parts=1, warps=8)
    return Gemv(rows=4, columns=4 * WARP, parts=1, warps=4)


def _skinny_rule(rows: int, n: int, k: int) -> Skinny:
    if rows > 64:
        return Skinny(256, 64, 1, 8, 4)  # each program reads all of x, from the L2: the more rows of W it has, the less often
    tiles = -(-n // 64)
    splits = _splits(tiles, k)
    if rows < 64:
        return Skinny(64, 128, splits, 4, 4 if tiles >= 2 * _WAVE else 6)
    if splits > 1:
        return Skinny(64, 128, splits, 4, 4)
    return Skinny(128, 64, 1, 8, 6) if n >= 128 * _WAVE else Skinny(64, 64, 1, 4, 8)


def _splits(tiles: int, k: int) -> int:
    """A program for each multiprocessor, by splitting K where the tiles are fewer and K is long enough to pay for the sum."""
    splits = 1
    while splits < 8 and 2 * splits * tiles <= _WAVE and k >= max(2048, 384 * 2 * splits):
        splits *= 2
    return splits
