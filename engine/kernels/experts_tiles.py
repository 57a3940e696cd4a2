"""Kernels for the experts of more than a few tokens, on tensor cores. One read of an expert's weights serves a block of pairs.

A pair is a token with one of its experts. `sort_pairs.py` sorts the pairs by expert and cuts them into blocks of one expert each.
`experts.py` explains the data flow. The twin is `layers.moe.run_experts`.

Both kernels have up to `Tile.programs` programs for each multiprocessor. A tile is ROWS rows of an expert's weight for one block
of pairs. Program i of n computes tiles i, i + n, i + 2 n, and so on. The grid depends on shapes alone, and the kernels read the
number of blocks on the device, so nothing waits for the host.

64 tokens of DeepSeek-V2-Lite (6 pairs an expert) take 285 us with these kernels, and 424 us with torch's grouped product
(docs/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.dot import precision
from engine.kernels.experts import ExpertWeights, count_shared
from engine.kernels.hardware import processors
from engine.kernels.launch import cdiv, pdl
from engine.kernels.sort_pairs import Sorted


class Tile(NamedTuple):
    """The part of a product that one program of `_tiles_up` or `_tiles_down` computes at a time, and the number of programs."""

    rows: int  # rows of a weight matrix in one tile
    columns: int  # columns that a program reads in one pass of its loop
    num_warps: int
    num_stages: int
    programs: int  # programs for each multiprocessor


@triton.jit(do_not_specialize=["tokens"])
def _tiles_up(
    x_ptr, order_ptr, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, gate_up_ptr, shared_ptr, inner_ptr, tokens,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute silu(gate) * up. A tile is ROWS numbers for up to BLOCK pairs of one expert; experts from EXPERTS on are shared."""
    PER_BLOCK: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    pairs = tokens * TOP_K
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for tile in range(tl.program_id(0), tl.load(num_blocks_ptr) * PER_BLOCK, tl.num_programs(0)):
        block = tile // PER_BLOCK
        row = tile % PER_BLOCK * ROWS + tl.arange(0, ROWS)
        expert = tl.load(block_expert_ptr + block)
        place = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK)
        live = place < tl.load(ends_ptr + expert)
        token = tl.load(order_ptr + place, mask=live & (place < pairs), other=0) // TOP_K
        base, up = gate_up_ptr + expert.to(tl.int64) * (2 * SIZE * HIDDEN), SIZE * HIDDEN
        if SHARED > 0:
            token = tl.where(live & (place >= pairs), (place - pairs) % tokens, token)
            if expert >= EXPERTS:
                base = shared_ptr + (expert - EXPERTS).to(tl.int64) * (SIZE * HIDDEN)
            up = tl.where(expert < EXPERTS, SIZE * HIDDEN, SHARED * SIZE * HIDDEN)
        col = tl.arange(0, TILE)
        # Places past the block's last pair read token 0, and their results are not stored.
        at_x = x_ptr + token[:, None].to(tl.int64) * HIDDEN + col[None, :]
        at_gate = base + tl.minimum(row, SIZE - 1)[:, None] * HIDDEN + col[None, :]
        gate_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        up_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, HIDDEN, TILE):
            if HIDDEN % TILE == 0:
                x, gate, above = tl.load(at_x + start), tl.load(at_gate + start), tl.load(at_gate + up + start)
            else:
                inside = (start + col < HIDDEN)[None, :]
                x = tl.load(at_x + start, mask=inside, other=0.0)
                gate = tl.load(at_gate + start, mask=inside, other=0.0)
                above = tl.load(at_gate + up + start, mask=inside, other=0.0)
            gate_sum = tl.dot(gate, tl.trans(x), gate_sum, input_precision=PRECISION)
            up_sum = tl.dot(above, tl.trans(x), up_sum, input_precision=PRECISION)
        gated = (gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum).to(inner_ptr.dtype.element_ty)
        at = place[:, None].to(tl.int64) * SIZE + row[None, :]
        tl.store(inner_ptr + at, tl.trans(gated), mask=live[:, None] & (row < SIZE)[None, :])


