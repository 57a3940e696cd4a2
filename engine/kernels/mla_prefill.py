"""Causal latent attention of prefill chunks over expanded latents. One launch handles all chunks of a step.

A key has two parts: [nope], which a matrix product expands for each head, and [rope], which all heads share. The score is q_nope
. k_nope + q_rope . k_rope. Values are expanded for each head too. grid: (heads, tiles of queries); a program attends from TILE_Q
tokens of one chunk, for one head. `query_tiles.cut_tiles` cuts the tiles. In a layer of DeepSeek-V2-Lite, 16 prompts of 512
tokens take 112 us, and the expansion another 61 us (docs/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.dot import MIN_DOT_ROWS, precision
from engine.kernels.launch import power_of_two
from engine.kernels.softmax import LOG2_E, add_pass


class Tile(NamedTuple):
    """The query tokens of one program of `mla_prefill`, and the keys that a program reads in one pass of its loop."""

    queries: int  # query tokens of one program
    keys: int  # keys in one pass of the loop
    num_warps: int
    num_stages: int


TILE = Tile(128, 64, 8, 3)
TILE_FLOAT32 = Tile(32, 32, 4, 1)  # smaller: float32 numbers take twice the shared memory, and their products three passes


@triton.jit
def _step(
    q_n, q_r, best, total, acc, expanded_ptr, rope_ptr, expanded_stride, rope_stride, start, length, limit, scale,
    dim, rope, v_dim, offset, NOPE: tl.constexpr, NOPE_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of one pass. EDGE: some token must not see all of these keys, or they go past the sequence's end."""
    at = start + offset
    row = at.to(tl.int64)
    n_ptr = expanded_ptr + row[None, :] * expanded_stride + dim[:, None]
    r_ptr = rope_ptr + row[None, :] * rope_stride + rope[:, None]
    v_ptr = expanded_ptr + row[:, None] * expanded_stride + NOPE + v_dim[None, :]
    inside = at < length
    n_mask = inside[None, :] & (dim < NOPE)[:, None]
    k_n = tl.load(n_ptr, mask=n_mask, other=0.0) if EDGE or NOPE != NOPE_PADDED else tl.load(n_ptr)
    k_r = tl.load(r_ptr, mask=inside[None, :], other=0.0) if EDGE else tl.load(r_ptr)
    score = tl.dot(q_n, k_n, input_precision=PRECISION)
    score = tl.dot(q_r, k_r, score, input_precision=PRECISION)
    if EDGE:
        score = tl.where(at[None, :] <= limit[:, None], score, float("-inf"))
    v_mask = inside[:, None] & (v_dim < V)[None, :]
    v = tl.load(v_ptr, mask=v_mask, other=0.0) if EDGE or V != V_PADDED else tl.load(v_ptr)
    return add_pass(score, v, best, total, acc, scale, PRECISION)


