"""Routing of a mixture of experts, in Triton: the router's product, the choice of experts, and pairs sorted by expert.

A pair is a token with one of its experts: pair p is choice p % top_k of token p // top_k. `engine.layers.moe.route` is the
plain twin of the first two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import pdl

TILE = 128  # numbers of a row that one pass of the router's product takes
MAX_SPLITS = 16
MANY_TOKENS = 512  # from here on there are enough tiles of tokens: the router's rows need not be spread thin
CHUNK = 256  # pairs whose order one program finds
SORTED_AT_ONCE = 2048  # pairs up to which each is compared with all: one launch in place of three
METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    x_ptr, router_ptr, out_ptr, tokens,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    TILE: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
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
            acc = tl.dot(low, tl.trans(x), acc)
            acc = tl.dot(middle, tl.trans(x), acc)
            acc = tl.dot(high, tl.trans(x), acc)
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    at = (split * tokens + token[None, :]) * EXPERTS + row[:, None]
    tl.store(out_ptr + at, acc, mask=(token < tokens)[None, :] & (row < EXPERTS)[:, None])


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x [T, H] bfloat16, router [E, H] bfloat16 or float32 -> parts [splits, T, E] float32; the logits are their sum."""
    tokens, size = x.shape
    experts = router.shape[0]
    tile = min(64, max(16, triton.next_power_of_2(tokens)))
    rows = 64 if tokens >= MANY_TOKENS else 16
    grid = (triton.cdiv(tokens, tile), triton.cdiv(experts, rows))
    splits = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(128, grid[0] * grid[1])))
    part = triton.cdiv(triton.cdiv(size, splits), TILE) * TILE
    splits = triton.cdiv(size, part)
    out = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    _logits[(*grid, splits)](
        x, router, out, tokens,
        SIZE=size, EXPERTS=experts, TOKENS=tile, ROWS=rows, PART=part, TILE=TILE, EXACT=router.dtype == torch.float32,
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
    padded = triton.next_power_of_2(num_groups) * triton.next_power_of_2(members)
    _route[(tokens,)](
        parts, parts if bias is None else bias, weights, ids, tokens, scale,
        SPLITS=splits, GROUPS=num_groups, MEMBERS=members, GROUPS_PADDED=triton.next_power_of_2(num_groups),
        MEMBERS_PADDED=triton.next_power_of_2(members), BEST_GROUPS=groups[1], TOP_K=top_k,
        TOP_K_PADDED=triton.next_power_of_2(top_k), METHOD=METHODS[method], BIASED=bias is not None, NORMALIZE=normalize,
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


@triton.jit
def _write_table(
    counts, expert, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, tokens,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [experts, padded]"""
    counts = tl.where((expert >= EXPERTS) & (expert < EXPERTS + SHARED), tokens, counts)
    ends = tl.cumsum(counts, 0)
    tl.store(ends_ptr + expert, ends, mask=expert < EXPERTS + SHARED)
    blocks = (counts + BLOCK - 1) // BLOCK
    last = tl.cumsum(blocks, 0)
    tl.store(num_blocks_ptr, tl.sum(blocks, 0))
    for i in range(tl.max(blocks, 0)):
        at = last - blocks + i
        tl.store(block_expert_ptr + at, expert, mask=i < blocks)
        tl.store(block_start_ptr + at, ends - counts + i * BLOCK, mask=i < blocks)


@triton.jit(do_not_specialize=["tokens", "pairs"])
def _sort_few(
    ids_ptr, order_ptr, place_ptr, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, tokens, pairs,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) < tl.num_programs(0) - 1:
        my_id = tl.load(ids_ptr + own, mask=own < pairs, other=0)
        before = tl.zeros([OWN], tl.int32)
        for start in range(0, pairs, STEP):
            other = start + tl.arange(0, STEP)
            its_id = tl.load(ids_ptr + other, mask=other < pairs, other=EXPERTS)
            same = (its_id[None, :] == my_id[:, None]) & (other[None, :] < own[:, None])
            before += tl.sum((same | (its_id[None, :] < my_id[:, None])).to(tl.int32), 1)
        tl.store(place_ptr + own, before, mask=own < pairs)
        tl.store(order_ptr + before, own, mask=own < pairs)
    else:
        expert = tl.arange(0, EXPERTS_PADDED)
        counts = tl.zeros([EXPERTS_PADDED], tl.int32)
        for start in range(0, pairs, STEP):
            other = start + tl.arange(0, STEP)
            its_id = tl.load(ids_ptr + other, mask=other < pairs, other=EXPERTS_PADDED)
            counts += tl.sum((its_id[None, :] == expert[:, None]).to(tl.int32), 1)
        _write_table(counts, expert, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, tokens, EXPERTS, SHARED, BLOCK)


@triton.jit(do_not_specialize=["pairs"])
def _count(ids_ptr, counts_ptr, pairs, EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):
    """How many pairs of each chunk go to each expert: counts [chunks, experts, padded]"""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS_PADDED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    counts = tl.zeros([EXPERTS_PADDED], tl.int32)
    for start in range(0, CHUNK, STEP):
        pair = chunk * CHUNK + start + tl.arange(0, STEP)
        its_id = tl.load(ids_ptr + pair, mask=pair < pairs, other=EXPERTS_PADDED)
        counts += tl.sum((its_id[None, :] == expert[:, None]).to(tl.int32), 1)
    tl.store(counts_ptr + chunk * EXPERTS_PADDED + expert, counts)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _scan(
    counts_ptr, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, tokens, chunks,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """In place: counts become the place of each chunk's first pair of each expert. One program."""
    expert = tl.arange(0, EXPERTS_PADDED)
    row = tl.arange(0, ROWS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([EXPERTS_PADDED], tl.int32)
    for start in range(0, chunks, ROWS):
        at = (start + row)[:, None] * EXPERTS_PADDED + expert[None, :]
        total += tl.sum(tl.load(counts_ptr + at, mask=(start + row < chunks)[:, None], other=0), 0)
    first = tl.cumsum(total, 0) - total
    for start in range(0, chunks, ROWS):
        at = (start + row)[:, None] * EXPERTS_PADDED + expert[None, :]
        counts = tl.load(counts_ptr + at, mask=(start + row < chunks)[:, None], other=0)
        through = tl.cumsum(counts, 0)
        tl.store(counts_ptr + at, first[None, :] + through - counts, mask=(start + row < chunks)[:, None])
        first += tl.sum(counts, 0)
    _write_table(total, expert, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, tokens, EXPERTS, SHARED, BLOCK)


@triton.jit(do_not_specialize=["pairs"])
def _sort_chunk(
    ids_ptr, first_ptr, order_ptr, place_ptr, pairs,
    EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    own = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    my_id = tl.load(ids_ptr + own, mask=own < pairs, other=0)
    before = tl.load(first_ptr + chunk * EXPERTS_PADDED + my_id)
    for start in range(0, CHUNK, STEP):
        other = chunk * CHUNK + start + tl.arange(0, STEP)
        its_id = tl.load(ids_ptr + other, mask=other < pairs, other=EXPERTS_PADDED)
        before += tl.sum(((its_id[None, :] == my_id[:, None]) & (other[None, :] < own[:, None])).to(tl.int32), 1)
    tl.store(place_ptr + own, before, mask=own < pairs)
    tl.store(order_ptr + before, own, mask=own < pairs)


def sort_pairs(ids: torch.Tensor, experts: int, block: int, shared: int = 0, *, at_once: int = SORTED_AT_ONCE) -> Sorted:
    """ids [T, top_k] int32, each below `experts`; blocks of `block` pairs, a power of two; `shared` experts that all take."""
    tokens, device = ids.shape[0], ids.device
    pairs = ids.numel()
    most = min(experts, pairs) + pairs // block + shared * triton.cdiv(tokens, block)
    out = Sorted(*(torch.empty(n, dtype=torch.int32, device=device) for n in (pairs, pairs, experts + shared, most, most, 1)))
    padded = triton.next_power_of_2(experts + shared)
    step = min(128, max(16, 4096 // padded))
    if pairs <= at_once:
        own = 32
        _sort_few[(triton.cdiv(pairs, own) + 1,)](
            ids, *out, tokens, pairs, EXPERTS=experts, EXPERTS_PADDED=padded, SHARED=shared, BLOCK=block,
            OWN=own, STEP=step, num_warps=4, **pdl(device),
        )  # fmt: skip
        return out
    chunks = triton.cdiv(pairs, CHUNK)
    counts = torch.empty(chunks, padded, dtype=torch.int32, device=device)
    _count[(chunks,)](ids, counts, pairs, EXPERTS_PADDED=padded, CHUNK=CHUNK, STEP=step, num_warps=4, **pdl(device))
    _scan[(1,)](
        counts, *out[2:], tokens, chunks, EXPERTS=experts, EXPERTS_PADDED=padded, SHARED=shared, BLOCK=block,
        ROWS=max(8, 8192 // padded), num_warps=8, **pdl(device),
    )  # fmt: skip
    _sort_chunk[(chunks,)](
        ids, counts, out.order, out.place, pairs, EXPERTS_PADDED=padded, CHUNK=CHUNK, STEP=32, num_warps=8, **pdl(device)
    )
    return out
