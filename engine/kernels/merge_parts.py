"""A kernel that merges two attention results of the same queries over different keys, by their log-sum-exps.

With weights w_a = exp(lse_a - max) and w_b likewise, out = (w_a out_a + w_b out_b) / (w_a + w_b), and the merged log-sum-exp is
max + log(w_a + w_b). grid: (ceil(T * heads / ROWS)); a program merges ROWS rows, where a row is one head of one token. The twin
is `merge_parts_plain`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, power_of_two

ROWS = 16  # rows that one program merges


class Part(NamedTuple):
    """The attention of T query tokens over a part of their keys."""

    out: torch.Tensor  # [T, heads, v_dim]: the averaged values
    lse: torch.Tensor  # [heads, T] float32: log-sum-exp of the token's scores, with the natural logarithm


@triton.jit(
    do_not_specialize=["num", "b_lse_stride", "a_lse_stride"],
    do_not_specialize_on_alignment=["a_lse_ptr", "b_lse_ptr"],  # a chunk's rows begin anywhere in their part
)
def _merge(
    a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, out_ptr, lse_ptr, num, a_lse_stride, b_lse_stride,
    A_TOKEN: tl.constexpr, A_HEAD: tl.constexpr, B_TOKEN: tl.constexpr, B_HEAD: tl.constexpr,
    OUT_TOKEN: tl.constexpr, OUT_HEAD: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program i merges ROWS of the T * HEADS rows, from row ROWS * i on. *_TOKEN and *_HEAD are strides, counted in numbers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    inside = token < num
    dim = tl.arange(0, DIM_PADDED)
    mask = inside[:, None] & (dim < DIM)[None, :]
    a_lse = tl.load(a_lse_ptr + head.to(tl.int64) * a_lse_stride + token, mask=inside, other=0.0)
    b_lse = tl.load(b_lse_ptr + head.to(tl.int64) * b_lse_stride + token, mask=inside, other=0.0)
    top = tl.maximum(a_lse, b_lse)
    a_weight, b_weight = tl.exp(a_lse - top), tl.exp(b_lse - top)
    total = a_weight + b_weight
    a = tl.load(a_ptr + (token * A_TOKEN + head * A_HEAD)[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + (token * B_TOKEN + head * B_HEAD)[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    merged = a * (a_weight / total)[:, None] + b * (b_weight / total)[:, None]
    at = (token * OUT_TOKEN + head * OUT_HEAD)[:, None] + dim[None, :]
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head.to(tl.int64) * num + token, top + tl.log(total), mask=inside)


def merge_parts(a: Part, b: Part, out: torch.Tensor | None = None) -> Part:
    """Compute the attention of the T tokens of `a` over the keys of `a` and `b`. Further tokens of `b` are ignored.

    The result is written to `out` [T, heads, v_dim] if that is given. Otherwise it is written to `a.out` if that is float32 and
    contiguous, and else to a new float32 tensor: rounding after each of many merges would add up.
    """
    num, heads, dim = a.out.shape
    if out is None:
        reuse = a.out.dtype == torch.float32 and a.out.is_contiguous()
        out = a.out if reuse else torch.empty(num, heads, dim, dtype=torch.float32, device=a.out.device)
    lse = torch.empty(heads, num, dtype=torch.float32, device=out.device)
    _merge[(cdiv(num * heads, ROWS),)](
        a.out, a.lse, b.out, b.lse, out, lse, num, a.lse.stride(0), b.lse.stride(0),
        A_TOKEN=a.out.stride(0), A_HEAD=a.out.stride(1), B_TOKEN=b.out.stride(0), B_HEAD=b.out.stride(1),
        OUT_TOKEN=out.stride(0), OUT_HEAD=out.stride(1),
        HEADS=heads, DIM=dim, DIM_PADDED=power_of_two(dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return Part(out, lse)


def merge_parts_plain(a: Part, b: Part) -> Part:
    """Compute the result of `merge_parts` in plain torch, in float32."""
    num = a.out.shape[0]
    lse = torch.stack((a.lse, b.lse[:, :num]))  # [2, heads, T], of `a` and of `b`
    weights = lse.softmax(0).transpose(1, 2).unsqueeze(-1)  # [2, T, heads, 1]
    return Part(a.out.float() * weights[0] + b.out[:num].float() * weights[1], lse.logsumexp(0))
