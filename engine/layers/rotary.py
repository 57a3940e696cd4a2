"""Rotary position embedding. Angles are computed once a step, in float32, and handed to every layer.

A pair (a, b) of a head's numbers is turned by the angle position * inv_freq: (a cos - b sin, b cos + a sin). With the
halves of a head swapped by `roll`, that is x * cos + roll(x) * (-sin | sin), three operations for all heads together.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import nn

from engine.layers.kinds import RopeSpec


class Rotary(nn.Module):
    inv_freq: torch.Tensor

    def __init__(self, spec: RopeSpec, *, device: torch.device) -> None:
        super().__init__()
        self.magnitude = spec.magnitude
        self.interleaved = spec.interleaved
        self.register_buffer("inv_freq", inverse_frequencies(spec).to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, each [T, 1, dim] float32, for `rotate`."""
        if positions.is_cuda:
            kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]]
            kernel = importlib.import_module("engine.kernels.elementwise").angles
            return kernel(positions, self.inv_freq, self.magnitude)
        return self.plain(positions)

    def plain(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in torch: the kernel's twin."""
        angles = torch.outer(positions.float(), self.inv_freq)  # [T, dim / 2]
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1.0:
            cos, sin = cos.mul_(self.magnitude), sin.mul_(self.magnitude)
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x [T, heads, dim], whose pairs are (i, i + dim / 2)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def deinterleave(x: torch.Tensor) -> torch.Tensor:
    """Reorder pairs (0, 1), (2, 3), ... of the last dimension to (i, i + dim / 2). Queries and keys alike: products keep."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


def inverse_frequencies(spec: RopeSpec) -> torch.Tensor:
    """[dim / 2] float32"""
    plain = 1.0 / spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    if spec.scaling == "linear":
        return plain / spec.factor
    if spec.scaling == "llama3":
        return _llama3(plain, spec)
    if spec.scaling == "yarn":
        return _yarn(plain, spec)
    return plain


def _llama3(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Slow turns are stretched by `factor`, fast ones kept, those between blended."""
    turns = spec.original_max_len * plain / (2 * math.pi)  # within the original context
    keep = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return plain / spec.factor * (1 - keep) + plain * keep


def _yarn(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """The same idea with a ramp over dimensions, from `beta_fast` turns (kept) to `beta_slow` turns (stretched)."""

    def dimension(turns: float) -> float:
        return spec.dim * math.log(spec.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = (torch.arange(spec.dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0.0, 1.0)
    return plain / spec.factor * (1 - keep) + plain * keep