@triton.jit
def _tiles_down(
    inner_ptr, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, down_ptr, shared_ptr, rows_ptr,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the down product. A tile is ROWS outputs for up to BLOCK pairs of one expert. Experts from EXPERTS on are shared
    ones.
    """
    PER_BLOCK: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for tile in range(tl.program_id(0), tl.load(num_blocks_ptr) * PER_BLOCK, tl.num_programs(0)):
        block = tile // PER_BLOCK
        row = tile % PER_BLOCK * ROWS + tl.arange(0, ROWS)
        expert = tl.load(block_expert_ptr + block)
        end = tl.load(ends_ptr + expert)
        place = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK)
        base, stride = down_ptr + expert.to(tl.int64) * (HIDDEN * SIZE), SIZE
        if SHARED > 0:
            if expert >= EXPERTS:
                base = shared_ptr + (expert - EXPERTS).to(tl.int64) * SIZE
            stride = tl.where(expert < EXPERTS, SIZE, SHARED * SIZE)
        col = tl.arange(0, TILE)
        at_inner = inner_ptr + tl.minimum(place, end - 1)[:, None].to(tl.int64) * SIZE + col[None, :]
        at_down = base + tl.minimum(row, HIDDEN - 1)[:, None] * stride + col[None, :]
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, SIZE, TILE):
            if SIZE % TILE == 0:
                inner, w = tl.load(at_inner + start), tl.load(at_down + start)
            else:
                inside = (start + col < SIZE)[None, :]
                inner = tl.load(at_inner + start, mask=inside, other=0.0)
                w = tl.load(at_down + start, mask=inside, other=0.0)
            acc = tl.dot(w, tl.trans(inner), acc, input_precision=PRECISION)
        at = place[:, None].to(tl.int64) * HIDDEN + row[None, :]
        done = tl.trans(acc.to(rows_ptr.dtype.element_ty))
        tl.store(rows_ptr + at, done, mask=(place < end)[:, None] & (row < HIDDEN)[None, :])


def tiles_up(
    x: torch.Tensor, top_k: int, by_expert: Sorted, block: int, experts: ExpertWeights, shared: ExpertWeights | None, tile: Tile
) -> torch.Tensor:
    """Compute silu(gate) * up of each (token, expert) pair of x [T, H], at the pair's place in `by_expert`.

    The result is inner [pairs + S T, I]; its last S T rows belong to S shared experts. `by_expert` was cut into blocks of up to
    `block` pairs, and `block` is at least 16.
    """
    gate_up, down = experts
    (tokens, hidden_size), (num_experts, _, size) = x.shape, down.shape
    num_shared = count_shared(shared, size)
    inner = torch.empty(tokens * (top_k + num_shared), size, dtype=x.dtype, device=x.device)
    most = by_expert.block_expert.shape[0] * cdiv(size, tile.rows)
    _tiles_up[(min(most, tile.programs * processors(x.device)),)](
        x, by_expert.order, *by_expert[2:], gate_up, (shared or experts)[0], inner, tokens,
        HIDDEN=hidden_size, SIZE=size, EXPERTS=num_experts, TOP_K=top_k, SHARED=num_shared, ROWS=tile.rows, BLOCK=block,
        TILE=tile.columns, PRECISION=precision(x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **pdl(x.device),
    )  # fmt: skip
    return inner


def tiles_down(
    inner: torch.Tensor, by_expert: Sorted, block: int, experts: ExpertWeights, shared: ExpertWeights | None, tile: Tile
) -> torch.Tensor:
    """Compute the experts' outputs [pairs + S T, H], not yet weighted, from inner [pairs + S T, I], the result of `tiles_up`.

    Both tensors have one row for each (token, expert) pair, at the pair's place in `by_expert`.
    """
    num_experts, hidden_size, size = experts[1].shape
    rows = torch.empty(inner.shape[0], hidden_size, dtype=inner.dtype, device=inner.device)
    most = by_expert.block_expert.shape[0] * cdiv(hidden_size, tile.rows)
    _tiles_down[(min(most, tile.programs * processors(inner.device)),)](
        inner, *by_expert[2:], experts[1], (shared or experts)[1], rows,
        HIDDEN=hidden_size, SIZE=size, EXPERTS=num_experts, SHARED=count_shared(shared, size), ROWS=tile.rows, BLOCK=block,
        TILE=tile.columns, PRECISION=precision(inner.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **pdl(inner.device),
    )  # fmt: skip
    return rows
