"""Kernels that route tokens to experts: one computes the router's logits, one chooses the experts of each token.

The plain twin of both is the router's matrix product in torch, followed by `layers.moe.route`. For 64 tokens of DeepSeek-V2-Lite,
`router_logits` takes 2.6 us and `route` 2.1 us; torch's product alone takes 11.4 us (docs/gpu.md). `sort_pairs.py` has the kernel
that runs next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dot import precision
from engine.kernels.launch import cdiv, pdl, power_of_two

TILE = 128  # numbers of a row that a program of the router's product reads in one pass of its loop
MAX_SPLITS = 16  # the router's product splits a row into at most this many parts
PROGRAMS = 256  # the router's product splits rows until it has about this many programs
MANY_TOKENS = 512  # from this many tokens on, a program computes 64 experts, not 16: there are enough tiles of tokens
METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    x_ptr, router_ptr, out_ptr, tokens,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    TILE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, tile of experts, split) computes partial logits over PART numbers of a row.

    With EXACT, the router's weight is float32, and is multiplied as the sum of three bfloat16 numbers.
    """
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
        if EXACT:  # exact: a float32 is the sum of three bfloat16, whose products are exact, and sums are in float32
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
    """Compute partial router logits, [splits, T, E] float32. Their sum over the splits is the logits.

    x [T, H] are the tokens, and router [E, H] is the router's weight, of x's type or float32. A float32 weight is multiplied as
    three bfloat16 parts. That is exact, which matters since the scores of two experts may differ by little.
    grid: (tiles of tokens, tiles of experts, splits of H).
    """
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
    """Program (token,) sums the splits of the logits, scores the experts, and chooses TOP_K of the experts.

    Experts are a grid [GROUPS, MEMBERS], padded to powers of two. METHOD is a value of METHODS. With HALF, logits are rounded to
    bfloat16.
    """
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
        if METHOD == 2:  # a group counts as the sum of its best two experts
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
        weight, best = tl.max(choice, 0, return_indices=True)  # of equal scores, the lowest index is chosen
        if METHOD == 2:
            weight = tl.sum(tl.where(at == best, scores, 0.0), 0)
        # With NaN logits `best` is arbitrary. The bound keeps the expert id valid, so that no kernel reads outside the weights.
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
    """Choose the experts of each token. Returns weights [T, top_k] float32 and expert ids [T, top_k] int32.

    The sum of parts [splits, T, E] float32 over the splits is the router's logits. `method` is a key of METHODS; RoutingSpec
    explains the methods. `groups` is (number of groups, groups that a token may use). bias [E] float32 is added to the scores for
    the choice, but not to the weights. Of equal scores the lowest expert id wins. The logits are rounded to `router_dtype`, as
    the result of a product in that type would be. grid: (T,); a program routes one token.
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
