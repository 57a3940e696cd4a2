"""Quantises weights to float8 e4m3 with a float32 scale for each block (DeepSeek-V3's format), and dequantises them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

SCALE_SUFFIX = "_scale_inv"  # a checkpoint holds the scales of weight NAME in tensor NAME_scale_inv
E4M3_MAX = 448.0


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix [rows, columns]. Blocks at the matrix's lower and right edge may be partial."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each number of weight [N, M] by the scale of its block -> float32 [N, M]."""
    rows, columns = weight.shape
    by_row = scale.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float().mul_(by_row.repeat_interleave(block[1], 1)[:, :columns])


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise weight [N, M] -> e4m3 [N, M] and the scales for `dequantize`, float32 [ceil(N / rows), ceil(M / columns)].

    The largest magnitude of each block becomes 448. A block of zeros has scale 1. Raises ValueError if weight holds NaN or
    infinity.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or infinity, for which no scale exists")
    rows, columns = weight.shape
    down, right = scale_shape((rows, columns), block)
    padded = F.pad(weight.float(), (0, right * block[1] - columns, 0, down * block[0] - rows))
    blocks = padded.view(down, block[0], right, block[1])
    scale = blocks.abs().amax((1, 3)) / E4M3_MAX  # [ceil(N / rows), ceil(M / columns)]
    scale = torch.where(scale > 0, scale, 1.0)
    # A denormal scale is rounded, so a quotient may exceed 448. e4m3 has no infinity, and would store such a quotient as NaN.
    scaled = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale
