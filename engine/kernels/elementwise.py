"""The small steps between matrix products, each one pass over its data, in Triton. `layers/ops.py` has their plain twins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(hidden_ptr, delta_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE
    col = tl.arange(0, PADDED)
    inside = col < SIZE
    x = tl.load(hidden_ptr + row + col, mask=inside, other=0.0)
    if ADD:
        x += tl.load(delta_ptr + row + col, mask=inside, other=0.0)  # in the residual's own type, as the twin adds
        tl.store(hidden_ptr + row + col, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + col, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Ops.add_norm`. Both tensors are contiguous."""
    out = torch.empty_like(hidden)
    size = hidden.shape[-1]
    padded = triton.next_power_of_2(size)
    _add_norm[(hidden.shape[0],)](
        hidden, hidden if delta is None else delta, weight, out, eps,
        SIZE=size, PADDED=padded, ADD=delta is not None, num_warps=min(16, max(1, padded // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul(x_ptr, out_ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = col < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + col, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + col, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `Ops.silu_mul`; gate_up [T, 2 I] is contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    tile = min(2048, triton.next_power_of_2(size))
    _silu_mul[(rows, triton.cdiv(size, tile))](gate_up, out, SIZE=size, TILE=tile, num_warps=4)
    return out


@triton.jit
def _norm_rotate(
    x_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps, stride,
    Q_HEADS: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = HEAD // 2
    low = tl.arange(0, HALF)
    at = x_ptr + token * stride + head * HEAD + low
    a, b = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / HEAD + eps)
        is_q = head < Q_HEADS
        weight_a = tl.where(is_q, tl.load(q_weight_ptr + low), tl.load(k_weight_ptr + low))
        weight_b = tl.where(is_q, tl.load(q_weight_ptr + HALF + low), tl.load(k_weight_ptr + HALF + low))
        a *= scale * weight_a.to(tl.float32)
        b *= scale * weight_b.to(tl.float32)
        a, b = a.to(x_ptr.dtype.element_ty).to(tl.float32), b.to(x_ptr.dtype.element_ty).to(tl.float32)
    turn = token * HEAD + low
    cos_a, cos_b = tl.load(cos_ptr + turn), tl.load(cos_ptr + turn + HALF)
    sin_a, sin_b = tl.load(sin_ptr + turn), tl.load(sin_ptr + turn + HALF)  # signed for the twin's swap of the halves
    tl.store(at, (a * cos_a + b * sin_a).to(x_ptr.dtype.element_ty))
    tl.store(at + HALF, (b * cos_b + a * sin_b).to(x_ptr.dtype.element_ty))


def norm_rotate(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_heads: int,
    kv_heads: int,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Ops.norm_rotate`; a token's heads lie side by side, a head's size is a power of two, and the heads are overwritten."""
    q_weight, k_weight = weights or (heads, heads)
    _norm_rotate[(heads.shape[0], q_heads + kv_heads)](
        heads, cos, sin, q_weight, k_weight, eps, heads.stride(0),
        Q_HEADS=q_heads, HEAD=heads.shape[2], NORM=weights is not None, num_warps=1,
    )  # fmt: skip
    return heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads]


@triton.jit
def _write_kv(
    k_ptr, v_ptr, slots_ptr, k_pool_ptr, v_pool_ptr, k_stride, v_stride, SIZE: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    col = tl.arange(0, PADDED)
    inside = col < SIZE
    tl.store(k_pool_ptr + slot * SIZE + col, tl.load(k_ptr + token * k_stride + col, mask=inside), mask=inside)
    tl.store(v_pool_ptr + slot * SIZE + col, tl.load(v_ptr + token * v_stride + col, mask=inside), mask=inside)


def write_kv(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
    """Write k and v [T, kv_heads, head_dim], a token's heads side by side, to their slots [T] of the pools."""
    size = k.shape[1] * k.shape[2]
    padded = triton.next_power_of_2(size)
    _write_kv[(k.shape[0],)](
        k, v, slots, k_pool, v_pool, k.stride(0), v.stride(0), SIZE=size, PADDED=padded, num_warps=min(8, max(1, padded // 256))
    )
