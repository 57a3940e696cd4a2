"""Matrix products of few rows, y = x W^T, in Triton: what a decode step spends most of its time on.

Such a product is as fast as its weights arrive, so both kernels are about bytes in flight:

    rows of x   kernel     how
    1, 2        `_gemv`    plain arithmetic: a program takes a few rows of W, whole, for all rows of x
    3 .. 128    `_skinny`  tensor cores, W as the left operand; where N gives too few programs, they share out K as well

Above 64 rows only the largest W are for `_skinny`. More rows, and other types, are torch's. The weights' first bytes are asked
for before the kernel before has ended (see `launch`). Which kernel and which tiles, `linear_tiles.py` says by a bucket of row
counts, so within a bucket a row's result does not depend on how many rows there are.

A product may add to the residual stream in place of writing. That of one row may also norm it: the norm's weight is multiplied
into x, and its root, which takes all of x, into the result.

A split of K is summed by whichever of a tile's programs comes last, in the order of the splits: the result does not depend on
who it was. Partial sums pass through one workspace per device, so these kernels must not run in two streams at once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl
from engine.kernels.linear_tiles import GEMV_ROWS, MAX_ROWS, MOST_NORMED, WARP, Gemv, Skinny, bucket, choose, is_ours

K_MULTIPLE = 16  # numbers: every row of W then begins on a 32-byte boundary, and loads are wide

_COUNTERS = 4096  # output tiles that a split product may have
_LINES = 8  # of 128 bytes that a program of `_skinny` asks for in each of its rows before it waits
_WORKSPACE = 1 << 22  # float32 numbers, 16 MiB

Norm = tuple[torch.Tensor, float]
"""As in `layers/linear.py`, which is above this on the ladder of imports: weight [K] and eps of a root-mean-square norm."""


class Extras(NamedTuple):
    """What a product does besides."""

    gated: bool = False  # W's rows are gate's, then up's, and silu(gate) * up comes out
    norm: Norm | None = None  # x is normed first
    add: bool = False  # the product is added to what `out` holds


@triton.jit
def _rows_of(tile, r, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Row r of a tile is which row of W? Gated: half of them are the gate's, then come their partners, up's. Past the end: the
    last."""
    if GATED:
        HALF: tl.constexpr = ROWS // 2
        row = tl.minimum(tile * HALF + r % HALF, outputs - 1) + tl.where(r < HALF, 0, outputs)
    else:
        row = tl.minimum(tile * ROWS + r, outputs - 1)
    return row


