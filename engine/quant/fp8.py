"""Weights stored as float8 e4m3 with a float32 scale for each block (DeepSeek-V3's format): back to plain numbers."""

from __future__ import annotations

import torch

SCALE_SUFFIX = "_scale_inv"  # of the tensor that holds the scales of the one named before it


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a matrix; blocks at its lower and right edge may be cut."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """weight [N, M] times the scale of the block each number is in -> float32 [N, M]"""
    rows, columns = weight.shape
    by_row = scale.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float().mul_(by_row.repeat_interleave(block[1], 1)[:, :columns])
