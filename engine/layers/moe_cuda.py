"""A mixture of experts on CUDA in bfloat16. Shapes alone decide which kernels run it. `moe.py` has the plain twin.

Nothing here waits for the device, so a step can be captured in a CUDA graph. For that, grids have the largest number of
blocks that the routing could need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.kernels import experts as kernels
from engine.kernels import routing
from engine.kernels.experts import Strip, Tile
from engine.layers.moe import MoeMlp
from engine.layers.ops import Ops

Routed = tuple[torch.Tensor, torch.Tensor]
"""Weights [T, top_k] float32 and expert ids [T, top_k] int32."""

# These values were chosen by measurement on DeepSeek-V2-Lite's layer (docs/gpu.md).
FEW_TOKENS = 2  # largest step in which each token reads its own experts' weights, even if tokens share experts
STRIPS = Strip(1, 512, 1), Strip(1, 512, 1)  # for gate_up and for down


class Cut(NamedTuple):
    """How to run the products in blocks, where a block holds (token, choice) pairs of one expert."""

    block: int  # pairs
    gate_up: Tile
    down: Tile
    with_shared: bool  # run the shared experts as further blocks of the same kernels; if not, as an MLP


TILE = Tile(128, 64, 8, 4, 99)
CUTS: tuple[tuple[int, Cut], ...] = (  # by the largest mean number of pairs per expert that the entry serves
    (5, Cut(16, TILE, TILE, True)),
    (10, Cut(32, TILE, TILE, True)),
    (32, Cut(32, TILE, TILE, False)),
    (64, Cut(64, TILE, TILE, False)),
    (192, Cut(128, Tile(128, 64, 8, 4, 1), Tile(128, 64, 8, 3, 99), False)),
)
SORT_BLOCK = 128  # for torch's grouped product, which takes the end of each expert's pairs and no blocks


def add_to(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, ops: Ops) -> None:
    """Apply routed and shared experts to x [T, H], and add the result to hidden [T, H] in place."""
    run_experts(hidden, moe, x, route(moe, x), ops)


def route(moe: MoeMlp, x: torch.Tensor) -> Routed:
    spec = moe.routing
    return routing.route(
        routing.router_logits(x, moe.router),
        moe.choice_bias,
        method=spec.method,
        top_k=spec.top_k,
        groups=(spec.n_group, spec.topk_group),
        normalize=spec.normalize,
        scale=spec.scale,
        router_dtype=moe.router.dtype,
    )


def run_experts(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, ops: Ops) -> None:
    mean = routed[1].numel() / moe.routing.num_experts
    if x.shape[0] <= FEW_TOKENS and (moe.shared is None or _shared_weights(moe) is not None):
        run_few(hidden, moe, x, routed, STRIPS)
    elif (cut := next((c for most, c in CUTS if mean <= most), None)) is not None:
        run_cut(hidden, moe, x, routed, cut, ops)
    else:
        run_grouped(hidden, moe, x, routed, ops)


def _shared_weights(moe: MoeMlp) -> kernels.Pair | None:
    """gate_up and down of the shared experts, if their size is a multiple of a routed expert's; else None."""
    if moe.shared is None or moe.shared.size % moe.size:
        return None
    return moe.shared.gate_up_proj.weight, moe.shared.down_proj.weight


def run_few(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, strips: tuple[Strip, Strip]) -> None:
    experts, shared = (moe.gate_up, moe.down), _shared_weights(moe)
    inner = kernels.few_up(x, routed[1], experts, shared, strips[0])
    kernels.few_down(hidden, inner, routed, experts, shared, strips[1])


def run_cut(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, cut: Cut, ops: Ops) -> None:
    weights, ids = routed
    experts, shared = (moe.gate_up, moe.down), _shared_weights(moe) if cut.with_shared else None
    by_expert = routing.sort_pairs(ids, moe.routing.num_experts, cut.block, kernels.count_shared(shared, moe.size))
    inner = kernels.tiles_up(x, ids.shape[1], by_expert, cut.block, experts, shared, cut.gate_up)
    rows = kernels.tiles_down(inner, by_expert, cut.block, experts, shared, cut.down)
    kernels.add_weighted(hidden, rows, by_expert.place, weights)
    if moe.shared is not None and shared is None:
        moe.shared.add_to(hidden, x, ops)


def run_grouped(hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, routed: Routed, ops: Ops) -> None:
    """Run the products with torch's grouped matmul, which is fastest when each expert has many tokens."""
    weights, ids = routed
    by_expert = routing.sort_pairs(ids, moe.routing.num_experts, SORT_BLOCK)
    at_places = kernels.spread(x, by_expert.place)
    inner = ops.silu_mul(torch._grouped_mm(at_places, moe.gate_up.transpose(1, 2), offs=by_expert.ends))
    rows = torch._grouped_mm(inner, moe.down.transpose(1, 2), offs=by_expert.ends)
    kernels.add_weighted(hidden, rows, by_expert.place, weights)
    if moe.shared is not None:
        moe.shared.add_to(hidden, x, ops)
