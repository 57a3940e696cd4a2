"""Benchmark launches of routing and experts in DeepSeek-V2-Lite's layer: 6 experts a token, 2 shared experts, a float32 router.

The kernels are launched as `layers.moe_cuda` launches them. This file repeats the tiles of that module, since kernels may not
import layers; a test compares the two. The bound counts the weights of every expert that some token chose, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.kernels import elementwise, routing
from engine.kernels.cases.base import Launch, random
from engine.kernels.experts import ExpertWeights, add_weighted, count_shared, spread
from engine.kernels.experts_few import Strip, few_down, few_up
from engine.kernels.experts_tiles import Tile, tiles_down, tiles_up
from engine.kernels.sort_pairs import sort_pairs

TOP_K = 6
NUM_SHARED = 2
STRIP = Strip(1, 512, 1)
TILE = Tile(128, 64, 8, 4, 99)
SORT_BLOCK = 128  # block size of the sort before torch's grouped product, which does not use the blocks


class Mixture(NamedTuple):
    """Random expert weights, tokens, and routing of the tokens to experts."""

    x: torch.Tensor  # [tokens, hidden]: the tokens
    experts: ExpertWeights
    shared: ExpertWeights | None
    weights: torch.Tensor  # [tokens, TOP_K] float32: the weight of each token's experts
    ids: torch.Tensor  # [tokens, TOP_K] int32: each token's experts

    def launch(self, run: Callable[[], object]) -> Launch:
        """Make a Launch of `run`. Its bytes are the weights of all chosen experts, the tokens, the routing and the results."""
        gate_up, down = self.experts
        tokens, num_shared = self.x.shape[0], count_shared(self.shared, down.shape[2])
        expert = gate_up[0].numel() + down[0].numel()
        num_read = int(self.ids.unique().numel()) + num_shared
        num_bytes = num_read * expert * down.itemsize + 3 * self.x.nbytes + self.weights.nbytes + self.ids.nbytes
        return Launch(run, num_bytes, 2 * tokens * (TOP_K + num_shared) * expert)


def _mixture(device: torch.device, tokens: int, experts: int, hidden: int, size: int, *, shared: int) -> Mixture:
    pair = random(device, experts, 2 * size, hidden), random(device, experts, hidden, size)
    weights, ids = torch.rand(tokens, experts, device=device).topk(TOP_K)
    together = (random(device, 2 * shared * size, hidden), random(device, hidden, shared * size)) if shared else None
    return Mixture(random(device, tokens, hidden), pair, together, weights, ids.int())


def few(device: torch.device, tokens: int, experts: int, hidden: int, size: int) -> Launch:
    """Make a launch of the routed and shared experts of a few tokens, with the kernels of `experts_few.py`."""
    mixture = _mixture(device, tokens, experts, hidden, size, shared=NUM_SHARED)
    x, pair, shared, weights, ids = mixture
    out = torch.zeros_like(x)

    def run() -> torch.Tensor:
        hidden_rows = few_up(x, ids, pair, shared, STRIP)
        few_down(out, hidden_rows, (weights, ids), pair, shared, STRIP)
        return out

    return mixture.launch(run)


def cut(tokens: int, experts: int) -> tuple[int, int]:
    """Choose the cut for up to 32 (token, expert) pairs an expert on average.

    Returns (pairs of a block, shared experts that are computed as further routed experts).
    """
    pairs = tokens * TOP_K / experts
    return (16 if pairs <= 5 else 32), (NUM_SHARED if pairs <= 10 else 0)


def tiles(device: torch.device, tokens: int, experts: int, hidden: int, size: int) -> Launch:
    """Make a launch of the experts in blocks of (token, expert) pairs, without the sort.

    The launch includes shared experts if `cut` says so. Otherwise the layer computes the shared experts as an MLP of their own.
    """
    block, num_shared = cut(tokens, experts)
    mixture = _mixture(device, tokens, experts, hidden, size, shared=num_shared)
    x, pair, shared, weights, ids = mixture
    out = torch.zeros_like(x)
    by_expert = sort_pairs(ids, experts, block, num_shared)

    def run() -> torch.Tensor:
        hidden_rows = tiles_up(x, TOP_K, by_expert, block, pair, shared, TILE)
        rows = tiles_down(hidden_rows, by_expert, block, pair, shared, TILE)
        add_weighted(out, rows, by_expert.place, weights)
        return out

    return mixture.launch(run)


def grouped(device: torch.device, tokens: int, experts: int, hidden: int, size: int) -> Launch:
    """Make a launch of the routed experts by torch's grouped product, without the sort."""
    mixture = _mixture(device, tokens, experts, hidden, size, shared=0)
    x, (gate_up, down), _, weights, ids = mixture
    out = torch.zeros_like(x)
    by_expert = sort_pairs(ids, experts, SORT_BLOCK)

    def run() -> torch.Tensor:
        at_places = spread(x, by_expert.place)
        hidden_rows = elementwise.silu_mul(torch._grouped_mm(at_places, gate_up.transpose(1, 2), offs=by_expert.ends))
        rows = torch._grouped_mm(hidden_rows, down.transpose(1, 2), offs=by_expert.ends)
        add_weighted(out, rows, by_expert.place, weights)
        return out

    return mixture.launch(run)


def logits(device: torch.device, tokens: int, experts: int, hidden: int) -> Launch:
    x, router = random(device, tokens, hidden), torch.randn(experts, hidden, device=device)
    num_bytes = x.nbytes + router.nbytes + tokens * experts * router.itemsize
    operations = 3 * 2 * tokens * experts * hidden  # a float32 router is multiplied as three bfloat16 parts
    return Launch(lambda: routing.router_logits(x, router), num_bytes, operations)


def route(device: torch.device, tokens: int, experts: int, hidden: int) -> Launch:
    parts = routing.router_logits(random(device, tokens, hidden), torch.randn(experts, hidden, device=device))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return routing.route(
            parts, None, method="greedy", top_k=TOP_K, groups=(1, 1), normalize=False, scale=1.0, router_dtype=torch.float32
        )

    return Launch(run, parts.nbytes + tokens * TOP_K * 8, 0)


def sort(device: torch.device, tokens: int, experts: int, block: int, shared: int) -> Launch:
    ids = torch.rand(tokens, experts, device=device).topk(TOP_K).indices.int()
    return Launch(lambda: sort_pairs(ids, experts, block, shared), 3 * ids.nbytes + 4 * (experts + shared), 0)