@triton.jit
def _silu_product(both, SHAPE: tl.constexpr, ORDER: tl.constexpr):
    """Gate rows then up rows along the first axis -> silu(gate) * up, half as many."""
    gate, up = tl.split(tl.permute(tl.reshape(both, SHAPE), ORDER))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _of_thread(products, PARTS: tl.constexpr):
    """products [PARTS * rows, columns] summed over the eight numbers of each load and over the parts, which are a thread's own:
    [rows, columns / 8]."""
    eights = tl.reshape(products, (PARTS, products.shape[0] // PARTS, products.shape[1] // 8, 8))
    return tl.sum(tl.sum(eights, 3), 0)


@triton.jit
def _add_products(acc, squares, w, norm, x_at, inside, PARTS: tl.constexpr, NORM: tl.constexpr):
    """Take w * x into acc; of a norm, the weight goes to x and x * x into `squares`, whose root divides what acc comes to."""
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares += _of_thread(x * x, PARTS)
        x *= norm.to(tl.float32)
    return acc + _of_thread(w.to(tl.float32) * x, PARTS), squares


@triton.jit
def _finish_gemv(
    acc, squares, bias, out_at, outputs, K, eps, tile,
    ROWS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    y = tl.sum(acc, 1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + eps)
    if BIAS:
        y += bias
    if GATED:
        y = _silu_product(y, (2, ROWS // 2), (1, 0))
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
    tile = tl.program_id(0)
    TILE: tl.constexpr = PARTS * COLUMNS
    # The parts lie below each other, in a matrix: that gives each warp all parts of its rows, whatever the compiler's version.
    r = tl.arange(0, PARTS * ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    k = r // ROWS * COLUMNS + column
    w_at = w_ptr + _rows_of(tile, r % ROWS, outputs, ROWS, GATED).to(tl.int64) * K + k
    w = tl.load(w_at, mask=k < K, other=0.0, eviction_policy="evict_first")  # used once: it need not stay in a cache
    own = k if OWN_ROWS else column  # a warp with rows of its own loads x for itself: no exchange with others
    norm, bias = 0.0, 0.0
    if NORM:
        norm = tl.load(norm_ptr + own, mask=own < K, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + _rows_of(tile, tl.arange(0, ROWS), outputs, ROWS, GATED)).to(tl.float32)
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


@triton.jit
def _prefetch(w_at, row_offset, left, ROWS: tl.constexpr, LINES: tl.constexpr):
    """Ask for the first LINES x 128 bytes of each row, of which `left` numbers are ours, to be brought to the L2."""
    line = tl.minimum(tl.arange(0, LINES) * 64, left - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [w_at + row_offset[:, None] + line[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _finish_skinny(
    acc, bias_ptr, row, out_ptr, tile, outputs, M,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    if GATED:
        acc = _silu_product(acc, (2, ROWS // 2, BLOCK_M), (1, 2, 0))
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    n = tile * WIDTH + tl.arange(0, WIDTH)
    m = tl.arange(0, BLOCK_M)
    at = out_ptr + m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(n < outputs)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def _skinny(
    x_ptr, w_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, x_stride, outputs, K, share, M,
    BLOCK_M: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EVEN_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    row = _rows_of(tile, tl.arange(0, ROWS), outputs, ROWS, GATED)
    k, m = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_M)
    begin = split * share
    end = tl.minimum(begin + share, K)
    row_offset = row.to(tl.int64) * K
    if PDL:
        if LINES > 0:
            _prefetch(w_ptr + begin, row_offset, end - begin, ROWS, LINES)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    w_at = w_ptr + row_offset[:, None] + k[None, :]
    x_at = x_ptr + m[None, :] * x_stride + k[:, None]
    acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
    if ADD:  # first of all, while the weights are on their way; one split does it
        live = m < tl.where(split == 0, M, 0)
        there = out_ptr + m.to(tl.int64)[None, :] * outputs + row[:, None]
        acc += tl.load(there, mask=live[None, :], other=0.0).to(tl.float32)
    for start in range(begin, end, COLUMNS):
        if EVEN_K:
            w = tl.load(w_at + start, eviction_policy="evict_first")
            x = tl.load(x_at + start, mask=(m < M)[None, :], other=0.0)
        else:
            inside = start + k < K
            w = tl.load(w_at + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + start, mask=(m < M)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
    if SPLITS == 1:
        _finish_skinny(acc, bias_ptr, row, out_ptr, tile, outputs, M, ROWS, BLOCK_M, GATED, BIAS)
    else:
        own = tl.arange(0, ROWS)[:, None] * BLOCK_M + m[None, :]
        first = partial_ptr + tile * (SPLITS * ROWS * BLOCK_M) + own
        tl.store(first + split * (ROWS * BLOCK_M), acc)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros((ROWS, BLOCK_M), tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(first + s * (ROWS * BLOCK_M), cache_modifier=".cg")  # the L1 may hold an older launch's
            tl.store(arrived_ptr + tile, 0)  # as the next launch wants it
            _finish_skinny(total, bias_ptr, row, out_ptr, tile, outputs, M, ROWS, BLOCK_M, GATED, BIAS)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [..., K] and weight [N, K] are for these products: bfloat16 on CUDA, K a multiple of 16, 1 to 128 rows,
    and no such W that cuBLAS is faster.
    """
    size = x.shape[-1]
    return (
        0 < x.numel() <= MAX_ROWS * size
        and x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and size % K_MULTIPLE == 0
        and weight.is_contiguous()
        and is_ours(x.numel() // size, *weight.shape)
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> x W^T + bias [..., N], summed in float32, for what `fits`; in `out` where given.

    With `norm`, of the root-mean-square norm of x instead, which is not rounded on its way; for one row.
    """
    return _product(x, weight, bias, out, Extras(norm=norm))


def add_linear(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """hidden [..., N], contiguous, += x W^T + bias, rounded once; for what `fits`."""
    _product(x, weight, bias, hidden, Extras(add=True))


def gated(x: torch.Tensor, weight: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
    """x [..., K], weight [2 I, K] -> silu(x G^T) * x U^T [..., I], for what `fits`. G is weight's first half, U the second.
    `norm` is as that of `linear`.
    """
    return _product(x, weight, None, None, Extras(gated=True, norm=norm))


def can_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of x [..., K] and weight [N, K] is the faster for norming x itself: of one row, and a small W. While a
    kernel norms, the product's first weights are on their way, of a large W as much as that takes.
    """
    return fits(x, weight) and x.numel() == x.shape[-1] and weight.numel() < MOST_NORMED


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None, extras: Extras
) -> torch.Tensor:
    outputs = weight.shape[0] // 2 if extras.gated else weight.shape[0]
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if out is None:
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    config = choose(flat.shape[0], *weight.shape, gated=extras.gated)
    launch(flat, weight, bias, out.view(-1, outputs), config, extras)
    return out


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Gemv | Skinny,
    extras: Extras,
) -> None:
    """Write the product of x [M, K], whose rows may lie apart, to out [M, outputs], or add it there, by `config`'s kernel."""
    if extras.norm is not None and x.shape[0] > 1:
        raise ValueError(f"only one row is normed on the way, not {x.shape[0]}")
    if extras.add and extras.gated:
        raise ValueError("no kernel adds what it has gated")
    if isinstance(config, Gemv):
        if x.shape[0] > GEMV_ROWS:
            raise ValueError(f"{config} is for {GEMV_ROWS} rows at most, not {x.shape[0]}")
        _launch_gemv(x, weight, bias, out, config, extras)
    else:
        if extras.norm is not None:
            raise ValueError(f"{config} norms nothing")
        _launch_skinny(x, weight, bias, out, config, extras)


def _launch_gemv(
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


def _launch_skinny(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: Skinny, extras: Extras
) -> None:
    (num_rows, size), (rows, columns, splits, warps, stages) = x.shape, config
    tiles, block_m = cdiv(weight.shape[0], rows), bucket(max(num_rows, GEMV_ROWS + 1))  # tensor cores: from 16
    if splits > 1 and (tiles > _COUNTERS or tiles * splits * rows * block_m > _WORKSPACE):
        raise ValueError(f"{config} for {tuple(weight.shape)}: the partial sums exceed the workspace")
    partial, arrived = _workspace(x.device) if splits > 1 else (out, out)
    _skinny[(tiles, splits)](
        x, weight, weight if bias is None else bias, out, partial, arrived,
        x.stride(0), out.shape[1], size, cdiv(cdiv(size, columns), splits) * columns, num_rows,
        BLOCK_M=block_m, GATED=extras.gated, BIAS=bias is not None, ADD=extras.add, EVEN_K=size % columns == 0,
        ROWS=rows, COLUMNS=columns, SPLITS=splits, LINES=_LINES, num_warps=warps, num_stages=stages, **pdl(x.device),
    )  # fmt: skip


@cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums, and of each tile how many splits have arrived: zero between launches, whatever was launched."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first product with a split K was captured in a graph: run the step once before its capture")
    partial = torch.empty(_WORKSPACE, dtype=torch.float32, device=device)
    return partial, torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
