"""The small operations between matrix products: `PlainOps` by torch, `CudaOps` in `ops_cuda.py` with a kernel for each.

A model chooses one of the two when it is built (`ops_for`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.batch import LayerPools
from engine.layers.linear import Norm, linear
from engine.layers.rotary import deinterleave, rotate

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of each token's position, [T, 1, dim] float32, as `Rotary` gives them."""


class Ops(Protocol):
    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The root-mean-square norm of x [T, size], whose rows may lie apart."""
        ...

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K], weight [N, K], bias [N] -> [T, N]: the product of the norm of x, whose rows may lie apart."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 I] -> [T, I]: silu of the first half times the second."""
        ...

    def gated(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """x [T, H], weight [2 I, H] -> [T, I]: `silu_mul` of their product, or of that of the norm of x."""
        ...

    def norm_rotate(
        self,
        heads: torch.Tensor,
        angles: Angles | None,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        slots: torch.Tensor,
        pools: LayerPools,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From `heads` [T, q + k + v heads, dim], which may be overwritten, the q, k and v heads: q and k normed where
        `weights` has their two, then turned where there are `angles`. k and v are written to their `slots` [T] of the pools.
        """
        ...

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
        """Queries and records of latent attention, from q [T, heads, nope + rope] and kv [T, rank + rope], which may be
        overwritten: the last `rope` numbers of both turned, the first `rank` of kv normed by `norm`.
        The records are written to their `slots` [T] of the pool. `interleaved`: a pair to turn lies side by side, and is put
        half a head apart as it is turned.
        """
        ...


class PlainOps:
    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(self.norm(x, *norm), weight, bias)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gated(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        return self.silu_mul(linear(x if norm is None else self.norm(x, *norm), weight))

    def norm_rotate(
        self,
        heads: torch.Tensor,
        angles: Angles | None,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        slots: torch.Tensor,
        pools: LayerPools,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kv_heads, size = pools["k"].shape[2], heads.shape[-1:]
        q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        if weights is None and angles is not None:  # q and k are side by side: one pass for both
            q, k = torch.split(rotate(heads[:, :-kv_heads], *angles), [q.shape[1], kv_heads], 1)
        elif weights is not None:
            q, k = F.rms_norm(q, size, weights[0], eps), F.rms_norm(k, size, weights[1], eps)
            if angles is not None:
                q, k = rotate(q, *angles), rotate(k, *angles)
        write(pools["k"], k, slots)
        write(pools["v"], v, slots)
        return q, k, v

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
        weight, eps = norm
        rank = weight.shape[0]
        nope = q.shape[2] - (kv.shape[1] - rank)
        key, q_rope = kv[:, None, rank:], q[..., nope:]  # [T, 1, rope], [T, heads, rope]
        if interleaved:
            key, q_rope = deinterleave(key), deinterleave(q_rope)
        q = torch.cat((q[..., :nope], rotate(q_rope, *angles)), -1)
        latent = torch.cat((self.norm(kv[:, :rank], weight, eps), rotate(key, *angles)[:, 0]), -1)
        write(pool, latent, slots)
        return q, latent


def write(pool: torch.Tensor, records: torch.Tensor, slots: torch.Tensor) -> None:
    """Write records [T, *shape] to their slots [T] of a pool [num_blocks, block_size, *shape]."""
    pool.flatten(0, 1).index_copy_(0, slots, records)


def ops_for(device: torch.device, rotary_dim: int) -> Ops:
    """`rotary_dim`: what is turned of a head. A kernel wants a power of two."""
    if device.type != "cuda" or rotary_dim & (rotary_dim - 1):
        return PlainOps()
    make: Callable[[], Ops] = importlib.import_module("engine.layers.ops_cuda").make  # by name: it needs Triton
    return make()
