"""Weights stored as float8 e4m3 with a float32 scale for each block (DeepSeek-V3's format): to it, and back to
plain numbers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

SCALE_SUFFIX = "_scale_inv"  # of the tensor that holds the scales of the one named before it
E4M3_MAX = 448.0


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix; blocks at its lower and right edge may be cut."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """weight [N, M] times the scale of the block each number is in -> float32 [N, M]"""
    rows, columns = weight.shape
    by_row = scale.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float().mul_(by_row.repeat_interleave(block[1], 1)[:, :columns])


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, M] -> e4m3 [N, M] and float32 [ceil(N / rows), ceil(M / columns)], what `dequantize` multiplies each block by.

    Each block's largest number becomes 448. A block of zeros has scale 1. Raises ValueError for a number that is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("weight has numbers that are not finite: a block with one of them has no scale")
    rows, columns = weight.shape
    down, right = scale_shape((rows, columns), block)
    padded = F.pad(weight.float(), (0, right * block[1] - columns, 0, down * block[0] - rows))
    blocks = padded.view(down, block[0], right, block[1])
    scale = blocks.abs().amax((1, 3)) / E4M3_MAX  # [down, right]
    scale = torch.where(scale > 0, scale, 1.0)
    # A scale among the smallest float32 numbers is rounded, and 448 may be passed: e4m3 has no infinity but NaN there.
    scaled = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale
