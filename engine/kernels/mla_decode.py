"""MLA decode in latent space over a paged latent cache, in Triton: every head reads the same [latent | rope] record.

The absorbed form of DeepSeek-V2 (arXiv 2405.04434, section 2.1): scores are q_latent . c + q_rope . k_rope, and the output is
the weighted sum of c, to be expanded by the caller. The latent part is read once and used as key and value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.paged_decode import LOG2_E, MIN_DOT_ROWS, merge_splits, precision


@triton.jit
def _split(
    q_ptr, cache_ptr, tables_ptr, lens_ptr, acc_ptr, lse_ptr, scale, max_blocks,
    HEADS: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    seq, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens_ptr + seq)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    RECORD: tl.constexpr = LATENT + ROPE

    head = part * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, LATENT)
    rope = LATENT + tl.arange(0, ROPE)
    offset = tl.arange(0, TILE)
    live = head < HEADS
    q_at = (seq * HEADS + head) * RECORD
    q_c = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=live[:, None], other=0.0)
    q_r = tl.load(q_ptr + q_at[:, None] + rope[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, LATENT], tl.float32)
    for start in range(begin, end, TILE):
        block = tl.load(tables_ptr + seq * max_blocks + start // BLOCK).to(tl.int64)
        at = (block * BLOCK + start % BLOCK + offset) * RECORD
        inside = start + offset < end
        c = tl.load(cache_ptr + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)  # [TILE, LATENT]
        r = tl.load(cache_ptr + at[None, :] + rope[:, None], mask=inside[None, :], other=0.0)  # [ROPE, TILE]
        score = tl.dot(q_c, tl.trans(c), input_precision=PRECISION)
        score = tl.dot(q_r, r, score, input_precision=PRECISION) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        p = tl.exp2(score - new_best[:, None])
        keep = tl.exp2(best - new_best)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(c.dtype), c, acc * keep[:, None], input_precision=PRECISION)
        best = new_best

    out = (seq * HEADS + head) * SPLITS + split
    empty = total == 0.0  # the sequence is too short for this split to have a part of it
    total = tl.where(empty, 1.0, total)
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), best + tl.log2(total)), mask=live)
    tl.store(acc_ptr + out[:, None] * LATENT + dim[None, :], acc / total[:, None], mask=live[:, None])


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    latent: int,
    num_splits: int,
) -> torch.Tensor:
    """q [B, heads, latent + rope] over cache [num_blocks, block_size, latent + rope] -> [B, heads, latent].

    block_tables [B, max_blocks] int32 and kv_lens [B] int32, each at least 1. latent, rope and block_size are powers of two.
    """
    num_seqs, heads, record = q.shape
    block_size = cache.shape[1]
    rows = MIN_DOT_ROWS if heads <= 16 or num_seqs < 8 else 64
    acc = torch.empty(num_seqs, heads, num_splits, latent, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_seqs, heads, num_splits, dtype=torch.float32, device=q.device)
    _split[(num_seqs, triton.cdiv(heads, rows), num_splits)](
        q, cache, block_tables, kv_lens, acc, lse, scale * LOG2_E, block_tables.stride(0),
        HEADS=heads, ROWS=rows, LATENT=latent, ROPE=record - latent,
        BLOCK=block_size, TILE=min(64, block_size), SPLITS=num_splits,
        PRECISION=precision(q.dtype), num_warps=4 if rows == MIN_DOT_ROWS else 8, num_stages=2,
    )  # fmt: skip
    return merge_splits(acc, lse, q.dtype)
