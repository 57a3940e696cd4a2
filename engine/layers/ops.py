"""The small operations between a model's matrix products: norms, rotary embedding, KV writes and SwiGLU.

`PlainOps` is plain torch. `CudaOps` of `ops_cuda.py` runs each operation as one Triton kernel. A model gets one of the two when
it is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.batch import LayerPools
from engine.kernels.hardware import is_gpu
from engine.layers.linear import Norm, linear
from engine.layers.rotary import deinterleave, rotate

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of each token's position, each [T, 1, rotary dim] float32, as computed by `Rotary`."""


class Ops(Protocol):
    """The small operations between a model's matrix products. T is the number of tokens, and each row is a token."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square normalise each row of x [T, size]. The rows of x need not be adjacent in memory."""
        ...

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Root-mean-square normalise x [T, K], multiply it by weight [N, K] and add bias [N] -> [T, N].

        The rows of x need not be adjacent in memory.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Multiply the silu of the first half of each row of gate_up [T, 2 I] by the second half -> [T, I]."""
        ...

    def gated(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """Compute `silu_mul` of the product of x [T, H] and weight [2 I, H] -> [T, I]. With `norm`, x is normed first."""
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
        """Split heads [T, q + k + v heads, dim], which may be overwritten, into q, k and v. Norm and rotate q and k.

        q and k are normed only if `weights` has their two weights, and rotated only if `angles` are given. If the angles have
        fewer numbers than a head, only its first numbers are rotated. k and v are written to `slots` [T] of the KV pools.
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
        """Prepare queries and KV records of latent attention, from q [T, heads, nope + rope] and kv [T, rank + rope].

        q and kv may be overwritten. The last `rope` numbers of q and kv are rotated, and the first `rank` numbers of kv are
        normed by `norm`. The records are written to `slots` [T] of the KV pool. With `interleaved`, the two numbers of a rotated
        pair are adjacent in the input; in the output they are half a head apart, as without it.
        """
        ...


class PlainOps:
    """The small operations of a model in plain torch. Implements Ops, and is the plain twin of `CudaOps`."""

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
        if weights is None and angles is not None:  # q and k are adjacent, so one pass rotates both
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
    """Write records [T, *shape] to slots [T] of a KV pool [num_blocks, block_size, *shape]."""
    pool.flatten(0, 1).index_copy_(0, slots, records)


def ops_for(device: torch.device, head_dim: int) -> Ops:
    """Choose the `Ops` for a model on `device`. `head_dim` is the size of a head or, in latent attention, of its rotated part.

    The CUDA kernels need `head_dim` to be a power of two.
    """
    if not is_gpu(device) or head_dim & (head_dim - 1):
        return PlainOps()
    # Imported by name, since this module must also import on machines without Triton.
    make: Callable[[], Ops] = importlib.import_module("engine.layers.ops_cuda").make
    return make()
