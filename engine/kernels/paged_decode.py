"""Attention of decodes, one query token a sequence, over a paged K/V cache. Sequences are cut into parts that are merged.

grid: (parts, K/V heads, sequences); a program attends from all query heads of one K/V head to one part of one sequence, so K
and V are read once for the group. A sequence is cut into up to `num_splits` parts, so that few sequences still fill the device.
The last program of a sequence and K/V head to finish merges the parts by their log-sum-exps ("flash-decoding": Dao et al.,
2023). A short sequence has fewer parts, and its surplus programs end at once.

Shapes alone decide the grid, so a captured graph stays valid as sequences grow. Programs start in the order of their sequences;
the scheduler puts the longest first, since a long one that starts last would run alone. docs/gpu.md has the measurements behind
the constants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dot import MIN_DOT_ROWS, precision
from engine.kernels.hardware import processors
from engine.kernels.launch import arrivals, pdl, power_of_two
from engine.kernels.softmax import LOG2_E, add_pass

MANY_PROGRAMS = 512  # with more (sequence, K/V head) pairs than this, a decode that is not split has three stages of loads
# The key is `num_splits`, and the value a number of tokens: a sequence has at most one part for each started group of so many
# tokens. With any other `num_splits` it has at most one part for each pass of the loop. A part is a whole number of passes, and
# parts are as even as that allows.
PART_TOKENS = {2: 512, 4: 128}


@triton.jit
def _merge(acc_ptr, lse_ptr, out_ptr, pair, parts, HEAD: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the results of the `parts` parts of one sequence, for one head, and write the head's output.

    The loads bypass the L1 cache: other programs wrote the results, and the L1 may hold those of an older launch.
    """
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD)
    written = split < parts
    lse = tl.load(lse_ptr + pair * SPLITS + split, mask=written, other=float("-inf"), cache_modifier=".cg")
    weight = tl.exp2(lse - tl.max(lse, 0))
    at = acc_ptr + (pair * SPLITS + split[:, None]) * HEAD + dim[None, :]
    part = tl.load(at, mask=written[:, None], other=0.0, cache_modifier=".cg")
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + dim, merged.to(out_ptr.dtype.element_ty))


@triton.jit
def _cut(length, SPLITS: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr):
    """Cut a sequence of `length` tokens into up to SPLITS parts, at most one for each started group of PART passes.

    Returns (number of parts, tokens of every part but the last).
    """
    passes = tl.cdiv(length, TILE)
    of_each = tl.cdiv(passes, tl.minimum(SPLITS, tl.cdiv(passes, PART)))
    return tl.cdiv(passes, of_each), of_each * TILE


