"""Mixture of experts: routing as pure functions, experts as stacked matrices, and the plain loop over them.

No expert has a capacity: what a token gets does not depend on the tokens beside it.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import nn

from engine.layers.kinds import RoutingSpec
from engine.layers.linear import Norm, Weights, linear, parameter
from engine.layers.mlp import GatedMlp
from engine.layers.ops import Ops


class Routed(NamedTuple):
    """The experts that each token goes to."""

    weights: torch.Tensor  # [T, top_k] float32
    ids: torch.Tensor  # [T, top_k] int64; int32 from `moe_cuda.py`


def route(logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None = None) -> Routed:
    """logits [T, E] -> which experts each token goes to and with what weight. `bias` [E] is of noaux_tc."""
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
    """Set the scores [T, E] outside the best `topk_group` groups to `closed`; a group counts as the sum of its best few."""
    grouped = scores.view(-1, spec.n_group, spec.num_experts // spec.n_group)
    best = grouped.topk(judged_by, -1).values.sum(-1).topk(spec.topk_group, -1).indices  # [T, topk_group]
    shut = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    return grouped.masked_fill(shut.unsqueeze(-1), closed).flatten(1)


def run_experts(x: torch.Tensor, routed: Routed, gate_up: torch.Tensor, down: torch.Tensor, ops: Ops) -> torch.Tensor:
    """x [T, H], gate_up [E, 2 I, H], down [E, H, I] -> [T, H]. Waits for the device to learn which experts have tokens."""
    weights, ids = routed
    order = ids.flatten().argsort(stable=True)  # pairs (token, choice) sorted by expert
    counts = ids.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    parts = torch.split(x[order // ids.shape[1]], counts)
    outs = [linear(ops.silu_mul(linear(p, gate_up[e])), down[e]) for e, p in enumerate(parts) if counts[e]]
    return _weighted_sum(torch.cat(outs), order, weights)


def _weighted_sum(sorted_out: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Experts' outputs [T * top_k, H] in `order`, weights [T, top_k] -> [T, H]. In one product: adding expert by expert into
    the tokens' rows made layers of 1 to 64 tokens a sixth slower on a CPU.
    """
    out = torch.empty_like(sorted_out).index_copy_(0, order, sorted_out)  # back in the order of tokens and choices
    return torch.bmm(weights.to(out.dtype).unsqueeze(1), out.view(*weights.shape, -1)).squeeze(1)


def can_group(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all of a layer runs by `moe_cuda.py`, which never waits for the device."""
    return dtype == torch.bfloat16 and device.type == "cuda"


class _OnCuda(Protocol):
    def add_to(self, hidden: torch.Tensor, moe: MoeMlp, x: torch.Tensor, ops: Ops) -> None: ...


@cache
def _on_cuda() -> _OnCuda:
    on_cuda: _OnCuda = importlib.import_module("engine.layers.moe_cuda")  # by name: it needs Triton
    return on_cuda


class MoeMlp(nn.Module):
    """Router, routed experts and, where `shared_size` is not 0, an MLP that every token takes as well."""

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
        """Add to hidden [T, H], in place, what the experts make of its norm."""
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
