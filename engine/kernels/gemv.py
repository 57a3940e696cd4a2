"""A kernel for y = x W^T with 1 or 2 rows of x, in plain arithmetic. It runs as fast as W can be read from memory.

    x [M, K], W [N, K] -> y [M, N], M in (1, 2); sums in float32
    grid: (ceil(N / ROWS),); a program computes ROWS outputs of every row of x, and reads its rows of W whole

From 3 rows of x on, tensor cores are faster: with 4 rows this kernel took 1.33 times the best measured time on average, and
`skinny.py` 1.01 times (docs/gpu.md). `linear_tiles.py` chooses the tiles.

For one row the kernel can also root-mean-square normalise x. With s = sqrt(mean(x^2) + eps), norm(x) W^T = ((x * weight) W^T) /
s. The kernel multiplies x by the norm's weight, and divides after the sum, when it has read all of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl
from engine.kernels.linear_tiles import WARP, Gemv
from engine.kernels.product import Extras, row_of_tile, silu_product


@triton.jit
def _sum_of_thread(products, PARTS: tl.constexpr):
    """Sum products [PARTS * rows, columns] over the 8 numbers of each load and over the PARTS loads -> [rows, columns / 8].

    All numbers of one sum belong to one thread, so the sum needs no exchange between threads.
    """
    eights = tl.reshape(products, (PARTS, products.shape[0] // PARTS, products.shape[1] // 8, 8))
    return tl.sum(tl.sum(eights, 3), 0)


@triton.jit
def _add_products(acc, squares, w, norm, x_at, inside, PARTS: tl.constexpr, NORM: tl.constexpr):
    """Add w * x to `acc`. With NORM, add x^2 to `squares`, and multiply x by the norm's weight before the product."""
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares += _sum_of_thread(x * x, PARTS)
        x *= norm.to(tl.float32)
    return acc + _sum_of_thread(w.to(tl.float32) * x, PARTS), squares


@triton.jit
def _finish_gemv(
    acc, squares, bias, out_at, outputs, K, eps, tile,
    ROWS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of ROWS outputs, apply norm, bias, SwiGLU and addition, and write the outputs for one row of x.

    acc [ROWS, n] are partial sums of products. With NORM, `squares` are partial sums of x^2.
    """
    y = tl.sum(acc, 1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + eps)
    if BIAS:
        y += bias
    if GATED:
        y = silu_product(y, (2, ROWS // 2), (1, 0))
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    n = tile * WIDTH + tl.arange(0, WIDTH)
    if ADD:
        y += tl.load(out_at + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(out_at + n, y.to(out_at.dtype.element_ty), mask=n < outputs)


@triton.jit
def _gemv(
    x_ptr, w_ptr, bias_ptr, norm_ptr, out_ptr, x_stride, outputs, K, eps,
    M: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, OWN_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile,) computes ROWS outputs for all M rows of x (1 or 2). Each pass of its loop covers PARTS * COLUMNS of K.

    With OWN_ROWS every warp has rows of W to itself, and loads x itself. Otherwise all warps share each row of W.
    """
    tile = tl.program_id(0)
    TILE: tl.constexpr = PARTS * COLUMNS
    # The PARTS loads of a row of W are separate rows of one matrix of addresses. With this layout, every compiler version gives a
    # warp all loads of its own rows.
    r = tl.arange(0, PARTS * ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    k = r // ROWS * COLUMNS + column
    w_at = w_ptr + row_of_tile(tile, r % ROWS, outputs, ROWS, GATED).to(tl.int64) * K + k
    w = tl.load(w_at, mask=k < K, other=0.0, eviction_policy="evict_first")  # W is read only once
    own = k if OWN_ROWS else column  # a warp that has rows to itself loads x itself, so that warps exchange nothing
    norm, bias = 0.0, 0.0
    if NORM:
        norm = tl.load(norm_ptr + own, mask=own < K, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + row_of_tile(tile, tl.arange(0, ROWS), outputs, ROWS, GATED)).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc0 = tl.zeros((ROWS, COLUMNS // 8), tl.float32)
    acc1 = acc0
    squares = tl.zeros((ROWS if OWN_ROWS else 1, COLUMNS // 8), tl.float32)
    for start in range(0, K, TILE):
        following = start + TILE + k
        w_next = tl.load(w_at + (start + TILE), mask=following < K, other=0.0, eviction_policy="evict_first")
        norm_next = norm
        if NORM:
            norm_next = tl.load(norm_ptr + (start + TILE) + own, mask=start + TILE + own < K, other=0.0)
        at = start + own
        x_at, inside = x_ptr + at, at < K
        acc0, squares = _add_products(acc0, squares, w, norm, x_at, inside, PARTS, NORM)
        if M > 1:
            acc1, squares = _add_products(acc1, squares, w, norm, x_at + x_stride, inside, PARTS, NORM)
        w, norm = w_next, norm_next
    _finish_gemv(acc0, squares, bias, out_ptr, outputs, K, eps, tile, ROWS, GATED, BIAS, NORM, ADD)
    if M > 1:
        _finish_gemv(acc1, squares, bias, out_ptr + outputs, outputs, K, eps, tile, ROWS, GATED, BIAS, NORM, ADD)


def launch_gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: Gemv, extras: Extras
) -> None:
    rows, columns, parts, warps = config
    norm_weight, eps = (weight, 0.0) if extras.norm is None else extras.norm
    _gemv[(cdiv(weight.shape[0], rows),)](
        x, weight, weight if bias is None else bias, norm_weight, out, x.stride(0), out.shape[1], x.shape[1], eps,
        M=x.shape[0], GATED=extras.gated, BIAS=bias is not None, NORM=extras.norm is not None, ADD=extras.add,
        ROWS=rows, COLUMNS=columns, PARTS=parts, OWN_ROWS=parts > 1 or columns < WARP * warps,
        num_warps=warps, **pdl(x.device),
    )  # fmt: skip
