"""Kernels that sort (token, expert) pairs by expert with a counting sort. The host never waits for the device.

Pair p is choice p % top_k of token p // top_k. In the sorted order, the place of a pair is the number of pairs of lower experts
plus the number of its own expert's earlier pairs. Every program that places pairs finds both numbers itself.

Up to 4,096 pairs, one launch is enough: every program scans all pairs. For more, a first launch counts the pairs of each expert
in parts of 4,096. For 64 experts and 6 a token, the sort takes 1.5 us for 64 tokens and 15.1 us for 8,192 (docs/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two

STEP = 2048  # counts that one pass of `_sort`'s loop adds up


class Sorted(NamedTuple):
    """(token, expert) pairs, sorted by expert and then by token, and cut into blocks of pairs of one expert.

    Shared experts, which every token takes, follow the routed experts. Each shared expert has one place for each token, in order,
    after the places of the routed pairs. `ends` and the blocks include these places; `order` and `place` do not.
    """

    order: torch.Tensor  # [pairs] int32: the pair at each place
    place: torch.Tensor  # [pairs] int32: the place of each pair
    ends: torch.Tensor  # [experts + shared] int32: the place after an expert's last pair
    block_expert: torch.Tensor  # [most blocks there can be] int32: the expert of each block
    block_start: torch.Tensor  # [most blocks there can be] int32: the first place of each block
    num_blocks: torch.Tensor  # [1] int32: blocks in use


class Part(NamedTuple):
    """The number of pairs that one program of the sort scans at once, and its warps."""

    pairs: int  # pairs that a program scans, a power of two
    num_warps: int


# The sort takes the first of ONE_PART that holds all pairs, and one launch. If none does, it takes MANY_PARTS and a launch more,
# which counts the pairs first.
ONE_PART = Part(512, 4), Part(2048, 8), Part(4096, 8)
MANY_PARTS = Part(4096, 8)


@triton.jit
def _histogram(ids_ptr, start, pairs, EXPERTS_PADDED: tl.constexpr, SIZE: tl.constexpr):
    """Count the pairs of each expert among the SIZE pairs from `start` on -> [EXPERTS_PADDED]."""
    pair = start + tl.arange(0, SIZE)
    counts = tl.histogram(tl.load(ids_ptr + pair, mask=pair < pairs, other=0), EXPERTS_PADDED)
    past_end = tl.maximum(start + SIZE - pairs, 0)  # pairs past the end were counted as pairs of expert 0
    return counts - tl.where(tl.arange(0, EXPERTS_PADDED) == 0, past_end, 0)


@triton.jit(do_not_specialize=["pairs"])
def _count(ids_ptr, counts_ptr, pairs, EXPERTS_PADDED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Count the pairs of each expert in each part -> [parts, EXPERTS_PADDED]. A program counts one part of SIZE pairs."""
    part = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    counts = _histogram(ids_ptr, part * SIZE, pairs, EXPERTS_PADDED, SIZE)
    tl.store(counts_ptr + part * EXPERTS_PADDED + tl.arange(0, EXPERTS_PADDED), counts)


@triton.jit(do_not_specialize=["tokens", "pairs", "parts", "block"])
def _sort(
    ids_ptr, counts_ptr, order_ptr, place_ptr, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr,
    tokens, pairs, parts, block,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, COUNTED: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 writes `ends` and the blocks of Sorted. Every other program writes the places of one expert's pairs in one
    part."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) == 0:
        expert = tl.arange(0, EXPERTS_PADDED)
        if COUNTED:
            ROWS: tl.constexpr = STEP // EXPERTS_PADDED
            counts = tl.zeros([EXPERTS_PADDED], tl.int32)
            for first in range(0, parts, ROWS):
                row = first + tl.arange(0, ROWS)[:, None]
                counts += tl.sum(tl.load(counts_ptr + row * EXPERTS_PADDED + expert[None, :], mask=row < parts, other=0), 0)
        else:
            counts = _histogram(ids_ptr, 0, pairs, EXPERTS_PADDED, SIZE)
        counts = tl.where((expert >= EXPERTS) & (expert < EXPERTS + SHARED), tokens, counts)
        ends = tl.cumsum(counts, 0)
        tl.store(ends_ptr + expert, ends, mask=expert < EXPERTS + SHARED)
        blocks = (counts + block - 1) // block
        last = tl.cumsum(blocks, 0)
        tl.store(num_blocks_ptr, tl.sum(blocks, 0))
        for i in range(tl.max(blocks, 0)):
            slot = last - blocks + i
            tl.store(block_expert_ptr + slot, expert, mask=i < blocks)
            tl.store(block_start_ptr + slot, ends - counts + i * block, mask=i < blocks)
    else:
        own = (tl.program_id(0) - 1) % EXPERTS
        part = (tl.program_id(0) - 1) // EXPERTS
        pair = part * SIZE + tl.arange(0, SIZE)
        ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=EXPERTS)
        if COUNTED:
            before = tl.zeros([STEP], tl.int32)
            for start in range(0, parts * EXPERTS_PADDED, STEP):
                at = start + tl.arange(0, STEP)
                other = at % EXPERTS_PADDED
                earlier = (other < own) | ((other == own) & (at // EXPERTS_PADDED < part))
                before += tl.load(counts_ptr + at, mask=earlier & (at < parts * EXPERTS_PADDED), other=0)
        else:
            before = (ids < own).to(tl.int32)
        place = tl.sum(before, 0) + tl.cumsum((ids == own).to(tl.int32), 0) - 1
        tl.store(place_ptr + pair, place, mask=ids == own)
        tl.store(order_ptr + place, pair, mask=ids == own)


def sort_pairs(ids: torch.Tensor, experts: int, block: int, shared: int = 0, *, part: Part | None = None) -> Sorted:
    """Sort (token, expert) pairs by expert, and cut them into blocks of up to `block` pairs of one expert.

    ids [T, top_k] int32 are the experts of each token, each below `experts`. `shared` is the number of shared experts. `part`
    overrides the choice of ONE_PART or MANY_PARTS. If the pairs do not fit into `part`, a launch that counts them comes first.
    """
    tokens, device = ids.shape[0], ids.device
    pairs = ids.numel()
    most = min(experts, pairs) + pairs // block + shared * cdiv(tokens, block)
    out = Sorted(*(torch.empty(n, dtype=torch.int32, device=device) for n in (pairs, pairs, experts + shared, most, most, 1)))
    padded = power_of_two(experts + shared)
    part = part or next((p for p in ONE_PART if pairs <= p.pairs), MANY_PARTS)
    parts = cdiv(pairs, part.pairs)
    counts = ids
    if parts > 1:
        counts = torch.empty(parts, padded, dtype=torch.int32, device=device)
        _count[(parts,)](ids, counts, pairs, EXPERTS_PADDED=padded, SIZE=part.pairs, num_warps=part.num_warps, **pdl(device))
    _sort[(1 + parts * experts,)](
        ids, counts, *out, tokens, pairs, parts, block,
        EXPERTS=experts, EXPERTS_PADDED=padded, SHARED=shared, SIZE=part.pairs, COUNTED=parts > 1, STEP=max(STEP, padded),
        num_warps=part.num_warps, **pdl(device),
    )  # fmt: skip
    return out
