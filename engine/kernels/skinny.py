"""A kernel for y = x W^T with 3 to 128 rows of x, on tensor cores, with W as the left operand.

    x [M, K], W [N, K] -> y [M, N]; sums in float32
    grid: (ceil(N / ROWS), SPLITS); a program computes ROWS outputs of all rows of x over one part of K

Such a product takes as long as reading W, so what counts is the number of bytes that are being loaded at any time. W is the
left operand since Hopper's tensor cores take 64 rows on the left, but as few as 8 columns on the right. Where N gives too few
programs to fill the device, K is split. The last program of a tile to finish adds the parts in the order of the splits, so the
result does not depend on which program was last.

While the preceding kernel still runs, each program prefetches the first bytes of its rows of W to the L2 cache (`_prefetch`).

The partial sums of a split K pass through one workspace per device. These kernels must not run in two streams at once.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl
from engine.kernels.linear_tiles import GEMV_ROWS, Skinny, bucket
from engine.kernels.product import Extras, row_of_tile, silu_product

_COUNTERS = 4096  # most output tiles that a product with a split K may have
_LINES = 8  # a program prefetches this many lines of 128 bytes of each of its rows of W
_WORKSPACE = 1 << 22  # size of the workspace in float32 partial sums: 16 MiB


@triton.jit
def _prefetch(w_at, row_offset, left, ROWS: tl.constexpr, LINES: tl.constexpr):
    """Prefetch the first LINES * 128 bytes of each row of W to the L2 cache, but at most the `left` numbers of this split."""
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
    """Apply bias and SwiGLU to the complete sums acc [ROWS, BLOCK_M], and write the result to the output."""
    if BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    if GATED:
        acc = silu_product(acc, (2, ROWS // 2, BLOCK_M), (1, 2, 0))
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
    """Program (tile, split) computes ROWS outputs of all M rows of x over `share` numbers of K, from split * share on.

    BLOCK_M is M rounded up to its bucket. EVEN_K means that K is a multiple of COLUMNS. partial_ptr and arrived_ptr point to the
    partial sums and the counters of `_workspace`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row = row_of_tile(tile, tl.arange(0, ROWS), outputs, ROWS, GATED)
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
    if ADD:  # split 0 starts from the numbers in `out`; they are loaded first, while the weights are on their way
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
        tl.debug_barrier()  # all threads must have written their sums before one thread counts the program as arrived
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros((ROWS, BLOCK_M), tl.float32)
            for s in tl.static_range(SPLITS):
                # This load bypasses the L1 cache, which may hold the sums of an older launch.
                total += tl.load(first + s * (ROWS * BLOCK_M), cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)  # the next launch needs the counter at 0
            _finish_skinny(total, bias_ptr, row, out_ptr, tile, outputs, M, ROWS, BLOCK_M, GATED, BIAS)


def launch_skinny(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: Skinny, extras: Extras
) -> None:
    (num_rows, size), (rows, columns, splits, warps, stages) = x.shape, config
    # block_m is at least 16, as `tl.dot` needs.
    tiles, block_m = cdiv(weight.shape[0], rows), bucket(max(num_rows, GEMV_ROWS + 1))
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
    """Allocate the device's workspace: partial sums [_WORKSPACE] float32, and counters of arrived splits [_COUNTERS] int32.

    There is a counter for each tile, which is 0 between launches. Raises RuntimeError during the capture of a CUDA graph: a
    tensor that is allocated then belongs to that graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first product with a split K ran during graph capture: run the step once before capturing it")
    partial = torch.empty(_WORKSPACE, dtype=torch.float32, device=device)
    return partial, torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
