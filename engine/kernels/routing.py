"""Routing of a mixture of experts, in Triton: the router's product, the choice of experts, and pairs sorted by expert.

A pair is a token with one of its experts: pair p is choice p % top_k of token p // top_k. `engine.layers.moe.route` is the
plain twin of the first two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two
from engine.kernels.paged_decode import precision

TILE = 128  # numbers of a row that one pass of the router's product takes
MAX_SPLITS = 16
PROGRAMS = 256  # wanted of the router's product: a row is split until there are about so many
MANY_TOKENS = 512  # from here on there are enough tiles of tokens: the router's rows need not be spread thin
STEP = 2048  # counts of pairs that one pass of the sort sums
METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    x_ptr, router_ptr, out_ptr, tokens,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    TILE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(split * PART, split * PART + PART, TILE):
        col = start + tl.arange(0, TILE)
        inside = col < SIZE
        x = tl.load(x_ptr + token[:, None].to(tl.int64) * SIZE + col, mask=(token < tokens)[:, None] & inside, other=0.0)
        w = tl.load(router_ptr + row[:, None] * SIZE + col, mask=(row < EXPERTS)[:, None] & inside, other=0.0)
        if EXACT:  # a float32 is the sum of three bfloat16: products in bfloat16 are exact, and sums are in float32
            high = w.to(x.dtype)
            w -= high.to(tl.float32)
            middle = w.to(x.dtype)
            low = (w - middle.to(tl.float32)).to(x.dtype)
            acc = tl.dot(low, tl.trans(x), acc, input_precision=PRECISION)
            acc = tl.dot(middle, tl.trans(x), acc, input_precision=PRECISION)
            acc = tl.dot(high, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    at = (split * tokens + token[None, :]) * EXPERTS + row[:, None]
    tl.store(out_ptr + at, acc, mask=(token < tokens)[None, :] & (row < EXPERTS)[:, None])


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x [T, H], router [E, H] of x's type or float32 -> parts [splits, T, E] float32; the logits are their sum."""
    tokens, size = x.shape
    experts = router.shape[0]
    tile = min(64, max(16, power_of_two(tokens)))
    rows = 64 if tokens >= MANY_TOKENS else 16
    grid = (cdiv(tokens, tile), cdiv(experts, rows))
    splits = min(MAX_SPLITS, power_of_two(cdiv(PROGRAMS, grid[0] * grid[1])))
    part = cdiv(cdiv(size, splits), TILE) * TILE
    splits = cdiv(size, part)
    out = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    _logits[(*grid, splits)](
        x, router, out, tokens,
        SIZE=size, EXPERTS=experts, TOKENS=tile, ROWS=rows, PART=part, TILE=TILE, EXACT=router.dtype == torch.float32,
        PRECISION=precision(x.dtype),
        num_warps=4, num_stages=2 if router.dtype == torch.float32 else 3, **pdl(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _route(
    parts_ptr, bias_ptr, weights_ptr, ids_ptr, tokens, scale,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    MEMBERS_PADDED: tl.constexpr, BEST_GROUPS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr,
    METHOD: tl.constexpr, BIASED: tl.constexpr, NORMALIZE: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    EXPERTS: tl.constexpr = GROUPS * MEMBERS
    at = tl.arange(0, GROUPS_PADDED * MEMBERS_PADDED)
    expert = at // MEMBERS_PADDED * MEMBERS + at % MEMBERS_PADDED
    live = (at < GROUPS * MEMBERS_PADDED) & (at % MEMBERS_PADDED < MEMBERS)
    bias = tl.zeros([GROUPS_PADDED * MEMBERS_PADDED], tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + expert, mask=live, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = tl.zeros([GROUPS_PADDED * MEMBERS_PADDED], tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(parts_ptr + (split * tokens + token) * EXPERTS + expert, mask=live, other=0.0)
    if HALF:
        logits = logits.to(tl.bfloat16).to(tl.float32)
    if METHOD == 2:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(live, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    choice = tl.where(live, scores + bias, float("-inf"))

    if METHOD != 0 and BEST_GROUPS < GROUPS:
        grouped = tl.reshape(choice, [GROUPS_PADDED, MEMBERS_PADDED])
        worth = tl.max(grouped, 1)
        if METHOD == 2:  # the best two
            first = tl.argmax(grouped, 1)
            others = tl.where(tl.arange(0, MEMBERS_PADDED)[None, :] == first[:, None], float("-inf"), grouped)
            worth += tl.max(others, 1)
        group = tl.arange(0, GROUPS_PADDED)
        is_open = group < 0
        for _ in tl.static_range(BEST_GROUPS):
            best = tl.argmax(worth, 0)
            is_open = is_open | (group == best)
            worth = tl.where(group == best, float("-inf"), worth)
        closed = 0.0 if METHOD == 1 else float("-inf")
        grouped = tl.where(is_open[:, None], grouped, closed)
        choice = tl.where(live, tl.reshape(grouped, [GROUPS_PADDED * MEMBERS_PADDED]), float("-inf"))

    slot = tl.arange(0, TOP_K_PADDED)
    weights = tl.zeros([TOP_K_PADDED], tl.float32)
    ids = tl.zeros([TOP_K_PADDED], tl.int32)
    for i in tl.static_range(TOP_K):
        weight, best = tl.max(choice, 0, return_indices=True)  # of equal ones the lowest
        if METHOD == 2:
            weight = tl.sum(tl.where(at == best, scores, 0.0), 0)
        # The bound is for logits that are not numbers: whatever such a token gets, it must read inside the weights.
        chosen = tl.minimum(best // MEMBERS_PADDED * MEMBERS + best % MEMBERS_PADDED, EXPERTS - 1)
        weights = tl.where(slot == i, weight, weights)
        ids = tl.where(slot == i, chosen, ids)
        choice = tl.where(at == best, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(weights_ptr + token * TOP_K + slot, weights * scale, mask=slot < TOP_K)
    tl.store(ids_ptr + token * TOP_K + slot, ids, mask=slot < TOP_K)


def route(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    method: str,
    top_k: int,
    groups: tuple[int, int],
    normalize: bool,
    scale: float,
    router_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """parts [splits, T, E] float32 of logits -> weights [T, top_k] float32 and expert ids [T, top_k] int32.

    `groups`: how many there are, and how many of them a token may use. Of equal scores the lowest id wins. The logits are rounded
    to `router_dtype`, as a product in it would be.
    """
    splits, tokens, experts = parts.shape
    num_groups = 1 if method == "greedy" else groups[0]
    members = experts // num_groups
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=parts.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=parts.device)
    padded = power_of_two(num_groups) * power_of_two(members)
    _route[(tokens,)](
        parts, parts if bias is None else bias, weights, ids, tokens, scale,
        SPLITS=splits, GROUPS=num_groups, MEMBERS=members, GROUPS_PADDED=power_of_two(num_groups),
        MEMBERS_PADDED=power_of_two(members), BEST_GROUPS=groups[1], TOP_K=top_k,
        TOP_K_PADDED=power_of_two(top_k), METHOD=METHODS[method], BIASED=bias is not None, NORMALIZE=normalize,
        HALF=router_dtype == torch.bfloat16, num_warps=max(1, min(4, padded // 256)), **pdl(parts.device),
    )  # fmt: skip
    return weights, ids


class Sorted(NamedTuple):
    """Pairs by expert, each expert's in order of tokens. A block is up to `block` pairs of one expert.

    A shared expert, which every token takes, counts as one more, after the routed ones: its tokens stand in order in the rows
    after the pairs, and only `ends` and the blocks tell of it.
    """

    order: torch.Tensor  # [pairs] int32: which pair stands at a place
    place: torch.Tensor  # [pairs] int32: where a pair stands
    ends: torch.Tensor  # [experts + shared] int32: the place after an expert's last
    block_expert: torch.Tensor  # [blocks at most] int32
    block_start: torch.Tensor  # likewise: the block's first place
    num_blocks: torch.Tensor  # [1] int32


class Part(NamedTuple):
    """How many pairs a program of the sort scans at once. Powers of two."""

    pairs: int
    num_warps: int


# Where one part holds all pairs, each program counts for itself: one launch.
ONE_PART = Part(512, 4), Part(2048, 8), Part(4096, 8)
MANY_PARTS = Part(4096, 8)


@triton.jit
def _histogram(ids_ptr, start, pairs, EXPERTS_PADDED: tl.constexpr, SIZE: tl.constexpr):
    """How many of the SIZE pairs from `start` on go to each expert: [experts, padded]"""
    pair = start + tl.arange(0, SIZE)
    counts = tl.histogram(tl.load(ids_ptr + pair, mask=pair < pairs, other=0), EXPERTS_PADDED)
    past_end = tl.maximum(start + SIZE - pairs, 0)  # they were counted as expert 0's
    return counts - tl.where(tl.arange(0, EXPERTS_PADDED) == 0, past_end, 0)


@triton.jit(do_not_specialize=["pairs"])
def _count(ids_ptr, counts_ptr, pairs, EXPERTS_PADDED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """counts [parts, experts, padded]"""
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
    """The first program writes ends and blocks, each other one the places of one expert's pairs in one part."""
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
    """ids [T, top_k] int32, each below `experts`; blocks of `block` pairs; `shared` experts that all take.

    A counting sort in which each expert looks for its own pairs: a pair's place is the number of pairs of experts before its
    own, and of its own expert's before it. A `part` that does not hold all pairs takes a launch more, to count them part by part.
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
