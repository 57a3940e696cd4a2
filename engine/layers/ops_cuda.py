"""CudaOps: the operations between matrix products as Triton kernels. `PlainOps` of `ops.py` is the twin."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.batch import LayerPools
from engine.kernels import elementwise
from engine.kernels import linear as product
from engine.kernels.latent import latent_prepare
from engine.layers.linear import Norm
from engine.layers.ops import Angles, Ops


class CudaOps:
    """Ops on CUDA. The numbers of a row, and the heads of a token, must be adjacent in memory; rows need not be."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise.norm(x, weight, eps)

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if product.can_norm(x, weight):  # one kernel for a single row and a small weight
            return product.linear(x, weight, bias, norm=norm)
        normed = elementwise.norm(x, *norm)
        return product.linear(normed, weight, bias) if product.fits(normed, weight) else F.linear(normed, weight, bias)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(gate_up)

    def gated(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        if norm is not None and product.can_norm(x, weight):
            return product.gated(x, weight, norm=norm)
        if norm is not None:
            x = elementwise.norm(x, *norm)
        # One kernel for few rows, torch's product and `silu_mul` for more.
        return product.gated(x, weight) if product.fits(x, weight) else elementwise.silu_mul(F.linear(x, weight))

    def norm_rotate(
        self,
        heads: torch.Tensor,
        angles: Angles | None,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        slots: torch.Tensor,
        pools: LayerPools,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return elementwise.norm_rotate(heads, angles, weights, eps, slots, pools)

    def latent_prepare(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        norm: Norm,
        angles: Angles,
        slots: torch.Tensor,
        pool: torch.Tensor,
        *,
        interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return latent_prepare(q, kv, norm, angles, slots, pool, interleaved=interleaved)


def make() -> Ops:
    return CudaOps()
