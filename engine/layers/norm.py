"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine.layers.linear import Norm, parameter


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype, device=device)
        self.eps = eps

    @property
    def params(self) -> Norm:
        """Weight and epsilon of a norm, for the methods of `Ops` that fuse the norm with another operation."""
        return self.weight, self.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
