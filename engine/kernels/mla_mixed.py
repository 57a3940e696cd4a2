"""Latent attention of a whole step, decodes and prefill chunks in one launch, in a form that a CUDA graph can hold.

The kernel attends in latent space over the records of the paged KV cache, as `mla_decode.py` does. A program attends from several
tokens of one query, and each token has its own causal limit. grid: (tiles of queries, groups of heads); `query_tiles.map_tiles`
cuts the tiles on the device. If there are few tiles, several programs share one, each with a part of its records
(`tile_parts.py`).

For a chunk, attention in latent space costs more arithmetic than attention over expanded keys (`mla_prefill.py`). But to expand
keys, the host must know the query's length and its cached part, and in a graph only the device knows them. Graphs therefore hold
smaller mixed steps with latents than with K/V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import tile_parts
from engine.kernels.dot import MIN_DOT_ROWS, precision
from engine.kernels.hardware import processors
from engine.kernels.launch import arrivals, cdiv, pdl, power_of_two
from engine.kernels.mla_decode import score_records
from engine.kernels.query_tiles import Tiles
from engine.kernels.softmax import LOG2_E, add_pass
from engine.kernels.tile_parts import MERGED_ROWS, MOST_PARTS, cut, is_last, merged_rows, share, store_part

ROWS = 64  # (token, head) pairs that a program attends from: the rows of Hopper's matrix instructions
TILE = 32  # cached tokens in one pass of the loop
PART_TOKENS = 256  # a part of a tile has at least so many cached tokens


@triton.jit(do_not_specialize=["max_blocks", "programs"])
def _attend(
    q_ptr, rope_ptr, cache_ptr, out_ptr, tables_ptr, lens_ptr, starts_ptr, tile_query_ptr, tile_start_ptr, count_ptr,
    acc_ptr, lse_ptr, arrived_ptr, scale, max_blocks, rope_token, rope_head, programs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr, MERGED: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (share of a tile, group) attends from ROWS rows to a part of their records: GROUP heads of each of ROWS / GROUP
    tokens of one query.

    Only passes whose records all rows see are divided into parts. The last part also has the others, so every row sees a record
    in its first pass.
    """
    group = tl.program_id(1)
    RECORD: tl.constexpr = LATENT + ROPE
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, LATENT)
    rope = tl.arange(0, ROPE)
    offset = tl.arange(0, TILE)
    head = group * GROUP + row % GROUP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles = tl.load(count_ptr)
    tile, part, most = share(tiles, programs, MOST)
    if tile >= tiles:  # a graph launches as many programs as any of its steps can have tiles; surplus ones end here
        return
    query = tl.load(tile_query_ptr + tile)
    begin = tl.load(starts_ptr + query)
    chunk = tl.load(starts_ptr + query + 1) - begin
    length = tl.load(lens_ptr + query)
    first = tl.load(tile_start_ptr + tile)
    passes = (length - chunk + first + 1) // TILE  # all rows see all of their records
    parts, of_each = cut(passes, most, PART)
    if part >= parts:
        return
    token = first + row // GROUP  # each row's token, counted within its query
    live = (token < chunk) & (head < HEADS)
    limit = length - chunk + token  # the last position that each row sees
    begin_record = part * of_each * TILE
    end = tl.minimum(tl.max(limit, 0) + 1, length)
    end = tl.where(part == parts - 1, end, begin_record + of_each * TILE)

    at_token = (begin + token).to(tl.int64)
    at_q = (at_token * HEADS + head) * LATENT
    at_rope = at_token * rope_token + head * rope_head
    q_c = tl.load(q_ptr + at_q[:, None] + dim[None, :], mask=live[:, None], other=0.0)
    q_r = tl.load(rope_ptr + at_rope[:, None] + rope[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, LATENT], tl.float32)
    tables_ptr += query.to(tl.int64) * max_blocks
    # A block's number is loaded one pass ahead; `paged_decode.py` explains why.
    block = tl.load(tables_ptr + begin_record // BLOCK).to(tl.int64)
    for start in range(begin_record, end, TILE):
        at = (block * BLOCK + start % BLOCK + offset) * RECORD
        inside = start + offset < end
        block = tl.load(tables_ptr + (start + TILE) // BLOCK, mask=start + TILE < end, other=0).to(tl.int64)
        score, c = score_records(q_c, q_r, cache_ptr, at, inside, dim, rope, LATENT, PRECISION)
        score = tl.where((start + offset)[None, :] <= limit[:, None], score, float("-inf"))
        best, total, acc = add_pass(score, c, best, total, acc, scale, PRECISION)
    acc = acc / total[:, None]
    if parts == 1:
        tl.store(out_ptr + at_q[:, None] + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
        return
    groups = tl.num_programs(1)
    slot = tile * most * groups + group
    store_part(acc_ptr, lse_ptr, slot + part * groups, acc, best + tl.log2(total), ROWS, LATENT)
    if is_last(arrived_ptr + tile * groups + group, parts):
        for start in range(0, tl.minimum(ROWS, (chunk - first) * GROUP), MERGED):
            some = start + tl.arange(0, MERGED)
            merged = merged_rows(acc_ptr, lse_ptr, slot, groups, parts, some, ROWS, LATENT)
            its_token, its_head = first + some // GROUP, group * GROUP + some % GROUP
            its_live = (its_token < chunk) & (its_head < HEADS)
            its_out = ((begin + its_token).to(tl.int64) * HEADS + its_head) * LATENT
            tl.store(out_ptr + its_out[:, None] + dim[None, :], merged.to(out_ptr.dtype.element_ty), mask=its_live[:, None])


def tile_tokens(heads: int, dtype: torch.dtype) -> int:
    """Return how many tokens of a query make one tile of `mla_mixed`."""
    rows, group = _rows(heads, dtype)
    return rows // group


def _rows(heads: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (rows of a program, heads of a program). A row is a (token, head) pair. In float32 fewer rows fit into shared
    memory."""
    rows = ROWS if dtype.itemsize == 2 else MIN_DOT_ROWS
    return rows, min(rows, max(MIN_DOT_ROWS, power_of_two(heads)))


def mla_mixed(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    query_starts: torch.Tensor,
    tiles: Tiles,
    scale: float,
) -> torch.Tensor:
    """Attend causally from the contiguous q_latent [T, heads, latent] and q_rope [T, heads, rope] to cached records.

    Returns averaged latents [T, heads, latent]. The KV cache is [num_blocks, block_size, latent + rope]; block_tables [B,
    max_blocks], kv_lens [B] and query_starts [B + 1] are int32. `tiles` is the result of `map_tiles` with `tile_tokens` tokens a
    tile and least=1. latent, rope and block_size are powers of two.
    """
    _, heads, latent = q_latent.shape
    block_size, (rows, group) = cache.shape[1], _rows(heads, q_latent.dtype)
    out, groups, tile_records = torch.empty_like(q_latent), cdiv(heads, group), min(TILE, block_size)
    size, programs, num_places = tile_parts.grid(tiles.query.shape[0], groups, processors(q_latent.device))
    _attend[(size, groups)](
        q_latent, q_rope, cache, out, block_tables, kv_lens, query_starts, *tiles,
        *tile_parts.places(num_places, rows, latent, q_latent.device), arrivals(q_latent.device),
        scale * LOG2_E, block_tables.stride(0), q_rope.stride(0), q_rope.stride(1), programs,
        HEADS=heads, GROUP=group, ROWS=rows, LATENT=latent, ROPE=q_rope.shape[2],
        BLOCK=block_size, TILE=tile_records, PART=max(1, PART_TOKENS // tile_records), MOST=MOST_PARTS, MERGED=MERGED_ROWS,
        PRECISION=precision(q_latent.dtype),
        num_warps=8, num_stages=3 if rows == ROWS else 2, **pdl(q_latent.device),
    )  # fmt: skip
    return out
