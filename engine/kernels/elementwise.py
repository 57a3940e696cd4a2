"""Kernels for the small operations between matrix products: norm, SwiGLU and rotary embedding. Each reads its data once.

`layers/ops_cuda.py` offers these kernels to models as an `Ops`. The plain twins are `PlainOps` in `layers/ops.py` and, for
`angles`, `Rotary.plain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two

HEADS_A_PROGRAM = 8  # heads that one program of `norm_rotate` computes; they share one load of the angles


@triton.jit
def _norm(x_ptr, weight_ptr, out_ptr, eps, stride, SIZE: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """Program (row,) root-mean-square normalises one row of SIZE numbers, and multiplies it by the norm's weight."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, PADDED)
    inside = col < SIZE
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * stride + col, mask=inside, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    tl.store(out_ptr + row * SIZE + col, out.to(out_ptr.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalise each row of x [T, size]: x / sqrt(mean(x^2) + eps) * weight, with sums in float32.

    The numbers of a row are adjacent in memory; the rows need not be. grid: (T,).
    """
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    padded = power_of_two(size)
    _norm[(rows,)](
        x, weight, out, eps, x.stride(0), SIZE=size, PADDED=padded, num_warps=min(8, max(1, padded // 256)), **pdl(x.device)
    )
    return out


@triton.jit
def _silu_mul(x_ptr, out_ptr, SIZE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    """Program (row, tile) computes TILE numbers of silu(gate) * up for one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = col < SIZE
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x_ptr + row * 2 * SIZE + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + col, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + col, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up, [T, I], from the contiguous gate_up [T, 2 I]. Each row is gate, then up. grid: (T, tiles of I)."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    tile = min(1024 if rows <= 256 else 2048, power_of_two(size))  # with few rows, smaller tiles give more programs
    _silu_mul[(rows, cdiv(size, tile))](gate_up, out, SIZE=size, TILE=tile, num_warps=8, **pdl(gate_up.device))
    return out


@triton.jit
def _norm_rotate(
    x_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, slots_ptr, k_pool_ptr, v_pool_ptr, eps, stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, ROTARY: tl.constexpr, TILE: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, tile) norms, rotates and writes TILE heads of one token. A token's heads are q, then k, then v heads.

    A program handles a head as pairs of numbers at `first` and `second`. The first ROTARY / 2 pairs are those that are rotated.
    The other pairs are halves of the rest of the head.
    """
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD // 2
    TURNED: tl.constexpr = ROTARY // 2
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    low = tl.arange(0, HALF)[None, :]
    first, second = low, HALF + low
    if ROTARY < HEAD:
        first = tl.where(low < TURNED, low, TURNED + low)
        second = tl.where(low < TURNED, TURNED + low, HALF + low)
    is_q = head < Q_HEADS
    is_v = head >= Q_HEADS + KV_HEADS
    live = (head < Q_HEADS + 2 * KV_HEADS) & (low >= 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = x_ptr + token * stride + head * HEAD
    raw_a, raw_b = tl.load(at + first, mask=live, other=0.0), tl.load(at + second, mask=live, other=0.0)
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD + eps)[:, None]
        weight_a = tl.where(is_q, tl.load(q_weight_ptr + first), tl.load(k_weight_ptr + first))
        weight_b = tl.where(is_q, tl.load(q_weight_ptr + second), tl.load(k_weight_ptr + second))
        a *= scale * weight_a.to(tl.float32)
        b *= scale * weight_b.to(tl.float32)
        a, b = a.to(x_ptr.dtype.element_ty).to(tl.float32), b.to(x_ptr.dtype.element_ty).to(tl.float32)
    if ROTATE:
        at_angle = token * ROTARY + low
        # The signed sin's first half is negated, and its second half, which is read here, is not.
        if ROTARY < HEAD:
            cos = tl.load(cos_ptr + at_angle, mask=low < TURNED, other=1.0)
            sin = tl.load(sin_ptr + at_angle + TURNED, mask=low < TURNED, other=0.0)
        else:
            cos, sin = tl.load(cos_ptr + at_angle), tl.load(sin_ptr + at_angle + TURNED)
        a, b = a * cos - b * sin, b * cos + a * sin
    new_a = tl.where(is_v, raw_a, a.to(x_ptr.dtype.element_ty))
    new_b = tl.where(is_v, raw_b, b.to(x_ptr.dtype.element_ty))
    if NORM or ROTATE:
        changed = live & (head < Q_HEADS + KV_HEADS)
        tl.store(at + first, new_a, mask=changed)
        tl.store(at + second, new_b, mask=changed)
    slot = tl.load(slots_ptr + token)
    k_at = k_pool_ptr + (slot * KV_HEADS + head - Q_HEADS) * HEAD
    v_at = v_pool_ptr + (slot * KV_HEADS + head - Q_HEADS - KV_HEADS) * HEAD
    is_k = live & (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    tl.store(k_at + first, new_a, mask=is_k)
    tl.store(k_at + second, new_b, mask=is_k)
    tl.store(v_at + first, new_a, mask=live & is_v)
    tl.store(v_at + second, new_b, mask=live & is_v)


def norm_rotate(
    heads: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    slots: torch.Tensor,
    pools: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm and rotate q and k, and write k and v to the KV pools, in one pass. `Ops.norm_rotate` defines the result.

    heads [T, q + k + v heads, dim] holds each token's q, k and v heads, adjacent in memory; dim is a power of two. The angles
    have dim numbers, or fewer if only the first numbers of a head are rotated. q and k are overwritten, and the results are views
    of `heads`. grid: (T, ceil(heads / HEADS_A_PROGRAM)).
    """
    tokens, num_heads, head_dim = heads.shape
    kv_heads = pools["k"].shape[2]
    q_heads = num_heads - 2 * kv_heads
    cos, sin = angles or (heads, heads)
    q_weight, k_weight = weights or (heads, heads)
    _norm_rotate[(tokens, cdiv(num_heads, HEADS_A_PROGRAM))](
        heads, cos, sin, q_weight, k_weight, slots, pools["k"], pools["v"], eps, heads.stride(0),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, HEAD=head_dim, ROTARY=head_dim if angles is None else cos.shape[-1],
        TILE=HEADS_A_PROGRAM, NORM=weights is not None, ROTATE=angles is not None, num_warps=4, **pdl(heads.device),
    )  # fmt: skip
    return heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads], heads[:, q_heads + kv_heads :]


@triton.jit
def _angles(
    positions_ptr, inv_freq_ptr, cos_ptr, sin_ptr, magnitude, HALF: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr
):
    """Program (token,) computes cos and signed sin of one position's HALF angles, and writes each twice: a head has two halves.

    sin is negated in the first half.
    """
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, PADDED)
    inside = col < HALF
    inv_freq = tl.load(inv_freq_ptr + col, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    angle = tl.load(positions_ptr + token).to(tl.float32) * inv_freq
    cos, sin = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    at = token * 2 * HALF + col
    tl.store(cos_ptr + at, cos, mask=inside)
    tl.store(cos_ptr + at + HALF, cos, mask=inside)
    tl.store(sin_ptr + at, -sin, mask=inside)
    tl.store(sin_ptr + at + HALF, sin, mask=inside)


def angles(positions: torch.Tensor, inv_freq: torch.Tensor, magnitude: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the rotary cos and signed sin, [T, 1, dim] float32 each, of positions [T] int64.

    An angle is position * inv_freq, with inv_freq [dim / 2] float32; cos and sin are multiplied by `magnitude`. Both halves of
    `dim` have the same angles. The first half of sin is negated, as `rotate` in `layers/rotary.py` needs it. The twin is
    `Rotary.plain`. grid: (T,).
    """
    half = inv_freq.shape[0]
    cos = torch.empty(positions.shape[0], 1, 2 * half, dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    _angles[(positions.shape[0],)](
        positions, inv_freq, cos, sin, magnitude,
        HALF=half, PADDED=power_of_two(half), num_warps=1, **pdl(positions.device),
    )  # fmt: skip
    return cos, sin
