"""Rotary position embedding. The angles are computed once per step, in float32, and passed to every layer.

A pair (a, b) of a head's numbers is rotated by the angle position * inv_freq: (a cos - b sin, b cos + a sin). `roll` swaps
the two halves of a head, so rotating all heads is x * cos + roll(x) * (-sin | sin): three operations. If only the first `dim`
numbers of a head are rotated, cos and sin have `dim` numbers, and the rest of the head passes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import nn

from engine.kernels.hardware import is_gpu
from engine.layers.kinds import RopeSpec


class Rotary(nn.Module):
    inv_freq: torch.Tensor

    def __init__(self, spec: RopeSpec, *, device: torch.device) -> None:
        super().__init__()
        self.magnitude = spec.magnitude
        self.interleaved = spec.interleaved
        self.query_beta, self.original_max_len = spec.query_beta, spec.original_max_len
        self.register_buffer("inv_freq", inverse_frequencies(spec).to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin of positions [T], each [T, 1, dim] float32, as `rotate` takes them."""
        if is_gpu(positions.device):
            kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]]
            kernel = importlib.import_module("engine.kernels.elementwise").angles
            return kernel(positions, self.inv_freq, self.magnitude)
        return self.plain(positions)

    def plain(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cos and signed sin of positions [T] in plain torch. Tests compare the CUDA kernel with this method."""
        angles = torch.outer(positions.float(), self.inv_freq)  # [T, dim / 2]
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1.0:
            cos, sin = cos.mul_(self.magnitude), sin.mul_(self.magnitude)
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)

    def query_scale(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return the factor [T, 1, 1] of the queries at positions [T], or None if the model has none.

        It is 1 within the original context, and grows with the logarithm of the position beyond it.
        """
        if not self.query_beta:
            return None
        spans = torch.floor(positions / self.original_max_len)
        return (1 + self.query_beta * torch.log(1 + spans)).view(-1, 1, 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dim numbers of each head of x [T, heads, size]; cos has dim numbers. i and i + dim / 2 form a pair."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def deinterleave(x: torch.Tensor) -> torch.Tensor:
    """Reorder the last dimension so that the pairs (0, 1), (2, 3), ... become (i, i + dim / 2).

    Queries and keys are both reordered, so their dot products do not change.
    """
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


def inverse_frequencies(spec: RopeSpec) -> torch.Tensor:
    """Return the rotation per position of each pair, in radians, after scaling: [dim / 2] float32."""
    plain = 1.0 / spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    if spec.scaling == "linear":
        return plain / spec.factor
    if spec.scaling == "llama3":
        return _llama3(plain, spec)
    if spec.scaling == "yarn":
        return _yarn(plain, spec)
    return plain


def _llama3(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Scale frequencies as Llama 3 does: divide low ones by `factor`, keep high ones, and blend the ones between."""
    rotations = spec.original_max_len * plain / (2 * math.pi)  # full rotations within the original context
    keep = (rotations - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return plain / spec.factor * (1 - keep) + plain * keep


def _yarn(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Scale frequencies as YaRN does: keep those of `beta_fast` rotations or more, divide those of `beta_slow` or fewer.

    The scaling between is a linear ramp over dimensions.
    """

    def dimension(rotations: float) -> float:
        return spec.dim * math.log(spec.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = (torch.arange(spec.dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0.0, 1.0)
    return plain / spec.factor * (1 - keep) + plain * keep
