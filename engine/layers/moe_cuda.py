"""A mixture of experts on CUDA in bfloat16. Shapes alone decide which kernels run it. `moe.py` has the plain twin.

Nothing here waits for the device, so a step can be captured in a CUDA graph. For that, grids have the largest number of
blocks that the routing could need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.kernels import routing
from engine.kernels.experts import ExpertWeights, add_weighted, count_shared, spread
from engine.kernels.experts_few import Strip, few_down, few_up
from engine.kernels.experts_tiles import Tile, tiles_down, tiles_up
from engine.kernels.sort_pairs import sort_pairs
from engine.layers.moe import MoeMlp, Routed
from engine.layers.ops import Ops

# These values were chosen by measurement on DeepSeek-V2-Lite's layer (docs/gpu.md).
FEW_TOKENS = 2  # largest step in which each token reads its own experts' weights, even if tokens share experts
STRIPS = Strip(1, 512, 1), Strip(1, 512, 1)  # the strips of the gate_up product and of the down product, for few tokens


class Cut(NamedTuple):
    """The sizes with which the experts' products run in blocks. A block holds (token, expert) pairs of one expert."""

    block: int  # largest number of (token, expert) pairs in a block
    gate_up: Tile
    down: Tile
    with_shared: bool  # true: shared experts run as further blocks of the same kernels; false: they run as an MLP


TILE = Tile(128, 64, 8, 4, 99)
CUTS: tuple[tuple[int, Cut], ...] = (  # (largest mean number of pairs per expert for which the cut is used, cut)
    (5, Cut(16, TILE, TILE, True)),
    (10, Cut(32, TILE, TILE, True)),
    (32, Cut(32, TILE, TILE, False)),
    (64, Cut(64, TILE, TILE, False)),
    (192, Cut(128, Tile(128, 64, 8, 4, 1), Tile(128, 64, 8, 3, 99), False)),
)
SORT_BLOCK = 128  # block size of the sort before torch's grouped product, which does not use the blocks


def add_to(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, ops: Ops) -> None:
    """Apply routed and shared experts to x [T, H], and add the result to hidden [T, H] in place."""
    run_experts(hidden, moe, x, route(moe, x), ops)


def route(moe: MoeMlp, x: torch.Tensor) -> Routed:
    spec = moe.routing
    weights, ids = routing.route(
        routing.router_logits(x, moe.router),
        moe.choice_bias,
        method=spec.method,
        top_k=spec.top_k,
        groups=(spec.n_group, spec.topk_group),
        normalize=spec.normalize,
        scale=spec.scale,
        router_dtype=moe.router.dtype,
    )
    return Routed(weights, ids)


def run_experts(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, ops: Ops) -> None:
    mean = routed.ids.numel() / moe.routing.num_experts
    if x.shape[0] <= FEW_TOKENS and (moe.shared is None or _shared_weights(moe) is not None):
        run_few(hidden, moe, x, routed, STRIPS)
    elif (cut := next((c for most, c in CUTS if mean <= most), None)) is not None:
        run_cut(hidden, moe, x, routed, cut, ops)
    else:
        run_grouped(hidden, moe, x, routed, ops)


def _shared_weights(moe: MoeMlp) -> ExpertWeights | None:
    """Return the shared experts' weights (gate_up, down) if kernels can run them as routed experts; else None.

    Kernels can do so if the shared experts' size is a multiple of a routed expert's.
    """
    if moe.shared is None or moe.shared.size % moe.size:
        return None
    return moe.shared.gate_up_proj.weight, moe.shared.down_proj.weight


def run_few(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, strips: tuple[Strip, Strip]) -> None:
    experts, shared = (moe.gate_up, moe.down), _shared_weights(moe)
    inner = few_up(x, routed.ids, experts, shared, strips[0])
    few_down(hidden, inner, routed, experts, shared, strips[1])


def run_cut(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, cut: Cut, ops: Ops) -> None:
    weights, ids = routed
    experts, shared = (moe.gate_up, moe.down), _shared_weights(moe) if cut.with_shared else None
    by_expert = sort_pairs(ids, moe.routing.num_experts, cut.block, count_shared(shared, moe.size))
    inner = tiles_up(x, ids.shape[1], by_expert, cut.block, experts, shared, cut.gate_up)
    rows = tiles_down(inner, by_expert, cut.block, experts, shared, cut.down)
    add_weighted(hidden, rows, by_expert.place, weights)
    if moe.shared is not None and shared is None:
        moe.shared.add_to(hidden, x, ops)


def run_grouped(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, ops: Ops) -> None:
    """Run the products with torch's grouped matmul, which is fastest when each expert has many tokens."""
    weights, ids = routed
    by_expert = sort_pairs(ids, moe.routing.num_experts, SORT_BLOCK)
    at_places = spread(x, by_expert.place)
    inner = ops.silu_mul(torch._grouped_mm(at_places, moe.gate_up.transpose(1, 2), offs=by_expert.ends))
    rows = torch._grouped_mm(inner, moe.down.transpose(1, 2), offs=by_expert.ends)
    add_weighted(hidden, rows, by_expert.place, weights)
    if moe.shared is not None:
        moe.shared.add_to(hidden, x, ops)
