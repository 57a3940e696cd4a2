"""Mixture of experts in plain torch: routing as pure functions, expert weights as stacked matrices, and a loop over experts.

No expert has a capacity limit, so a token's output does not depend on the other tokens of its step.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import nn

from engine.kernels.hardware import is_gpu
from engine.layers.kinds import RoutingSpec
from engine.layers.linear import Norm, Weights, linear, parameter
from engine.layers.mlp import GatedMlp
from engine.layers.ops import Ops


class Routed(NamedTuple):
    """The experts that each token is routed to, and their weights."""

    weights: torch.Tensor  # [T, top_k] float32: the weight of each chosen expert
    ids: torch.Tensor  # [T, top_k] int64, or int32 from `moe_cuda.py`: the chosen experts


def route(logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None = None) -> Routed:
    """Choose experts and weights for each token from its router logits [T, E]. Only noaux_tc has a `bias` [E]."""
    if spec.method == "noaux_tc":
        scores = logits.float().sigmoid()
        choice = scores if bias is None else scores + bias
        ids = _within_best_groups(choice, spec, judged_by=2, closed=float("-inf")).topk(spec.top_k, -1).indices
        weights = scores.gather(-1, ids)
    else:
        scores = logits.float().softmax(-1)
        if spec.method == "group_limited_greedy":
            scores = _within_best_groups(scores, spec, judged_by=1, closed=0.0)
        weights, ids = scores.topk(spec.top_k, -1)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routed(weights * spec.scale, ids)


def _within_best_groups(scores: torch.Tensor, spec: RoutingSpec, *, judged_by: int, closed: float) -> torch.Tensor:
    """Replace the scores [T, E] of experts outside the best `topk_group` groups by `closed`.

    A group's score is the sum of its best `judged_by` experts.
    """
    grouped = scores.view(-1, spec.n_group, spec.num_experts // spec.n_group)
    best = grouped.topk(judged_by, -1).values.sum(-1).topk(spec.topk_group, -1).indices  # [T, topk_group] groups
    shut = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    return grouped.masked_fill(shut.unsqueeze(-1), closed).flatten(1)


def run_experts(x: torch.Tensor, routed: Routed, gate_up: torch.Tensor, down: torch.Tensor, ops: Ops) -> torch.Tensor:
    """Apply the routed experts to x [T, H], with gate_up [E, 2 I, H] and down [E, H, I] -> [T, H].

    The call waits for the device, since the host must know which experts have tokens.
    """
    weights, ids = routed
    order = ids.flatten().argsort(stable=True)  # pairs (token, choice) sorted by expert
    counts = ids.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    parts = torch.split(x[order // ids.shape[1]], counts)
    outs = [linear(ops.silu_mul(linear(p, gate_up[e])), down[e]) for e, p in enumerate(parts) if counts[e]]
    return _weighted_sum(torch.cat(outs), order, weights)


def _weighted_sum(sorted_out: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the weighted sum of each token's expert outputs -> [T, H].

    sorted_out [T * top_k, H] are the outputs in the order `order`, and weights [T, top_k] their weights. One batched product
    computes the sums. Adding each expert's rows to the tokens' rows made layers of 1 to 64 tokens a sixth slower
    on a CPU.
    """
    out = torch.empty_like(sorted_out).index_copy_(0, order, sorted_out)  # back in the order (token, choice)
    return torch.bmm(weights.to(out.dtype).unsqueeze(1), out.view(*weights.shape, -1)).squeeze(1)


def can_group(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `moe_cuda.py` can run a whole expert layer. That module never waits for the device."""
    return dtype == torch.bfloat16 and is_gpu(device)


class _OnCuda(Protocol):
    def add_to(self, hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, ops: Ops) -> None: ...


@cache
def _on_cuda() -> _OnCuda:
    on_cuda: _OnCuda = importlib.import_module("engine.layers.moe_cuda")  # imported by name, since the module needs Triton
    return on_cuda


class MoeMlp(nn.Module):
    """A mixture of experts in place of an MLP: a router, routed experts, and shared experts unless `shared_size` is 0.

    The shared experts are one MLP that is applied to every token.
    """

    def __init__(
        self,
        routing: RoutingSpec,
        hidden: int,
        size: int,
        *,
        shared_size: int = 0,
        router_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.routing = routing
        self.size = size
        experts = routing.num_experts
        self.router = parameter(experts, hidden, dtype=router_dtype, device=device)
        corrected = routing.method == "noaux_tc"
        self.choice_bias = parameter(experts, dtype=torch.float32, device=device) if corrected else None
        self.gate_up = parameter(experts, 2 * size, hidden, dtype=dtype, device=device)
        self.down = parameter(experts, hidden, size, dtype=dtype, device=device)
        self.shared = GatedMlp(hidden, shared_size, dtype=dtype, device=device) if shared_size else None

    def forward(self, hidden: torch.Tensor, norm: Norm, ops: Ops) -> None:
        """Root-mean-square normalise hidden [T, H], apply routed and shared experts, and add the result to hidden in place."""
        x = ops.norm(hidden, *norm)
        if can_group(x.dtype, x.device):
            _on_cuda().add_to(hidden, self, x, ops)
            return
        routed = route(linear(x.to(self.router.dtype), self.router), self.routing, self.choice_bias)
        hidden += run_experts(x, routed, self.gate_up, self.down, ops)
        if self.shared is not None:
            self.shared.add_to(hidden, x, ops)

    def weights(self, prefix: str) -> Weights:
        out: Weights = {f"{prefix}gate.weight": self.router}
        if self.choice_bias is not None:
            out[f"{prefix}gate.e_score_correction_bias"] = self.choice_bias
        for e in range(self.routing.num_experts):
            out[f"{prefix}experts.{e}.gate_proj.weight"] = self.gate_up[e, : self.size]
            out[f"{prefix}experts.{e}.up_proj.weight"] = self.gate_up[e, self.size :]
            out[f"{prefix}experts.{e}.down_proj.weight"] = self.down[e]
        return out if self.shared is None else out | self.shared.weights(f"{prefix}shared_experts.")
