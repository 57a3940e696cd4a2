"""A kernel that prepares latent attention in one pass: it norms latents, rotates queries and keys, and writes the KV pool.

A token's record in the pool is its normed latent and its rotated key. grid: (T, 1 + groups of GROUP heads); program (t, 0)
handles the record of token t, and program (t, g > 0) the queries of one group of heads. The twin is `PlainOps.latent_prepare` in
`layers/ops.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two

HEADS_A_PROGRAM = 16  # query heads that one program rotates


@triton.jit
def _rotate(at, live, cos_ptr, sin_ptr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotate the N vectors of 2 * HALF numbers that begin at the pointers `at` [N]. Returns both halves, [N, HALF] each.

    With INTERLEAVED the two numbers of a rotated pair are adjacent in memory, otherwise HALF numbers apart. In the result the two
    numbers are HALF apart in either case. `sin` is signed: its first half is negated.
    """
    low = tl.arange(0, HALF)
    if INTERLEAVED:
        both = tl.load(at[:, None] + tl.arange(0, 2 * HALF)[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [at.shape[0], HALF, 2]))
    else:
        a = tl.load(at[:, None] + low[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        b = tl.load(at[:, None] + HALF + low[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    cos_a, cos_b = tl.load(cos_ptr + low)[None, :], tl.load(cos_ptr + HALF + low)[None, :]
    sin_a, sin_b = tl.load(sin_ptr + low)[None, :], tl.load(sin_ptr + HALF + low)[None, :]
    return a * cos_a + b * sin_a, b * cos_b + a * sin_b


@triton.jit
def _prepare(
    q_ptr, kv_ptr, weight_ptr, cos_ptr, sin_ptr, pool_ptr, slots_ptr, eps, q_stride, kv_stride,
    HEADS: tl.constexpr, HEAD: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, ROPE: tl.constexpr,
    GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, 0) norms, rotates and writes the record of one token. Program (token, g > 0) rotates GROUP query heads."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = ROPE // 2
    low = tl.arange(0, HALF)
    cos_ptr += token * ROPE
    sin_ptr += token * ROPE
    dim = tl.arange(0, PADDED)
    inside = dim < RANK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if part == 0:
        weight = tl.load(weight_ptr + dim, mask=inside, other=0.0).to(tl.float32)
        kv_ptr += token * kv_stride
        record = pool_ptr + tl.load(slots_ptr + token) * (RANK + ROPE)
        x = tl.load(kv_ptr + dim, mask=inside, other=0.0).to(tl.float32)
        one = tl.arange(0, 1)
        key_a, key_b = _rotate(kv_ptr + RANK + one, one == 0, cos_ptr, sin_ptr, HALF, INTERLEAVED)
        key_a, key_b = key_a.to(pool_ptr.dtype.element_ty), key_b.to(pool_ptr.dtype.element_ty)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * weight
        x = x.to(pool_ptr.dtype.element_ty)
        key_at = one[:, None] + low[None, :]
        tl.debug_barrier()  # every thread must have read its numbers before any is overwritten
        tl.store(kv_ptr + dim, x, mask=inside)
        tl.store(kv_ptr + RANK + key_at, key_a)
        tl.store(kv_ptr + RANK + HALF + key_at, key_b)
        tl.store(record + dim, x, mask=inside)
        tl.store(record + RANK + key_at, key_a)
        tl.store(record + RANK + HALF + key_at, key_b)
    else:
        head = (part - 1) * GROUP + tl.arange(0, GROUP)
        live = head < HEADS
        at = q_ptr + token * q_stride + head * HEAD + (HEAD - ROPE)
        a, b = _rotate(at, live, cos_ptr, sin_ptr, HALF, INTERLEAVED)
        tl.debug_barrier()
        tl.store(at[:, None] + low[None, :], a.to(q_ptr.dtype.element_ty), mask=live[:, None])
        tl.store(at[:, None] + HALF + low[None, :], b.to(q_ptr.dtype.element_ty), mask=live[:, None])


def latent_prepare(
    q: torch.Tensor,
    kv: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    angles: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    pool: torch.Tensor,
    *,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the rotary parts of q [T, heads, nope + rope] and kv [T, rank + rope] and norm the latents kv[:, :rank], in place.

    The records kv are also written to their slots [T] int64 of the contiguous KV pool `pool` [num_blocks, block_size, rank +
    rope]. `norm` is (weight [rank], eps), and `angles` is (cos, signed sin), [T, 1, rope] float32 each. A token's numbers are
    adjacent in q and in kv; rope is a power of two. Returns (q, kv). `Ops.latent_prepare` defines the result.
    """
    heads, head = q.shape[1:]
    (weight, eps), (cos, sin) = norm, angles
    rank = weight.shape[0]
    group = min(HEADS_A_PROGRAM, power_of_two(heads))
    _prepare[(q.shape[0], 1 + cdiv(heads, group))](
        q, kv, weight, cos, sin, pool, slots, eps, q.stride(0), kv.stride(0),
        HEADS=heads, HEAD=head, RANK=rank, PADDED=power_of_two(rank), ROPE=kv.shape[1] - rank,
        GROUP=group, INTERLEAVED=interleaved, num_warps=4, **pdl(q.device),
    )  # fmt: skip
    return q, kv