@triton.jit(do_not_specialize=["max_blocks"])
def _decode(
    q_ptr, k_ptr, v_ptr, out_ptr, tables_ptr, lens_ptr, starts_ptr, acc_ptr, lse_ptr, arrived_ptr,
    scale, max_blocks, q_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr, BY_LENGTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, kv_head, sequence) attends from the GROUP query heads of one K/V head to one part of a sequence.

    ROWS is GROUP padded for `tl.dot`. With BY_LENGTH, only queries of one token are computed; starts_ptr tells which these are.
    The last program of a sequence and K/V head to finish merges the parts.
    """
    split, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD)
    offset = tl.arange(0, TILE)
    heads = KV_HEADS * GROUP
    head = kv_head * GROUP + row
    live = row < GROUP
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = seq
    if BY_LENGTH:
        token = tl.load(starts_ptr + seq)
        if tl.load(starts_ptr + seq + 1) - token != 1:
            return
    length = tl.load(lens_ptr + seq)
    parts, of_each = _cut(length, SPLITS, PART, TILE)
    if split >= parts:  # the sequence is too short for SPLITS parts
        return
    begin = split * of_each
    end = tl.minimum(begin + of_each, length)
    q = tl.load(q_ptr + token.to(tl.int64) * q_stride + head[:, None] * HEAD + dim[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    # A block's number is loaded one pass ahead: a load that depends on another load of the same pass is pipelined half as deep.
    tables_ptr += seq.to(tl.int64) * max_blocks
    block = tl.load(tables_ptr + begin // BLOCK, mask=begin < end, other=0).to(tl.int64)
    for start in range(begin, end, TILE):
        inside = start + offset < end
        at = ((block * BLOCK + start % BLOCK + offset) * KV_HEADS + kv_head) * HEAD
        block = tl.load(tables_ptr + (start + TILE) // BLOCK, mask=start + TILE < end, other=0).to(tl.int64)
        k = tl.load(k_ptr + at[None, :] + dim[:, None], mask=inside[None, :], other=0.0)  # [HEAD, TILE]
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)  # [TILE, HEAD]
        score = tl.where(inside[None, :], tl.dot(q, k, input_precision=PRECISION), float("-inf"))
        best, total, acc = add_pass(score, v, best, total, acc, scale, PRECISION)

    if PDL:  # only here: waiting programs of the next kernel would take the place of this kernel's programs
        tl.extra.cuda.gdc_launch_dependents()
    acc = acc / total[:, None]
    if SPLITS == 1 or parts == 1:
        at_out = (token * heads + head[:, None]) * HEAD + dim[None, :]
        tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        part = (seq * heads + head) * SPLITS + split
        tl.store(lse_ptr + part, best + tl.log2(total), mask=live)
        tl.store(acc_ptr + part[:, None] * HEAD + dim[None, :], acc, mask=live[:, None])
        tl.debug_barrier()  # all threads must have written their results before the program counts as arrived
        arrived = tl.atomic_add(arrived_ptr + seq * KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(arrived_ptr + seq * KV_HEADS + kv_head, 0)  # the next launch needs the counter at 0
            for i in range(GROUP):
                one = kv_head * GROUP + i
                _merge(acc_ptr, lse_ptr, out_ptr + (token * heads + one) * HEAD, seq * heads + one, parts, HEAD, SPLITS)


def choose_splits(num_seqs: int, kv_heads: int, num_processors: int) -> int:
    """Choose into how many parts a sequence may be cut, so that each multiprocessor has about two programs.

    The number is a power of two, at most 32. It is at least 4 if sequences that are not cut give up to two programs for each
    multiprocessor, and at least 2 if they give up to four: lengths differ, and the device would wait for the longest sequence.
    """
    programs = num_seqs * kv_heads
    least = 4 if programs <= 2 * num_processors else 2 if programs <= 4 * num_processors else 1
    return min(32, power_of_two(max(least, 2 * num_processors // programs)))


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    num_splits: int,
    out: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from q [B, heads, head_dim], with a token's heads adjacent, to the first kv_lens[b] tokens of each sequence b.

    The result is [B, heads, head_dim], written to `out` if that is given. k_cache and v_cache are [num_blocks, block_size,
    kv_heads, head_dim], block_tables [B, max_blocks] int32, and kv_lens [B] int32, each at least 1. head_dim, block_size (at
    least 16) and num_splits are powers of two. With num_splits > 1 there are at most `launch.MAX_GROUPS` pairs of sequence and
    K/V head.

    With query_starts [B + 1] int32, q and `out` are [T, heads, head_dim], and only queries of one token are computed; the rows of
    longer queries in `out` are left as they are.
    """
    _, heads, head_dim = q.shape
    num_seqs = q.shape[0] if query_starts is None else kv_lens.shape[0]
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    programs, num_processors, tile = num_seqs * kv_heads, processors(q.device), min(64, block_size)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    acc = lse = out  # placeholders, which the kernel does not use if no sequence is split
    if num_splits > 1:
        acc = torch.empty(num_seqs, heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_seqs, heads, num_splits, dtype=torch.float32, device=q.device)
    _decode[(num_splits, kv_heads, num_seqs)](
        q, k_cache, v_cache, out, block_tables, kv_lens, kv_lens if query_starts is None else query_starts,
        acc, lse, arrivals(q.device),
        scale * LOG2_E, block_tables.stride(0), q.stride(0),
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(MIN_DOT_ROWS, power_of_two(group)),
        HEAD=head_dim, BLOCK=block_size, TILE=tile, SPLITS=num_splits,
        PART=max(1, PART_TOKENS.get(num_splits, 0) // tile),
        BY_LENGTH=query_starts is not None, PRECISION=precision(q.dtype),
        num_warps=4 if num_splits <= 2 else 2, num_stages=_stages(programs, num_splits, num_processors), **pdl(q.device),
    )  # fmt: skip
    return out


def _stages(programs: int, num_splits: int, num_processors: int) -> int:
    """Choose the number of pipeline stages of the loop's loads, for `programs` pairs of a sequence and a K/V head.

    A program with fewer stages takes less shared memory, so more programs share a multiprocessor. That is faster if all programs
    of the launch then run at once: 16 x 32,000 tokens take 480 us with two stages and 559 with three. One sequence has two stages
    too, although a long one is faster with four (1 x 120,000 tokens take 124 us instead of 141): with more shared memory, the
    kernel that follows starts later, and a token of a small model takes 2% longer.
    """
    few = 1 < num_splits <= 4 and programs * num_splits <= 2 * num_processors
    many = num_splits == 1 and programs > MANY_PROGRAMS
    return 3 if few or many else 2
