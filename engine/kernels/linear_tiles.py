"""Rules that choose the kernel and tiles of a product y = x W^T by its shape. The rules fit measurements on one H200."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

GEMV_ROWS = 2  # most rows of x for which `gemv.py` is used; from 3 rows on tensor cores are faster
BUCKETS = (1, GEMV_ROWS, 16, 32, 64, 128)
MAX_ROWS = BUCKETS[-1]
MOST_NORMED = 16 << 20  # the product of a single row of x also norms that row if W has fewer numbers than this
WIDE_NUMBERS = 100 << 20  # with 65 to 128 rows our kernel is used if W has at least this many numbers
WARP = 256  # bfloat16 numbers that one load of a warp reads: 32 threads x 16 bytes

_WAVE = 132  # multiprocessors of a Hopper GPU


class Gemv(NamedTuple):
    """The part of W that one program of `gemv.py` reads, and how it reads it."""

    rows: int  # rows of W that one program reads
    columns: int  # numbers of a row of W in one load: 256 for each warp that shares the row
    parts: int  # loads of a row that are in flight together; 1 is best if all warps share a row
    warps: int


class Skinny(NamedTuple):
    """The part of W that one program of `skinny.py` reads, and how it reads it."""

    rows: int  # rows of W that one program reads; the wide tensor-core instructions of Hopper need at least 64
    columns: int  # numbers of a row of W that a program reads in one pass of its loop
    splits: int  # parts into which K is cut; each part has its own program
    warps: int
    stages: int  # pipeline stages: loads of this many passes, less one, are in flight


def bucket(num_rows: int) -> int:
    """Round `num_rows`, which is at most MAX_ROWS, up to the next of BUCKETS."""
    return next(most for most in BUCKETS if num_rows <= most)


def is_ours(m: int, n: int, k: int) -> bool:
    """Whether our kernels are faster than cuBLAS for m rows of x (at most MAX_ROWS) and W [n, k].

    With more than 64 rows cuBLAS is faster for all but the largest W, such as gate and up of Llama 8B in one matrix.
    """
    return m <= 64 or n * k >= WIDE_NUMBERS


@cache
def choose(m: int, n: int, k: int, *, gated: bool) -> Gemv | Skinny:
    """Choose kernel and tiles for the product of m rows of x with W [n, k]. Only the bucket of m counts.

    The rules fit `loadtest/results/kernels.jsonl`. For the shapes of Qwen3 0.6B, Llama 8B and DeepSeek-V2-Lite the chosen tiles
    are mostly within 6%, and at worst 14%, of the best of 15 to 20 measured ones.
    """
    rows = bucket(m)
    return _gemv_rule(n, k) if rows <= GEMV_ROWS else _skinny_rule(rows, n, k)


def _gemv_rule(n: int, k: int) -> Gemv:
    """Choose the tiles of `gemv.py` for W [n, k]. In all rules but the first, all warps of a program share each row of W."""
    if k <= 4 * WARP and n >= 64 * _WAVE:
        return Gemv(rows=4, columns=WARP, parts=2, warps=4)
    if k >= 32 * WARP or n <= 16 * _WAVE:  # with long or few rows of W, each program keeps more bytes in flight
        return Gemv(rows=8 if k <= 8 * WARP else 4, columns=8 * WARP, parts=1, warps=8)
    return Gemv(rows=4, columns=4 * WARP, parts=1, warps=4)


def _skinny_rule(rows: int, n: int, k: int) -> Skinny:
    if rows > 64:
        # Each program reads all of x from the L2 cache. With more rows of W for each program, x is read less often.
        return Skinny(256, 64, 1, 8, 4)
    tiles = -(-n // 64)
    splits = _splits(tiles, k)
    if rows < 64:
        return Skinny(64, 128, splits, 4, 4 if tiles >= 2 * _WAVE else 6)
    if splits > 1:
        return Skinny(64, 128, splits, 4, 4)
    return Skinny(128, 64, 1, 8, 6) if n >= 128 * _WAVE else Skinny(64, 64, 1, 4, 8)


def _splits(tiles: int, k: int) -> int:
    """Choose into how many parts to cut K, a power of two up to 8, so that there is up to one program a multiprocessor.

    K is cut only if it is long enough to repay adding up the parts.
    """
    splits = 1
    while splits < 8 and 2 * splits * tiles <= _WAVE and k >= max(2048, 384 * 2 * splits):
        splits *= 2
    return splits
