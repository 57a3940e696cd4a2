"""The gated MLP: down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.linear import Linear, Norm, Weights
from engine.layers.ops import Ops


class GatedMlp(nn.Module):
    def __init__(self, hidden: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.gate_up_proj = Linear(hidden, 2 * size, dtype=dtype, device=device)
        self.down_proj = Linear(size, hidden, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor, norm: Norm, ops: Ops) -> None:
        """Root-mean-square normalise hidden [T, H], apply the MLP, and add the result to hidden in place."""
        self.down_proj.add_to(hidden, ops.gated(hidden, self.gate_up_proj.weight, norm))

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor, ops: Ops) -> None:
        """Apply the MLP to x [T, H] without a norm, and add the result to hidden [T, H] in place."""
        self.down_proj.add_to(hidden, ops.gated(x, self.gate_up_proj.weight))

    def weights(self, prefix: str) -> Weights:
        return {
            **self.gate_up_proj.weights({f"{prefix}gate_proj": self.size, f"{prefix}up_proj": self.size}),
            **self.down_proj.weights({f"{prefix}down_proj": self.down_proj.weight.shape[0]}),
        }
