"""Causal attention of prompt chunks over a paged K/V cache, in Triton: every chunk attends its cached prefix and itself.

A program takes TILE_Q tokens of one chunk and the query heads of one K/V head; `tile_query` and `tile_start` say which.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two
from engine.kernels.paged_decode import LOG2_E, precision
from engine.kernels.softmax import add_pass

TILE_ROWS = 128  # (token, head of the group) pairs of one tile


@triton.jit(do_not_specialize=["max_blocks"])
def _prefill(
    q_ptr, k_ptr, v_ptr, out_ptr, tables_ptr, lens_ptr, starts_ptr, tile_query_ptr, tile_start_ptr,
    scale, max_blocks, q_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    query = tl.load(tile_query_ptr + tile)
    if query < 0:  # a graph has programs for more tiles than most steps have
        return
    first = tl.load(tile_start_ptr + tile)  # first token of the tile within its chunk
    begin = tl.load(starts_ptr + query)
    chunk = tl.load(starts_ptr + query + 1) - begin
    length = tl.load(lens_ptr + query)
    prefix = length - chunk

    row = tl.arange(0, TILE_Q * PADDED)  # rows are (token, head of the group); a range must be a power of two
    dim = tl.arange(0, HEAD)
    offset = tl.arange(0, TILE_N)
    token = first + row // PADDED
    head = kv_head * GROUP + row % PADDED
    live = (token < chunk) & (row % PADDED < GROUP)
    at_q = (begin + token).to(tl.int64) * q_stride + head * HEAD
    q = tl.load(q_ptr + at_q[:, None] + dim[None, :], mask=live[:, None], other=0.0)

    best = tl.full([TILE_Q * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q * PADDED], tl.float32)
    acc = tl.zeros([TILE_Q * PADDED, HEAD], tl.float32)
    limit = prefix + token  # last position a row may see
    full = (prefix + first) // TILE_N * TILE_N  # below it every row sees every position
    end = tl.minimum(prefix + first + TILE_Q, length)
    # A block's number is fetched a pass ahead: loads that depend on one of the same pass are pipelined half as deep.
    tables_ptr += query.to(tl.int64) * max_blocks
    block = tl.load(tables_ptr).to(tl.int64)
    for start in range(0, full, TILE_N):
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
    out = acc / total[:, None]
    at_out = ((begin + token) * (KV_HEADS * GROUP) + head).to(tl.int64) * HEAD
    tl.store(out_ptr + at_out[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["num_queries", "num_tiles"])
def _map_tiles(
    starts_ptr, tile_query_ptr, tile_start_ptr, num_queries, num_tiles,
    LEAST: tl.constexpr, TILE_Q: tl.constexpr, QUERIES: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0)
    query = tl.arange(0, QUERIES)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inside = query < num_queries
    tokens = tl.load(starts_ptr + query + 1, mask=inside, other=0) - tl.load(starts_ptr + query, mask=inside, other=0)
    tiles = tl.where(tokens >= LEAST, tl.cdiv(tokens, TILE_Q), 0)
    before = tl.sum(tl.where(query < mine, tiles, 0), 0)
    own = tl.sum(tl.where(query == mine, tiles, 0), 0)
    i = tl.arange(0, TILES)
    tl.store(tile_query_ptr + before + i, mine, mask=i < own)
    tl.store(tile_start_ptr + before + i, (own - 1 - i) * TILE_Q, mask=i < own)  # those with most work first
    if mine == 0:
        surplus = (i >= tl.sum(tiles, 0)) & (i < num_tiles)
        tl.store(tile_query_ptr + i, -1, mask=surplus)


def map_tiles(query_starts: torch.Tensor, num_tokens: int, tile_q: int, *, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`tiles` for `paged_prefill`, made on the device, of the queries of at least `least` tokens.

    There are as many as `num_tokens` tokens can need; the surplus ones have query -1.
    """
    num_queries = query_starts.shape[0] - 1
    num_tiles = cdiv(num_tokens // tile_q + min(num_queries, num_tokens // least), 4) * 4  # rows begin on 16 bytes
    tile_query, tile_start = torch.empty(2, num_tiles, dtype=torch.int32, device=query_starts.device)
    _map_tiles[(num_queries,)](
        query_starts, tile_query, tile_start, num_queries, num_tiles,
        LEAST=least, TILE_Q=tile_q, QUERIES=power_of_two(num_queries), TILES=power_of_two(num_tiles),
        num_warps=4,
        **pdl(query_starts.device),
    )  # fmt: skip
    return tile_query, tile_start


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a chunk in one tile; `tiles` of `paged_prefill` must be cut so."""
    return max(1, TILE_ROWS // power_of_two(heads // kv_heads))


def _stages(q: torch.Tensor) -> int:
    """Of the loop's loads: as many as fit into shared memory."""
    head_bytes = q.shape[2] * q.dtype.itemsize
    return 3 if head_bytes <= 256 else (2 if q.dtype.itemsize == 2 else 1)


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    query_starts: torch.Tensor,
    tiles: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from q [T, heads, head_dim], chunks laid end to end, each over its sequence up to itself, into `out`, like q.

    The cache and tables are as in `paged_decode`; query_starts [B + 1] int32. `tiles` are two int32 tensors, one entry a
    program: a query (-1: nothing to do), and the first of its tokens, a multiple of `tile_tokens`, that the program takes.
    """
    heads, head_dim = q.shape[1:]
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    tokens, padded = tile_tokens(heads, kv_heads), power_of_two(group)
    tile_query, tile_start = tiles
    _prefill[(tile_query.shape[0], kv_heads)](
        q, k_cache, v_cache, out, block_tables, kv_lens, query_starts, tile_query, tile_start,
        scale * LOG2_E, block_tables.stride(0), q.stride(0),
        KV_HEADS=kv_heads, GROUP=group, PADDED=padded, HEAD=head_dim, BLOCK=block_size,
        TILE_Q=tokens, TILE_N=min(64, block_size),
        PRECISION=precision(q.dtype), num_warps=4 if tokens * padded <= TILE_ROWS else 8, num_stages=_stages(q), **pdl(q.device),
    )  # fmt: skip
