"""Linear layers, which compute y = x W^T + b. Weights are allocated empty, and the loader fills them.

The class is our own rather than torch's, so that quantisation, tensor parallelism and LoRA can replace it in a built model.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from engine.kernels.hardware import is_gpu

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

ONEDNN_FROM = 1 << 19  # smallest weight, in numbers, that `linear` gives to oneDNN

Weights = dict[str, torch.Tensor]
"""Maps the name of a checkpoint tensor to the tensor that it fills, which is often a slice of a fused parameter."""

Norm = tuple[torch.Tensor, float]
"""Weight [size] and epsilon of a root-mean-square norm."""


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Allocate an uninitialised parameter without a gradient."""
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
    kernels: _Kernels = importlib.import_module("engine.kernels.linear")  # imported by name, since Triton may be missing
    return kernels


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute x [..., K] times weight [N, K] transposed, plus bias [N] -> [..., N].

    `out` may only be given for x [T, K] without a bias.

    On CUDA a bfloat16 product of few rows runs in our own kernels. On a CPU a large float32 weight goes to oneDNN, since
    torch's default there (MKL) runs one-row products on one core and was half as fast on AMD with 1, 16 and 64 rows. A call
    of oneDNN costs 20 us, so small weights stay with MKL.
    """
    if is_gpu(x.device) and _kernels().fits(x, weight):
        return _kernels().linear(x, weight, bias, out)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    if x.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONEDNN and weight.numel() >= ONEDNN_FROM:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def add_linear(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Add `linear(x, weight, bias)` of x [T, K] to hidden [T, N] in place.

    On CUDA the kernel adds its float32 sums as it writes them, except for many rows with a bias, which take a second pass.
    """
    if is_gpu(x.device) and _kernels().fits(x, weight):
        _kernels().add_linear(hidden, x, weight, bias)
    elif is_gpu(x.device) and bias is None:
        hidden.addmm_(x, weight.t())
    else:
        hidden += linear(x, weight, bias)


class NormLinear(Protocol):
    """The part of `Ops` that a Linear uses: one method."""

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...


class Linear(nn.Module):
    """A linear layer with weight [out, in] and an optional bias [out]. It may fuse several layers of a checkpoint row-wise."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(out_size, in_size, dtype=dtype, device=device)
        self.bias = parameter(out_size, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def of_norm(self, x: torch.Tensor, norm: Norm, ops: NormLinear) -> torch.Tensor:
        """Root-mean-square normalise x [T, in], then apply the layer -> [T, out]. The rows of x need not be contiguous."""
        return ops.norm_linear(x, norm, self.weight, self.bias)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Add the layer's output for x [T, in] to hidden [T, out] in place."""
        add_linear(hidden, x, self.weight, self.bias)

    def weights(self, rows: dict[str, int]) -> Weights:
        """Split the fused weight: `rows` maps each checkpoint layer's name to its number of output rows, in order."""
        names, sizes = list(rows), list(rows.values())
        out = {f"{n}.weight": w for n, w in zip(names, torch.split(self.weight, sizes), strict=True)}
        if self.bias is not None:
            out |= {f"{n}.bias": b for n, b in zip(names, torch.split(self.bias, sizes), strict=True)}
        return out
