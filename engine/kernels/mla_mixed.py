"""Latent attention of a whole step, decodes and prefill chunks in one launch, in a form that a CUDA graph can hold.

The kernel attends in latent space over the records of the paged KV cache, as `mla_decode.py` does. A program attends from several
tokens of one query, and each token has its own causal limit. grid: (tiles of queries, groups of heads); `query_tiles.map_tiles`
cuts the tiles on the device. Sequences are not split, since a step with long chunks has enough programs.

For a chunk, attention in latent space costs more arithmetic than attention over expanded keys (`mla_prefill.py`). But to expand
keys, the host must know the query's length and its cached part, and in a graph only the device knows them. Graphs therefore hold
smaller mixed steps with latents than with K/V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dot import MIN_DOT_ROWS, precision
from engine.kernels.launch import cdiv, pdl, power_of_two
from engine.kernels.mla_decode import score_records
from engine.kernels.softmax import LOG2_E, add_pass

ROWS = 64  # (token, head) pairs that a program attends from: the rows of Hopper's matrix instructions
TILE = 32  # cached tokens in one pass of the loop


@triton.jit(do_not_specialize=["max_blocks"])
def _attend(
    q_ptr, rope_ptr, cache_ptr, out_ptr, tables_ptr, lens_ptr, starts_ptr, tile_query_ptr, tile_start_ptr,
    scale, max_blocks, rope_token, rope_head,
    HEADS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, part) attends from ROWS rows: PART heads of each of ROWS / PART tokens of one query."""
    tile, part = tl.program_id(0), tl.program_id(1)
    RECORD: tl.constexpr = LATENT + ROPE
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, LATENT)
    rope = tl.arange(0, ROPE)
    offset = tl.arange(0, TILE)
    head = part * PART + row % PART
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    query = tl.load(tile_query_ptr + tile)
    if query < 0:  # a graph launches as many tiles as any of its steps can have; surplus ones end here
        return
    begin = tl.load(starts_ptr + query)
    chunk = tl.load(starts_ptr + query + 1) - begin
    length = tl.load(lens_ptr + query)
    token = tl.load(tile_start_ptr + tile) + row // PART  # each row's token, counted within its query
    live = (token < chunk) & (head < HEADS)
    limit = length - chunk + token  # the last position that each row sees
    end = tl.minimum(tl.max(limit, 0) + 1, length)

    at_token = (begin + token).to(tl.int64)
    at_q = (at_token * HEADS + head) * LATENT
    at_rope = at_token * rope_token + head * rope_head
    q_c = tl.load(q_ptr + at_q[:, None] + dim[None, :], mask=live[:, None], other=0.0)
    q_r = tl.load(rope_ptr + at_rope[:, None] + rope[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, LATENT], tl.float32)
    tables_ptr += query.to(tl.int64) * max_blocks
    block = tl.load(tables_ptr).to(tl.int64)  # a block's number is loaded one pass ahead; `paged_decode.py` explains why
    for start in range(0, end, TILE):
        at = (block * BLOCK + start % BLOCK + offset) * RECORD
        inside = start + offset < end
        block = tl.load(tables_ptr + (start + TILE) // BLOCK, mask=start + TILE < end, other=0).to(tl.int64)
        score, c = score_records(q_c, q_r, cache_ptr, at, inside, dim, rope, LATENT, PRECISION)
        # Every row sees position 0 in the first pass, so `best` does not stay at minus infinity.
        score = tl.where((start + offset)[None, :] <= limit[:, None], score, float("-inf"))
        best, total, acc = add_pass(score, c, best, total, acc, scale, PRECISION)
    mixed = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at_q[:, None] + dim[None, :], mixed, mask=live[:, None])


def tile_tokens(heads: int, dtype: torch.dtype) -> int:
    """Return how many tokens of a query make one tile of `mla_mixed`."""
    rows, part = _rows(heads, dtype)
    return rows // part


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
    tiles: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Attend causally from the contiguous q_latent [T, heads, latent] and q_rope [T, heads, rope] to cached records.

    Returns averaged latents [T, heads, latent]. The KV cache is [num_blocks, block_size, latent + rope]; block_tables [B,
    max_blocks], kv_lens [B] and query_starts [B + 1] are int32. `tiles` is the result of `map_tiles` with `tile_tokens` tokens a
    tile and least=1. latent, rope and block_size are powers of two.
    """
    _, heads, latent = q_latent.shape
    block_size, (rows, part) = cache.shape[1], _rows(heads, q_latent.dtype)
    out = torch.empty_like(q_latent)
    tile_query, tile_start = tiles
    _attend[(tile_query.shape[0], cdiv(heads, part))](
        q_latent, q_rope, cache, out, block_tables, kv_lens, query_starts, tile_query, tile_start,
        scale * LOG2_E, block_tables.stride(0), q_rope.stride(0), q_rope.stride(1),
        HEADS=heads, PART=part, ROWS=rows, LATENT=latent, ROPE=q_rope.shape[2],
        BLOCK=block_size, TILE=min(TILE, block_size), PRECISION=precision(q_latent.dtype),
        num_warps=8, num_stages=3 if rows == ROWS else 2, **pdl(q_latent.device),
    )  # fmt: skip
    return out
