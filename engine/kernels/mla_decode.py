"""Latent attention of decodes, one query token a sequence, over a paged KV cache of records [latent | rope].

This is the absorbed form of DeepSeek-V2 (arXiv 2405.04434, section 2.1): score = q_latent . latent + q_rope . rope, and the
output is the weighted average of the latents, which `latent_products.expand` or `merge_expand` turns into values. All heads share
one record, and its latent part is read once and serves as key and as value.

grid: (splits, groups of heads, sequences); a program attends from ROWS heads of one sequence to one split of its tokens. Shapes
alone decide the grid, so a captured graph stays valid as sequences grow. `merge` combines the splits in a second launch: with
the last program merging instead, 16 x 300 tokens took 14.3 us against 8.7 (docs/gpu.md). The scheduler puts the longest
sequences first, since programs start in the order of their sequences and a long one that starts last would run alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.dot import MIN_DOT_ROWS, precision
from engine.kernels.hardware import shared_memory
from engine.kernels.launch import cdiv, pdl, power_of_two
from engine.kernels.softmax import LOG2_E, add_pass

MANY_ROWS = 64  # heads of one program if there are many: the rows of Hopper's matrix instructions
FEW_SEQUENCES = 8  # with fewer sequences, a program takes MIN_DOT_ROWS heads, which gives more programs
MANY_SEQUENCES = 16  # from this many sequences on, a split has enough tokens for passes of 64 tokens
LARGE_PASS_MEMORY = 216 << 10  # passes of 64 tokens need at most this many bytes of shared memory; a Hopper GPU has them
MAX_SPLITS = 16  # most splits of a sequence that is not alone in its step
ALONE_SPLITS = 64  # most splits of a sequence that is alone in its step


class Tile(NamedTuple):
    """The heads of one program of `mla_decode`, and the cached tokens that a program reads in one pass of its loop."""

    rows: int  # heads of one program
    tokens: int  # cached tokens in one pass of the loop; at most a KV block
    num_warps: int
    num_stages: int


@triton.jit
def score_records(q_c, q_r, cache_ptr, at, inside, dim, rope, LATENT: tl.constexpr, PRECISION: tl.constexpr):
    """Load the TILE records at offsets `at`, and score them: q_c . latent + q_r . rope.

    Returns (scores [ROWS, TILE], latents [TILE, LATENT]). Records where `inside` is false are read as zeros, and the caller must
    mask their scores.
    """
    c = tl.load(cache_ptr + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)  # [TILE, LATENT]
    r = tl.load(cache_ptr + at[None, :] + LATENT + rope[:, None], mask=inside[None, :], other=0.0)  # [ROPE, TILE]
    score = tl.dot(q_c, tl.trans(c), input_precision=PRECISION)
    return tl.dot(q_r, r, score, input_precision=PRECISION), c


@triton.jit(do_not_specialize=["max_blocks"])
def _split(
    q_ptr, rope_ptr, cache_ptr, tables_ptr, lens_ptr, out_ptr, lse_ptr, scale, max_blocks, rope_token, rope_head,
    HEADS: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, group, sequence) attends from one group of ROWS heads to one split of a sequence, TILE tokens at a time.

    With one split the averaged latents are written in the queries' type. Otherwise they are written in float32, with their
    log-sum-exp.
    """
    split, part, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    RECORD: tl.constexpr = LATENT + ROPE
    head = part * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, LATENT)
    rope = tl.arange(0, ROPE)
    offset = tl.arange(0, TILE)
    live = head < HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    length = tl.load(lens_ptr + seq)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    pair = seq * HEADS + head
    at_rope = seq * rope_token + head * rope_head
    q_c = tl.load(q_ptr + pair[:, None] * LATENT + dim[None, :], mask=live[:, None], other=0.0)
    q_r = tl.load(rope_ptr + at_rope[:, None] + rope[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, LATENT], tl.float32)
    # A block's number is loaded one pass ahead: a load that depends on another load of the same pass is pipelined half as deep.
    tables_ptr += seq * max_blocks
    block = tl.load(tables_ptr + begin // BLOCK, mask=begin < end, other=0).to(tl.int64)
    for start in range(begin, end, TILE):
        at = (block * BLOCK + start % BLOCK + offset) * RECORD
        inside = start + offset < end
        block = tl.load(tables_ptr + (start + TILE) // BLOCK, mask=start + TILE < end, other=0).to(tl.int64)
        score, c = score_records(q_c, q_r, cache_ptr, at, inside, dim, rope, LATENT, PRECISION)
        score = tl.where(inside[None, :], score, float("-inf"))
        best, total, acc = add_pass(score, c, best, total, acc, scale, PRECISION)

    if SPLITS == 1:
        mixed = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + pair[:, None] * LATENT + dim[None, :], mixed, mask=live[:, None])
    else:
        # A sequence may be too short for this split. Then the program writes only a log-sum-exp of minus infinity.
        at_out = pair * SPLITS + split
        empty = begin >= end
        total = tl.where(empty, 1.0, total)
        tl.store(lse_ptr + at_out, tl.where(empty, float("-inf"), best + tl.log2(total)), mask=live)
        if begin < end:
            tl.store(out_ptr + at_out[:, None] * LATENT + dim[None, :], acc / total[:, None], mask=live[:, None])


class Parts(NamedTuple):
    """The attention result of each split of each sequence."""

    latents: torch.Tensor  # [B, heads, splits, latent]: averaged latents; float32, or with one split the queries' type
    lse: torch.Tensor  # [B, heads, splits] float32: log-sum-exp of the scores, base 2; not written if there is one split
    # An empty split has a log-sum-exp of minus infinity, and its latents are not written.


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    num_splits: int,
) -> Parts:
    """Attend from q_latent [B, heads, latent], contiguous, and q_rope [B, heads, rope] to each sequence's cached records.

    The KV cache is [num_blocks, block_size, latent + rope], block_tables [B, max_blocks] int32; kv_lens [B] int32 are at least 1.
    latent, rope, block_size and num_splits are powers of two. `merge` or `latent_products.merge_expand` combines the result.
    """
    (num_seqs, heads, latent), device = q_latent.shape, q_latent.device
    block_size = cache.shape[1]
    tile = decode_tile(num_seqs, heads, q_latent.dtype, block_size, device)
    dtype = q_latent.dtype if num_splits == 1 else torch.float32
    parts = Parts(
        torch.empty(num_seqs, heads, num_splits, latent, dtype=dtype, device=device),
        torch.empty(num_seqs, heads, num_splits, dtype=torch.float32, device=device),
    )
    _split[(num_splits, cdiv(heads, tile.rows), num_seqs)](
        q_latent, q_rope, cache, block_tables, kv_lens, *parts,
        scale * LOG2_E, block_tables.stride(0), q_rope.stride(0), q_rope.stride(1),
        HEADS=heads, ROWS=tile.rows, LATENT=latent, ROPE=q_rope.shape[2],
        BLOCK=block_size, TILE=tile.tokens, SPLITS=num_splits,
        PRECISION=precision(q_latent.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages, **pdl(device),
    )  # fmt: skip
    return parts


def merge(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Combine the splits of each sequence -> averaged latents [B, heads, latent] in `dtype`. grid: (B * heads,)."""
    num_seqs, heads, splits, latent = parts.latents.shape
    if splits == 1:
        return parts.latents.squeeze(2)
    out = torch.empty(num_seqs, heads, latent, dtype=dtype, device=parts.lse.device)
    _merge[(num_seqs * heads,)](*parts, out, LATENT=latent, SPLITS=splits, num_warps=8 if splits > 8 else 4, **pdl(out.device))
    return out


@triton.jit
def _merge(parts_ptr, lse_ptr, out_ptr, LATENT: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
    """Program (pair,) computes the weighted average of the splits of one sequence and head."""
    pair = tl.program_id(0).to(tl.int64)  # the index sequence * heads + head
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, LATENT)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lse = tl.load(lse_ptr + pair * SPLITS + split)
    weight = tl.exp2(lse - tl.max(lse, 0))
    used = weight > 0.0  # an empty split has written no latents
    parts = tl.load(parts_ptr + (pair * SPLITS + split[:, None]) * LATENT + dim[None, :], mask=used[:, None], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + pair * LATENT + dim, out.to(out_ptr.dtype.element_ty))


def decode_tile(num_seqs: int, heads: int, dtype: torch.dtype, block_size: int, device: torch.device) -> Tile:
    """Choose the tile of `mla_decode` for a batch. docs/gpu.md has the measurements.

    One program a multiprocessor, whose loads fill the shared memory, is faster than two programs with smaller passes.
    """
    if is_alone(num_seqs, heads):
        return Tile(MIN_DOT_ROWS, min(32, block_size), 4, 2)
    rows = _rows(num_seqs, heads, dtype)
    if dtype != torch.float32 and block_size >= 64 and shared_memory(device) >= LARGE_PASS_MEMORY:
        if rows == MANY_ROWS:
            return Tile(rows, 64, 8, 2)
        if num_seqs >= MANY_SEQUENCES:
            return Tile(rows, 64, 4, 3)
    return Tile(rows, min(32, block_size), 8 if rows == MANY_ROWS else 4, 3)


def _rows(num_seqs: int, heads: int, dtype: torch.dtype) -> int:
    """Choose the number of heads of one program. In float32 no more than MIN_DOT_ROWS heads fit into shared memory."""
    return MIN_DOT_ROWS if heads <= MIN_DOT_ROWS or num_seqs < FEW_SEQUENCES or dtype == torch.float32 else MANY_ROWS


def is_alone(num_seqs: int, heads: int) -> bool:
    """Whether the step is a decode of one sequence with few heads, which a single program would compute if it were not split.

    Only splits fill the device in this case, and `latent_products.merge_expand` is the fastest way to merge them.
    """
    return num_seqs == 1 and heads <= MIN_DOT_ROWS


def decode_splits(num_seqs: int, heads: int, num_processors: int, dtype: torch.dtype) -> int:
    """Choose the number of splits of a sequence, so that each multiprocessor has about one program.

    The number is a power of two, at most 16, or 64 for a sequence that is alone. If one program takes all heads of a sequence,
    and there are no more sequences than multiprocessors, it is at least 2: lengths differ, and without splits the device would
    wait for the longest sequence.
    """
    programs = num_seqs * cdiv(heads, _rows(num_seqs, heads, dtype))
    least = 2 if heads <= MIN_DOT_ROWS and programs <= num_processors else 1
    most = ALONE_SPLITS if is_alone(num_seqs, heads) else MAX_SPLITS
    return min(most, power_of_two(max(least, num_processors // programs)))
