"""The small operations between a model's matrix products on CUDA, by Triton kernels. `PlainOps` in `ops.py` is the plain twin."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.batch import LayerPools
from engine.kernels import elementwise, linear
from engine.kernels.latent_prepare import latent_prepare
from engine.layers.linear import Norm
from engine.layers.ops import Angles, Ops


class CudaOps:
    """The small operations of a model on CUDA. Implements Ops.

    Most operations are one kernel. A product with few rows is fused with its norm or SwiGLU.
    """

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise.norm(x, weight, eps)

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Norm x, then multiply by the weight: in one kernel for a single row and a small weight.

        Otherwise the norm is a kernel of its own, and the product is another kernel or torch's.
        """
        if linear.can_norm(x, weight):
            return linear.linear(x, weight, bias, norm=norm)
        normed = elementwise.norm(x, *norm)
        return linear.linear(normed, weight, bias) if linear.fits(normed, weight) else F.linear(normed, weight, bias)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(gate_up)

    def gated(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """Compute the gated product: in one kernel, the norm included, for a single row and a small weight.

        Otherwise the norm is a kernel of its own. Few rows then take one more kernel, and more rows take torch's product and then
        `silu_mul`.
        """
        if norm is not None and linear.can_norm(x, weight):
            return linear.gated(x, weight, norm=norm)
        if norm is not None:
            x = elementwise.norm(x, *norm)
        return linear.gated(x, weight) if linear.fits(x, weight) else elementwise.silu_mul(F.linear(x, weight))

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
