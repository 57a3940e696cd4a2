"""Linear: y = x W^T + b over weights that are allocated empty and filled by the loader.

Our own, so that quantisation, tensor parallelism and LoRA can replace it in a finished model.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

ONEDNN_FROM = 1 << 19  # numbers in a weight: see `linear`

Weights = dict[str, torch.Tensor]
"""Checkpoint name -> the tensor, often a slice of a fused parameter, that holds it."""

Norm = tuple[torch.Tensor, float]
"""Weight [size] and eps of a root-mean-square norm."""


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An empty parameter that is never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class _Kernels(Protocol):
    def fits(self, x: torch.Tensor, weight: torch.Tensor) -> bool: ...

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def add_linear(
        self, hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None: ...


@cache
def _kernels() -> _Kernels:
    kernels: _Kernels = importlib.import_module("engine.kernels.linear")  # a machine without CUDA may have no Triton
    return kernels


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """F.linear, in `out` where given (for x [T, K] and no bias). On CUDA, few rows in bfloat16 go to kernels of our own.

    In float32 on a CPU a large weight goes to oneDNN: torch's default there, MKL, runs one-row products on one core
    and was half as fast on AMD with 1, 16 and 64 rows. Each call of oneDNN costs 20 us, which a small weight does not earn back.
    """
    if x.is_cuda and _kernels().fits(x, weight):
        return _kernels().linear(x, weight, bias, out)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    if x.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONEDNN and weight.numel() >= ONEDNN_FROM:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def add_linear(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """hidden [T, N] += `linear` of x [T, K], in place. On CUDA the product adds as it writes, in its own float32, but for
    many rows with a bias.
    """
    if x.is_cuda and _kernels().fits(x, weight):
        _kernels().add_linear(hidden, x, weight, bias)
    elif x.is_cuda and bias is None:
        hidden.addmm_(x, weight.t())
    else:
        hidden += linear(x, weight, bias)


class NormLinear(Protocol):
    """Of an `Ops`, what a Linear wants."""

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...


class Linear(nn.Module):
    """`weight` is [out, in]. `weights` names the row ranges of a fused one, as checkpoints know them."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(out_size, in_size, dtype=dtype, device=device)
        self.bias = parameter(out_size, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def of_norm(self, x: torch.Tensor, norm: Norm, ops: NormLinear) -> torch.Tensor:
        """The product of the norm of x [T, in], whose rows may lie apart -> [T, out]"""
        return ops.norm_linear(x, norm, self.weight, self.bias)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """hidden [T, out] += the product of x [T, in], in place"""
        add_linear(hidden, x, self.weight, self.bias)

    def weights(self, rows: dict[str, int]) -> Weights:
        """`rows` maps each checkpoint name to its number of output rows, in order."""
        names, sizes = list(rows), list(rows.values())
        out = {f"{n}.weight": w for n, w in zip(names, torch.split(self.weight, sizes), strict=True)}
        if self.bias is not None:
            out |= {f"{n}.bias": b for n, b in zip(names, torch.split(self.bias, sizes), strict=True)}
        return out
