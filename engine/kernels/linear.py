"""Chooses and launches the kernel for a matrix product with few rows, y = x W^T. Such products take most of a decode step's time.

    rows of x   kernel                        how
    1, 2        `gemv.py`                     plain arithmetic; a program reads a few whole rows of W
    3 .. 128    `skinny.py`                   tensor cores, with W as the left operand; K is split if N gives too few programs
    more, or other types than bfloat16        torch (cuBLAS); also 65 to 128 rows unless W has 100 Mi numbers or more

`linear_tiles.py` chooses kernel and tiles by a bucket of row counts. Within a bucket, the result of a row does not depend on the
number of rows. Fused extras (`product.Extras`): gate and up with SwiGLU, adding to the residual stream, and the norm of a single
row.
"""

from __future__ import annotations

import torch

from engine.kernels.gemv import launch_gemv
from engine.kernels.hardware import is_gpu
from engine.kernels.linear_tiles import GEMV_ROWS, MAX_ROWS, MOST_NORMED, Gemv, Skinny, choose, is_ours
from engine.kernels.product import Extras, Norm
from engine.kernels.skinny import launch_skinny

K_MULTIPLE = 16  # K must be a multiple: every row of W then begins on a 32-byte boundary, and loads are 16 bytes wide


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gemv.py` or `skinny.py` should compute the product of x [..., K] and weight [N, K].

    They should for bfloat16 on CUDA with K a multiple of 16 and 1 to 128 rows, except where cuBLAS is faster (`is_ours`).
    """
    size = x.shape[-1]
    return (
        0 < x.numel() <= MAX_ROWS * size
        and is_gpu(x.device)
        and x.dtype == weight.dtype == torch.bfloat16
        and size % K_MULTIPLE == 0
        and weight.is_contiguous()
        and is_ours(x.numel() // size, *weight.shape)
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
) -> torch.Tensor:
    """Compute x W^T + bias, [..., N], from x [..., K], weight [N, K] and bias [N]. Sums are in float32.

    The result is written to `out` if that is given. The arguments must pass `fits`. With `norm`, x must be a single row, which is
    root-mean-square normalised before the product; the normed row stays in float32 and is not rounded.
    """
    return _product(x, weight, bias, out, Extras(norm=norm))


def add_linear(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Add x W^T + bias to the contiguous hidden [..., N], with one rounding at the end. x and weight must pass `fits`."""
    _product(x, weight, bias, hidden, Extras(add=True))


def gated(x: torch.Tensor, weight: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
    """Compute silu(x G^T) * (x U^T), [..., I], from x [..., K] and weight [2 I, K], whose rows are G and then U.

    The arguments must pass `fits`. `norm` has the same meaning as in `linear`.
    """
    return _product(x, weight, None, None, Extras(gated=True, norm=norm))


def can_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product's kernel should also norm x [..., K]: it should if x is one row and weight [N, K] is small.

    With a separate norm kernel, the product's first weights load while the norm runs (`launch.py`). For a large weight this gains
    more than fusing saves: a llama-8b layer takes 108.7 us with separate norms and 109.1 us with fused ones (docs/gpu.md).
    """
    return fits(x, weight) and x.numel() == x.shape[-1] and weight.numel() < MOST_NORMED


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None, extras: Extras
) -> torch.Tensor:
    outputs = weight.shape[0] // 2 if extras.gated else weight.shape[0]
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if out is None:
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    config = choose(flat.shape[0], *weight.shape, gated=extras.gated)
    launch(flat, weight, bias, out.view(-1, outputs), config, extras)
    return out


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Gemv | Skinny,
    extras: Extras,
) -> None:
    """Compute the product of x [M, K] with the kernel and tiles of `config`, and write it to `out` [M, outputs] or add it there.

    The rows of x need not be adjacent. Raises ValueError for rows or extras that the kernel of `config` does not have.
    """
    if extras.norm is not None and x.shape[0] > 1:
        raise ValueError(f"a fused norm takes one row of x, not {x.shape[0]}")
    if extras.add and extras.gated:
        raise ValueError("no kernel both gates and adds: `add` and `gated` exclude each other")
    if isinstance(config, Gemv):
        if x.shape[0] > GEMV_ROWS:
            raise ValueError(f"{config} takes {GEMV_ROWS} rows at most, not {x.shape[0]}")
        launch_gemv(x, weight, bias, out, config, extras)
    else:
        if extras.norm is not None:
            raise ValueError(f"{config} has no fused norm: only the GEMV kernel does")
        launch_skinny(x, weight, bias, out, config, extras)
