"""Attention of one query token a sequence over a paged K/V cache, in Triton: split-KV with the heads of a group packed.

The cache of a sequence is cut into up to `num_splits` parts, one program each, so that few sequences still fill the device; the
program that is last to finish merges them by their log-sum-exp (the "flash-decoding" scheme: Dao et al., 2023). A short sequence
has fewer, and its other programs end at once. All query heads that share a K/V head are rows of one tile, so K and V are read
once for them. The grid depends on shapes only, never on lengths, so a captured graph stays right as sequences grow. A
sequence's programs start together, and sequences in their order: the scheduler puts the longest first, since one that started
last would be waited for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.hardware import processors
from engine.kernels.launch import arrivals, pdl, power_of_two
from engine.kernels.softmax import add_pass

LOG2_E = 1.4426950408889634  # the kernels work with powers of two
MIN_DOT_ROWS = 16  # tl.dot wants at least this many rows
MANY_PROGRAMS = 512  # see `_stages`
# By the most parts there may be, for how many tokens, once begun, a sequence has one at most; else one for each pass of the loop.
# Parts are of whole passes, as even as these allow. docs/gpu.md has what was measured.
PART_TOKENS = {2: 512, 4: 128}


@triton.jit
def _merge(acc_ptr, lse_ptr, out_ptr, pair, parts, HEAD: tl.constexpr, SPLITS: tl.constexpr):
    """The parts that others wrote, of one head of one sequence; past the L1, which may hold what an older launch had there."""
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
    """How many parts a sequence of `length` tokens has, and how many tokens are in each but the last. PART is in passes."""
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
    if split >= parts:  # the sequence is too short for so many
        return
    begin = split * of_each
    end = tl.minimum(begin + of_each, length)
    q = tl.load(q_ptr + token.to(tl.int64) * q_stride + head[:, None] * HEAD + dim[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    # A block's number is fetched a pass ahead: loads that depend on one of the same pass are pipelined half as deep.
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

    if PDL:  # not before: programs that wait would take the room of ours
        tl.extra.cuda.gdc_launch_dependents()
    acc = acc / total[:, None]
    if SPLITS == 1 or parts == 1:
        at_out = (token * heads + head[:, None]) * HEAD + dim[None, :]
        tl.store(out_ptr + at_out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        part = (seq * heads + head) * SPLITS + split
        tl.store(lse_ptr + part, best + tl.log2(total), mask=live)
        tl.store(acc_ptr + part[:, None] * HEAD + dim[None, :], acc, mask=live[:, None])
        tl.debug_barrier()  # all of the program's parts are written before it says so
        arrived = tl.atomic_add(arrived_ptr + seq * KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(arrived_ptr + seq * KV_HEADS + kv_head, 0)  # for the next launch
            for i in range(GROUP):
                one = kv_head * GROUP + i
                _merge(acc_ptr, lse_ptr, out_ptr + (token * heads + one) * HEAD, seq * heads + one, parts, HEAD, SPLITS)


def precision(dtype: torch.dtype) -> str:
    """tl.dot's mode: near full precision for float32, in three passes (one of tf32 errs by 3e-4); narrower types have one."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def choose_splits(num_seqs: int, kv_heads: int, num_processors: int) -> int:
    """Most parts of a sequence (a power of two, at most 32): such that each processor has about two programs. At least four up
    to that, and two up to twice as many, since lengths differ and the longest would be waited for.
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
    """Attend from q [B, heads, head_dim], each token's heads side by side, to the first kv_lens[b] tokens of each sequence.

    Returns [B, heads, head_dim], in `out` where that is given. k_cache and v_cache are [num_blocks, block_size, kv_heads,
    head_dim], block_tables [B, max_blocks] int32, kv_lens [B] int32 (each at least 1). head_dim, block_size (at least 16)
    and num_splits must be powers of two; what may be split has at most `launch.MAX_GROUPS` pairs of sequence and K/V head.

    With `query_starts` [B + 1] int32, q and `out` are [T, heads, head_dim], and only the sequences of one token are served.
    """
    _, heads, head_dim = q.shape
    num_seqs = q.shape[0] if query_starts is None else kv_lens.shape[0]
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    programs, num_processors, tile = num_seqs * kv_heads, processors(q.device), min(64, block_size)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    acc = lse = out  # where nothing is split, nobody looks at them
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
    """Of loads; `programs` are pairs of a sequence and a K/V head. Where all are at work at once, more of them on a processor
    beat more loads in each, unless they are few: docs/gpu.md."""
    few = 1 < num_splits <= 4 and programs <= num_processors
    many = num_splits == 1 and programs > MANY_PROGRAMS
    return 3 if few or many else 2
