"""Causal attention of prefill chunks over a paged K/V cache: each chunk attends to its cached prefix and to itself.

grid: (tiles of queries, K/V heads); a program attends from TILE_Q tokens of one chunk, for all query heads of one K/V head.
`query_tiles.py` cuts the tiles. If there are few tiles, several programs share one, each with a part of its keys
(`tile_parts.py`). The step's own keys and values are in the cache already. All chunks of a step take one launch. Whole prompts
from 1,024 tokens on are faster with cuDNN outside CUDA graphs (`attention/long_prompts.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import tile_parts
from engine.kernels.dot import precision
from engine.kernels.hardware import processors
from engine.kernels.launch import arrivals, pdl, power_of_two
from engine.kernels.query_tiles import Tiles
from engine.kernels.softmax import LOG2_E, add_pass
from engine.kernels.tile_parts import MERGED_ROWS, MOST_PARTS, cut, is_last, merged_rows, share, store_part

TILE_ROWS = 128  # most rows of one tile; a row is a token and one of the query heads that share a K/V head
PART_KEYS = 512  # a part of a tile has at least so many keys
# Programs on each multiprocessor up to which tiles are divided. With two, 512 tokens behind 1,024 took 83 us instead of 62.
PROGRAMS = 1


@triton.jit(do_not_specialize=["max_blocks", "programs"])
def _prefill(
    q_ptr, k_ptr, v_ptr, out_ptr, tables_ptr, lens_ptr, starts_ptr, tile_query_ptr, tile_start_ptr, count_ptr,
    acc_ptr, lse_ptr, arrived_ptr, scale, max_blocks, q_stride, programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr, MERGED: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (share of a tile, kv_head) attends from TILE_Q tokens of one chunk to a part of their keys, for the GROUP query
    heads of one K/V head.

    The first passes have TILE_N keys that all of the tokens see, and need no mask. Only these passes are divided into parts: the
    last part also has the others, so every row sees a key in its first pass.
    """
    kv_head = tl.program_id(1)
    ROWS: tl.constexpr = TILE_Q * PADDED
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tiles = tl.load(count_ptr)
    tile, part, most = share(tiles, programs, MOST)
    if tile >= tiles:  # a graph launches as many programs as any of its steps can have tiles; surplus ones end here
        return
    query = tl.load(tile_query_ptr + tile)
    first = tl.load(tile_start_ptr + tile)  # the tile's first token, counted within its chunk
    begin = tl.load(starts_ptr + query)
    chunk = tl.load(starts_ptr + query + 1) - begin
    length = tl.load(lens_ptr + query)
    prefix = length - chunk
    passes = (prefix + first) // TILE_N  # all rows see all of their keys
    parts, of_each = cut(passes, most, PART)
    if part >= parts:
        return

    row = tl.arange(0, ROWS)  # rows are (token, head of the group); PADDED since a range must be a power of two
    dim = tl.arange(0, HEAD)
    offset = tl.arange(0, TILE_N)
    token = first + row // PADDED
    head = kv_head * GROUP + row % PADDED
    live = (token < chunk) & (row % PADDED < GROUP)
    at_q = (begin + token).to(tl.int64) * q_stride + head * HEAD
    q = tl.load(q_ptr + at_q[:, None] + dim[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    limit = prefix + token  # the last position that each row sees
    begin_key = part * of_each * TILE_N
    full = tl.minimum(begin_key + of_each * TILE_N, passes * TILE_N)
    end = tl.where(part == parts - 1, tl.minimum(prefix + first + TILE_Q, length), full)
    # A block's number is loaded one pass ahead: a load that depends on another load of the same pass is pipelined half as deep.
    tables_ptr += query.to(tl.int64) * max_blocks
    block = tl.load(tables_ptr + begin_key // BLOCK).to(tl.int64)
    for start in range(begin_key, full, TILE_N):
        at = ((block * BLOCK + start % BLOCK + offset) * KV_HEADS + kv_head) * HEAD
        block = tl.load(tables_ptr + (start + TILE_N) // BLOCK, mask=start + TILE_N < end, other=0).to(tl.int64)
        k = tl.load(k_ptr + at[None, :] + dim[:, None])
        score = tl.dot(q, k, input_precision=PRECISION)
        v = tl.load(v_ptr + at[:, None] + dim[None, :])
        best, total, acc = add_pass(score, v, best, total, acc, scale, PRECISION)
    for start in range(full, end, TILE_N):
        inside = start + offset < length
        at = ((block * BLOCK + start % BLOCK + offset) * KV_HEADS + kv_head) * HEAD
        block = tl.load(tables_ptr + (start + TILE_N) // BLOCK, mask=start + TILE_N < end, other=0).to(tl.int64)
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
        seen = (start + offset)[None, :] <= limit[:, None]
        score = tl.where(seen, tl.dot(q, k, input_precision=PRECISION), float("-inf"))
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
        best, total, acc = add_pass(score, v, best, total, acc, scale, PRECISION)
    acc = acc / total[:, None]
    if parts == 1:
        at_out = ((begin + token) * (KV_HEADS * GROUP) + head).to(tl.int64) * HEAD
        tl.store(out_ptr + at_out[:, None] + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
        return
    slot = tile * most * KV_HEADS + kv_head
    store_part(acc_ptr, lse_ptr, slot + part * KV_HEADS, acc, best + tl.log2(total), ROWS, HEAD)
    if is_last(arrived_ptr + tile * KV_HEADS + kv_head, parts):
        for start in range(0, tl.minimum(TILE_Q, chunk - first) * PADDED, MERGED):
            some = start + tl.arange(0, MERGED)
            merged = merged_rows(acc_ptr, lse_ptr, slot, KV_HEADS, parts, some, ROWS, HEAD)
            its_token, its_head = first + some // PADDED, kv_head * GROUP + some % PADDED
            its_live = (its_token < chunk) & (some % PADDED < GROUP)
            its_out = ((begin + its_token) * (KV_HEADS * GROUP) + its_head).to(tl.int64) * HEAD
            tl.store(out_ptr + its_out[:, None] + dim[None, :], merged.to(out_ptr.dtype.element_ty), mask=its_live[:, None])


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Return how many tokens of a chunk make one tile of `paged_prefill`."""
    return max(1, TILE_ROWS // power_of_two(heads // kv_heads))


def _stages(q: torch.Tensor) -> int:
    """Choose the number of pipeline stages of the loop's loads: as many as fit into shared memory."""
    head_bytes = q.shape[2] * q.dtype.itemsize
    return 3 if head_bytes <= 256 else (2 if q.dtype.itemsize == 2 else 1)


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    query_starts: torch.Tensor,
    tiles: Tiles,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend causally from the query tokens that `tiles` lists, and write those tokens' rows of `out` [T, heads, head_dim].

    q [T, heads, head_dim] are the step's queries, one after another. k_cache and v_cache are [num_blocks, block_size, kv_heads,
    head_dim], block_tables [B, max_blocks], kv_lens [B] and query_starts [B + 1] int32. A tile has `tile_tokens` tokens, and
    its first token is a multiple of that.
    """
    heads, head_dim = q.shape[1:]
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    tokens, padded = tile_tokens(heads, kv_heads), power_of_two(group)
    rows, tile_keys = tokens * padded, min(64, block_size)
    size, programs, num_places = tile_parts.grid(tiles.query.shape[0], kv_heads, PROGRAMS * processors(q.device))
    _prefill[(size, kv_heads)](
        q, k_cache, v_cache, out, block_tables, kv_lens, query_starts, *tiles,
        *tile_parts.places(num_places, rows, head_dim, q.device), arrivals(q.device),
        scale * LOG2_E, block_tables.stride(0), q.stride(0), programs,
        KV_HEADS=kv_heads, GROUP=group, PADDED=padded, HEAD=head_dim, BLOCK=block_size,
        TILE_Q=tokens, TILE_N=tile_keys, PART=max(1, PART_KEYS // tile_keys), MOST=MOST_PARTS, MERGED=min(MERGED_ROWS, rows),
        PRECISION=precision(q.dtype), num_warps=4 if rows <= TILE_ROWS else 8, num_stages=_stages(q), **pdl(q.device),
    )  # fmt: skip
