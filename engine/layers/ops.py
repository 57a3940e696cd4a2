"""The small steps between matrix products. `PlainOps` is torch, operation by operation; on CUDA `engine.kernels` has the same
steps as one kernel each. A model takes one of them when it is built.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.layers.rotary import rotate


class Ops(Protocol):
    def add_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add `delta` to `hidden` [T, H] in place; return the root-mean-square norm of the sum."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 I] -> [T, I]: silu of the first half times the second."""
        ...

    def norm_rotate(
        self,
        heads: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_heads: int,
        kv_heads: int,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `heads` [T, q + k + v heads, dim], which may be overwritten, the q and the k heads, normed where `weights` has
        their two, then turned by cos and sin [T, 1, dim], which are `Rotary`'s.
        """
        ...


class PlainOps:
    def add_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if delta is not None:
            hidden += delta
        return F.rms_norm(hidden, hidden.shape[-1:], weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def norm_rotate(
        self,
        heads: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_heads: int,
        kv_heads: int,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if weights is None:
            turned = rotate(heads[:, : q_heads + kv_heads], cos, sin)
            return turned[:, :q_heads], turned[:, q_heads:]
        size = heads.shape[-1:]
        q = F.rms_norm(heads[:, :q_heads], size, weights[0], eps)
        k = F.rms_norm(heads[:, q_heads : q_heads + kv_heads], size, weights[1], eps)
        return rotate(q, cos, sin), rotate(k, cos, sin)


def ops_for(device: torch.device, head_dim: int | None) -> Ops:
    """`head_dim` None: no head is turned by `norm_rotate`. A kernel wants a power of two."""
    if device.type != "cuda" or (head_dim is not None and head_dim & (head_dim - 1)):
        return PlainOps()
    ops: Ops = importlib.import_module("engine.kernels.elementwise")  # a module with the three functions is an Ops
    return ops
