"""A transform for float32 models on a CPU: linear weights in oneDNN's blocked layout, which it reads faster than rows.

Call `pack` once the weights are loaded; a packed model cannot be loaded again. The plain twin is
`linear.linear`.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.linear import HAS_ONEDNN, Linear


class PackedLinear(nn.Module):
    """Takes over a Linear's weight and bias."""

    def __init__(self, plain: Linear) -> None:
        super().__init__()
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach())
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def pack(model: nn.Module) -> int:
    """Replace what can be replaced, one at a time -> how many. Does nothing where oneDNN is not built in."""
    if not HAS_ONEDNN:
        return 0
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    count = 0
    for parent, name, child in found:
        if isinstance(child, Linear) and _fits(child.weight):
            setattr(parent, name, PackedLinear(child))
            count += 1
    return count


def _fits(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"
