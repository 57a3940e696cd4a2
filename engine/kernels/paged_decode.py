"""Attention of one query token a sequence over a paged K/V cache, in Triton: split-KV with the heads of a group packed.

The cache of a sequence is cut into `num_splits` ranges, one program each, so that few sequences still fill the device;
a second kernel merges the ranges by their log-sum-exp (the "flash-decoding" scheme: Dao et al., 2023). All query heads
that share a K/V head are rows of one tile, so K and V are read once for them. The grid depends on shapes only, never on
lengths, so a captured graph stays right as sequences grow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # the kernels work with powers of two
MIN_DOT_ROWS = 16  # tl.dot wants at least this many rows


@triton.jit
def _split(
    q_ptr, k_ptr, v_ptr, tables_ptr, lens_ptr, acc_ptr, lse_ptr,
    scale, max_blocks, q_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens_ptr + seq)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD)
    offset = tl.arange(0, TILE)
    heads = KV_HEADS * GROUP
    head = kv_head * GROUP + row
    live = row < GROUP
    q = tl.load(q_ptr + seq * q_stride + head[:, None] * HEAD + dim[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    for start in range(begin, end, TILE):
        block = tl.load(tables_ptr + seq * max_blocks + start // BLOCK).to(tl.int64)
        slot = block * BLOCK + start % BLOCK + offset
        inside = start + offset < end
        at = (slot * KV_HEADS + kv_head) * HEAD
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=inside[None, :], other=0.0)  # [HEAD, TILE]
        score = tl.where(inside[None, :], tl.dot(q, k, input_precision=PRECISION) * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        p = tl.exp2(score - new_best[:, None])
        keep = tl.exp2(best - new_best)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)  # [TILE, HEAD]
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = new_best

    out = (seq * heads + head) * SPLITS + split
    empty = total == 0.0  # the sequence is too short for this split to have a part of it
    total = tl.where(empty, 1.0, total)
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), best + tl.log2(total)), mask=live)
    tl.store(acc_ptr + out[:, None] * HEAD + dim[None, :], acc / total[:, None], mask=live[:, None])


@triton.jit
def _merge(acc_ptr, lse_ptr, out_ptr, HEAD: tl.constexpr, SPLITS: tl.constexpr):
    pair = tl.program_id(0)  # sequence * heads + head
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD)
    lse = tl.load(lse_ptr + pair * SPLITS + split)
    weight = tl.exp2(lse - tl.max(lse, 0))
    acc = tl.load(acc_ptr + (pair * SPLITS + split[:, None]) * HEAD + dim[None, :])
    out = tl.sum(acc * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + pair * HEAD + dim, out.to(out_ptr.dtype.element_ty))


def precision(dtype: torch.dtype) -> str:
    """tl.dot's mode: near full precision for float32, in three passes (one of tf32 errs by 3e-4); narrower types have one."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def choose_splits(num_seqs: int, kv_heads: int, num_processors: int) -> int:
    """Splits (a power of two, at most 32) that give each processor about two programs."""
    wanted = max(1, 2 * num_processors // (num_seqs * kv_heads))
    splits: int = triton.next_power_of_2(wanted)
    return min(32, splits)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    num_splits: int,
) -> torch.Tensor:
    """Attend from q [B, heads, head_dim], each token's heads side by side, to the first kv_lens[b] tokens of each sequence.

    Returns [B, heads, head_dim]. k_cache and v_cache are [num_blocks, block_size, kv_heads, head_dim], block_tables
    [B, max_blocks] int32, kv_lens [B] int32 (each at least 1). head_dim, block_size (at least 16) and num_splits must be
    powers of two.
    """
    num_seqs, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    acc = torch.empty(num_seqs, heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_seqs, heads, num_splits, dtype=torch.float32, device=q.device)
    _split[(num_seqs, kv_heads, num_splits)](
        q, k_cache, v_cache, block_tables, kv_lens, acc, lse,
        scale * LOG2_E, block_tables.stride(0), q.stride(0),
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
        HEAD=head_dim, BLOCK=block_size, TILE=min(64, block_size), SPLITS=num_splits,
        PRECISION=precision(q.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return merge_splits(acc, lse, q.dtype)


def merge_splits(acc: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """acc [B, heads, splits, dim] float32, each split's own average; lse [B, heads, splits] base 2 -> [B, heads, dim]."""
    num_seqs, heads, splits, dim = acc.shape
    out = torch.empty(num_seqs, heads, dim, dtype=dtype, device=acc.device)
    _merge[(num_seqs * heads,)](acc, lse, out, HEAD=dim, SPLITS=splits, num_warps=max(1, dim // 128))
    return out