@triton.jit
def _prefill(
    q_ptr, expanded_ptr, rope_ptr, out_ptr, starts_ptr, lens_ptr, tile_query_ptr, tile_start_ptr, tile_key_ptr,
    scale, q_stride, rope_stride,
    HEADS: tl.constexpr, NOPE: tl.constexpr, NOPE_PADDED: tl.constexpr, ROPE: tl.constexpr,
    V: tl.constexpr, V_PADDED: tl.constexpr, TILE_Q: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (head, tile) attends from TILE_Q tokens of one chunk, for one head, in passes of TILE_N keys.

    The first passes have keys that all of the tokens see, and need no mask.
    """
    head, tile = tl.program_id(0), tl.program_id(1)
    query = tl.load(tile_query_ptr + tile)
    if query < 0:
        return
    first = tl.load(tile_start_ptr + tile)  # the tile's first token, counted within its chunk
    key = tl.load(tile_key_ptr + tile).to(tl.int64)  # the row of `expanded` that holds the chunk's first key
    begin = tl.load(starts_ptr + query)
    chunk = tl.load(starts_ptr + query + 1) - begin
    length = tl.load(lens_ptr + query)
    prefix = length - chunk
    expanded_ptr += key * (HEADS * (NOPE + V)) + head * (NOPE + V)
    rope_ptr += key * rope_stride

    token = first + tl.arange(0, TILE_Q)
    dim = tl.arange(0, NOPE_PADDED)
    rope = tl.arange(0, ROPE)
    v_dim = tl.arange(0, V_PADDED)
    offset = tl.arange(0, TILE_N)
    live = token < chunk
    at_q = (begin + token).to(tl.int64) * q_stride + head * (NOPE + ROPE)
    known = live[:, None] & (dim < NOPE)[None, :]
    q_n = tl.load(q_ptr + at_q[:, None] + dim[None, :], mask=known, other=0.0)
    q_r = tl.load(q_ptr + at_q[:, None] + NOPE + rope[None, :], mask=live[:, None], other=0.0)

    best = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, V_PADDED], tl.float32)
    limit = prefix + token  # the last position that each token sees
    full = (prefix + first) // TILE_N * TILE_N  # all tokens see all positions below this one
    end = tl.minimum(prefix + first + TILE_Q, length)
    for start in range(0, full, TILE_N):
        best, total, acc = _step(
            q_n, q_r, best, total, acc, expanded_ptr, rope_ptr, HEADS * (NOPE + V), rope_stride, start, length, limit, scale,
            dim, rope, v_dim, offset, NOPE, NOPE_PADDED, V, V_PADDED, False, PRECISION,
        )  # fmt: skip
    for start in range(full, end, TILE_N):
        best, total, acc = _step(
            q_n, q_r, best, total, acc, expanded_ptr, rope_ptr, HEADS * (NOPE + V), rope_stride, start, length, limit, scale,
            dim, rope, v_dim, offset, NOPE, NOPE_PADDED, V, V_PADDED, True, PRECISION,
        )  # fmt: skip
    out = acc / total[:, None]
    at_out = ((begin + token).to(tl.int64) * HEADS + head) * V
    inside = live[:, None] & (v_dim < V)[None, :]
    tl.store(out_ptr + at_out[:, None] + v_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def choose_tile(dtype: torch.dtype) -> Tile:
    """Choose the tile for queries of `dtype`. The caller cuts the queries of `mla_prefill` into tiles of `queries` tokens."""
    return TILE_FLOAT32 if dtype == torch.float32 else TILE


def mla_prefill(
    out: torch.Tensor,
    q: torch.Tensor,
    expanded: torch.Tensor,
    k_rope: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    tile: Tile,
) -> None:
    """Attend causally from the query tokens that `tiles` lists, and write those tokens' rows of `out` [T, heads, v_dim].

    q [T, heads, nope + rope] are the step's queries, with a token's heads adjacent. expanded [L, heads, nope + v_dim],
    contiguous, and k_rope [L, rope] are the keys and values of whole sequences, one after another. query_starts [B + 1] int32 are
    the queries' first tokens, and kv_lens [B] int32 the lengths of their sequences. tiles [3, N] int32 has one column a program:
    query (-1: no work), first token within the query, and the row of `expanded` that holds the query's first key.
    """
    heads, v_dim = out.shape[1:]
    rope = k_rope.shape[1]
    nope = q.shape[2] - rope
    _prefill[(heads, tiles.shape[1])](
        q, expanded, k_rope, out, query_starts, kv_lens, tiles[0], tiles[1], tiles[2],
        scale * LOG2_E, q.stride(0), k_rope.stride(0),
        HEADS=heads, NOPE=nope, NOPE_PADDED=max(MIN_DOT_ROWS, power_of_two(nope)), ROPE=rope,
        V=v_dim, V_PADDED=max(MIN_DOT_ROWS, power_of_two(v_dim)), TILE_Q=tile.queries, TILE_N=tile.keys,
        PRECISION=precision(q.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
