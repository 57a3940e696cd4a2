"""What the two sets of kernels for a mixture of experts share. The weights are gate_up [E, 2 I, H] and down [E, H, I].

A pair is a token with one of the experts that it is routed to. T tokens x take one of three ways:

    few tokens (`experts_few.py`)     x --few_up--> inner [pairs + S T, I] --few_down--> residual stream
                                      every pair reads its expert's weights
    more (`experts_tiles.py`)         x --tiles_up--> inner, sorted --tiles_down--> rows [pairs + S T, H] --add_weighted-->
                                      residual stream; a block of pairs of one expert reads its weights once
    many: torch's grouped product     x --spread--> [pairs, H] -> products by torch -> rows [pairs, H] --add_weighted-->

Shared experts, with gate_up [2 S I, H] and down [H, S I], can be computed as S more routed experts that every token takes, if
their size is S times I. The rows of `inner` and `rows` are in the order of pairs (few tokens) or of `Sorted` places (more). The
rows of the shared experts follow, expert by expert. `layers/moe_cuda.py` chooses between the ways. `layers.moe.run_experts` is
the plain twin.

The sums do not depend on the order in which programs end, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two

ExpertWeights = tuple[torch.Tensor, torch.Tensor]
"""gate_up and down, either of the routed or of the shared experts."""


def count_shared(shared: ExpertWeights | None, size: int) -> int:
    """Count the experts of inner size `size` that the weights of the shared experts hold; 0 if there are no shared experts."""
    return 0 if shared is None else shared[1].shape[1] // size


@triton.jit
def _spread(x_ptr, place_ptr, out_ptr, SIZE: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    """Program (token, tile) copies TILE numbers of one token's row to the TOP_K rows of `out` that belong to the token."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + token * SIZE + col, mask=col < SIZE)
    for i in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + i).to(tl.int64)
        tl.store(out_ptr + place * SIZE + col, x, mask=col < SIZE)


def spread(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Copy each row of x [T, H] to the rows of its token's top_k (token, expert) pairs -> [pairs, H].

    place [pairs] int32 is the row of each pair in the result. grid: (T, tiles of H). A program reads its row of x once. For 8,192
    tokens with 6 pairs each that takes 64 us; reading x once for each pair took 79 us.
    """
    tokens, size = x.shape
    top_k = place.shape[0] // tokens
    out = torch.empty(place.shape[0], size, dtype=x.dtype, device=x.device)
    tile = min(2048, power_of_two(size))
    _spread[(tokens, cdiv(size, tile))](
        x, place, out, SIZE=size, TOP_K=top_k, TILE=tile, num_warps=max(1, tile // 256), **pdl(x.device)
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _add_weighted(
    rows_ptr, place_ptr, weights_ptr, out_ptr, tokens,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, tile) adds TILE numbers of one token's weighted expert outputs to `out`, in float32.

    The outputs of the SHARED shared experts are added with weight 1.
    """
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = col < SIZE
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at_out = out_ptr + token * SIZE + col
    acc = tl.load(at_out, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + i).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + i)
        acc += tl.load(rows_ptr + place * SIZE + col, mask=inside, other=0.0).to(tl.float32) * weight
    for i in tl.static_range(SHARED):
        place = tokens.to(tl.int64) * (TOP_K + i) + token
        acc += tl.load(rows_ptr + place * SIZE + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def add_weighted(out: torch.Tensor, rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> None:
    """Add the weighted sum of each token's expert outputs to out [T, H]. grid: (T, tiles of H).

    rows [pairs + S T, H] are the experts' outputs. place [pairs] int32 is the row of each (token, expert) pair, and weights
    [T, top_k] float32 its weight. The last S T rows are the outputs of the S shared experts, which have weight 1.
    """
    (tokens, top_k), size = weights.shape, rows.shape[1]
    tile = min(1024, power_of_two(size))
    _add_weighted[(tokens, cdiv(size, tile))](
        rows, place, weights, out, tokens,
        SIZE=size, TOP_K=top_k, SHARED=rows.shape[0] // tokens - top_k, TILE=tile,
        num_warps=max(1, tile // 256), **pdl(rows.device),
    )  # fmt: skip
