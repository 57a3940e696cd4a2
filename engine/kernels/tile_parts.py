"""Divides the keys of query tiles into parts, so that a few tiles behind a long context still fill the device.

A program attends from one tile of queries, and without parts it reads the tile's whole context alone: 16 tokens behind 30,000
took 35 ms in 32 layers, since 8 programs ran. With parts, several programs share a tile. The last of them to finish merges the
parts by their log-sum-exps ("flash-decoding": Dao et al., 2023).

A captured graph has room for as many tiles as any of its steps can have, and launches a program for each. Most have no work. So
the number of tiles with work, which the device knows, decides how many of these programs share a tile (`share`). The length of a
tile's context then decides how many of them get a part (`cut`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_PARTS = 32  # one program merges the parts of a tile, so more of them would take longer to merge than they save
MERGED_ROWS = 16  # rows that are merged at a time; more would not fit into the registers beside the kernel's own
UNROLLED = tl.constexpr(4)  # parts whose loads are in flight together


@triton.jit
def share(tiles, programs, MOST: tl.constexpr):
    """Share the programs of the grid's first dimension out to `tiles` tiles. Returns (tile, part, parts of each tile at most).

    There is no work for a program whose tile is not below `tiles`. At most `programs` programs attend if tiles are divided; the
    grid has no fewer.
    """
    program = tl.program_id(0)
    parts = programs // tl.maximum(tiles, 1)
    parts = tl.maximum(tl.minimum(parts, MOST), 1)
    return program // parts, program % parts, parts


@triton.jit
def cut(passes, most, PART: tl.constexpr):
    """Cut `passes` passes into up to `most` parts of at least PART passes. Returns (number of parts, passes of a part)."""
    of_each = tl.maximum(tl.cdiv(passes, tl.maximum(tl.minimum(most, passes // PART), 1)), 1)
    return tl.maximum(tl.cdiv(passes, of_each), 1), of_each


@triton.jit
def store_part(acc_ptr, lse_ptr, slot, acc, lse, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write the result acc [ROWS, DIM] of one part, and the rows' log-sum-exps, base 2, for `merged_rows`."""
    at = slot * ROWS + tl.arange(0, ROWS)
    tl.store(lse_ptr + at, lse)
    tl.store(acc_ptr + at[:, None] * DIM + tl.arange(0, DIM)[None, :], acc)
    tl.debug_barrier()  # all threads must have written their results before the program counts as arrived


@triton.jit
def is_last(arrived_ptr, parts):
    """Count this program as arrived. Returns whether the other `parts` - 1 programs of the tile have arrived before."""
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrived_ptr, 0)  # the next launch needs the counter at 0
    return last


@triton.jit
def merged_rows(acc_ptr, lse_ptr, slot, stride, parts, row, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Merge the rows `row` of a tile's parts, which lie at `slot`, `slot` + `stride` and so on. Returns [rows, DIM] float32.

    The loads bypass the L1 cache: other programs wrote the results, and the L1 may hold those of an older launch.
    """
    dim = tl.arange(0, DIM)
    best = tl.load(lse_ptr + slot * ROWS + row, cache_modifier=".cg")
    for part in tl.range(1, parts, loop_unroll_factor=UNROLLED):
        best = tl.maximum(best, tl.load(lse_ptr + (slot + part * stride) * ROWS + row, cache_modifier=".cg"))
    total = best * 0.0
    merged = total[:, None] + dim[None, :] * 0.0
    for part in tl.range(0, parts, loop_unroll_factor=UNROLLED):
        at = (slot + part * stride) * ROWS + row
        weight = tl.exp2(tl.load(lse_ptr + at, cache_modifier=".cg") - best)
        merged += tl.load(acc_ptr + at[:, None] * DIM + dim[None, :], cache_modifier=".cg") * weight[:, None]
        total += weight
    return merged / total[:, None]


def grid(num_tiles: int, groups: int, num_programs: int) -> tuple[int, int, int]:
    """Return (programs of the grid's first dimension, most of them that attend if tiles are divided, places for their parts).

    There are up to `num_tiles` tiles with work. Each is computed for `groups` groups of heads, by the grid's second dimension.
    About `num_programs` programs fill the device.
    """
    programs = max(1, num_programs // groups)
    return max(num_tiles, programs), programs, programs * groups


def places(num: int, rows: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for `num` parts of [rows, dim] numbers and for their log-sum-exps [num, rows], float32 each."""
    acc = torch.empty(num, rows, dim, dtype=torch.float32, device=device)
    return acc, torch.empty(num, rows, dtype=torch.float32, device=device)
