"""The experts of a mixture, in Triton: gate_up [E, 2 I, H] and down [E, H, I], and with them, where their size allows, the shared
experts' gate_up [2 S I, H] and down [H, S I], as S more experts that every token takes.

    few tokens:  x --few_up--> inner [pairs + S T, I] --few_down--> residual stream             each pair reads its expert
    more:        x --tiles_up--> inner, sorted --tiles_down--> rows [pairs + S T, H] --add_weighted--> residual stream
                                                        each block of pairs of one expert reads it

Rows are in the order of pairs (few) or of `Sorted` places (more), then shared expert by shared expert. No sum is in the order in
which programs end: the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.hardware import processors
from engine.kernels.launch import cdiv, pdl, power_of_two
from engine.kernels.paged_decode import precision
from engine.kernels.routing import Sorted

Pair = tuple[torch.Tensor, torch.Tensor]
"""gate_up and down, of the routed or of the shared experts."""


class Strip(NamedTuple):
    """How a program for few tokens is cut."""

    rows: int  # of a weight
    columns: int  # of one pass of the loop
    num_warps: int


class Tile(NamedTuple):
    """How a program for more tokens is cut."""

    rows: int  # of a weight
    columns: int  # of one pass of the loop
    num_warps: int
    num_stages: int
    programs: int  # a processor; each goes on to further tiles


@triton.jit(do_not_specialize=["tokens"])
def _few_up(
    x_ptr, ids_ptr, gate_up_ptr, shared_ptr, inner_ptr, tokens,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    pairs = tokens * TOP_K
    at = tl.minimum(row, SIZE - 1)[:, None] * HIDDEN
    token = pair // TOP_K
    base, up = gate_up_ptr, SIZE * HIDDEN
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if pair < pairs:
        base += tl.load(ids_ptr + pair).to(tl.int64) * (2 * SIZE * HIDDEN)
    elif SHARED > 0:
        base = shared_ptr + ((pair - pairs) // tokens).to(tl.int64) * (SIZE * HIDDEN)
        token = (pair - pairs) % tokens
    if pair >= pairs:
        up = SHARED * SIZE * HIDDEN
    gate_sum = tl.zeros([ROWS, TILE], tl.float32)
    up_sum = tl.zeros([ROWS, TILE], tl.float32)
    for start in tl.static_range(0, HIDDEN, TILE):
        col = tl.broadcast_to(start + tl.arange(0, TILE)[None, :], [ROWS, TILE])
        at_x = x_ptr + token.to(tl.int64) * HIDDEN + col  # for each row: one row's would have to go through shared memory
        if start + TILE <= HIDDEN:
            x, gate, above = tl.load(at_x), tl.load(base + at + col), tl.load(base + up + at + col)
        else:
            x = tl.load(at_x, mask=col < HIDDEN, other=0.0)
            gate = tl.load(base + at + col, mask=col < HIDDEN, other=0.0)
            above = tl.load(base + up + at + col, mask=col < HIDDEN, other=0.0)
        x = x.to(tl.float32)
        gate_sum += gate.to(tl.float32) * x
        up_sum += above.to(tl.float32) * x
    gated = tl.sum(gate_sum, 1)
    gated = gated / (1.0 + tl.exp(-gated)) * tl.sum(up_sum, 1)
    tl.store(inner_ptr + pair.to(tl.int64) * SIZE + row, gated.to(inner_ptr.dtype.element_ty), mask=row < SIZE)


@triton.jit(do_not_specialize=["tokens"])
def _few_down(
    inner_ptr, ids_ptr, weights_ptr, down_ptr, shared_ptr, out_ptr, tokens,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    at = tl.minimum(row, HIDDEN - 1)[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([ROWS, TILE], tl.float32)
    following = tl.load(ids_ptr + token * TOP_K)
    for i in tl.static_range(TOP_K + SHARED):
        if i < TOP_K:
            place = token * TOP_K + i
            expert = following.to(tl.int64)
            if i + 1 < TOP_K:  # asked for before the weights that it would otherwise wait behind
                following = tl.load(ids_ptr + place + 1)
            weight = tl.load(weights_ptr + place)
            base = down_ptr + expert * (HIDDEN * SIZE) + at * SIZE
        else:
            place = tokens * TOP_K + (i - TOP_K) * tokens + token
            weight = 1.0
            base = shared_ptr + (i - TOP_K) * SIZE + at * (SHARED * SIZE)
        for start in tl.static_range(0, SIZE, TILE):
            col = tl.broadcast_to(start + tl.arange(0, TILE)[None, :], [ROWS, TILE])
            at_inner = inner_ptr + place.to(tl.int64) * SIZE + col
            if start + TILE <= SIZE:
                h, w = tl.load(at_inner), tl.load(base + col)
            else:
                h = tl.load(at_inner, mask=col < SIZE, other=0.0)
                w = tl.load(base + col, mask=col < SIZE, other=0.0)
            acc += w.to(tl.float32) * (h.to(tl.float32) * weight)
    at_out = out_ptr + token.to(tl.int64) * HIDDEN + row
    out = tl.sum(acc, 1) + tl.load(at_out, mask=row < HIDDEN, other=0.0).to(tl.float32)
    tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=row < HIDDEN)


def few_up(x: torch.Tensor, ids: torch.Tensor, experts: Pair, shared: Pair | None, strip: Strip) -> torch.Tensor:
    """x [T, H], ids [T, top_k] -> inner [pairs + S T, I]. Every pair reads its expert's weights for itself."""
    gate_up, down = experts
    (tokens, hidden_size), top_k, size = x.shape, ids.shape[1], down.shape[2]
    num_shared = count_shared(shared, size)
    inner = torch.empty(tokens * (top_k + num_shared), size, dtype=x.dtype, device=x.device)
    _few_up[(cdiv(size, strip.rows), inner.shape[0])](
        x, ids, gate_up, (shared or experts)[0], inner, tokens,
        HIDDEN=hidden_size, SIZE=size, TOP_K=top_k, SHARED=num_shared,
        ROWS=strip.rows, TILE=strip.columns, num_warps=strip.num_warps, **pdl(x.device),
    )  # fmt: skip
    return inner


def few_down(
    out: torch.Tensor,
    inner: torch.Tensor,
    routed: tuple[torch.Tensor, torch.Tensor],
    experts: Pair,
    shared: Pair | None,
    strip: Strip,
) -> None:
    """out [T, H] += the sum over inner, as `few_up` gives it, weighted; weights and ids are [T, top_k]."""
    (weights, ids), (_, down) = routed, experts
    (tokens, top_k), hidden_size, size = ids.shape, down.shape[1], down.shape[2]
    _few_down[(cdiv(hidden_size, strip.rows), tokens)](
        inner, ids, weights, down, (shared or experts)[1], out, tokens,
        HIDDEN=hidden_size, SIZE=size, TOP_K=top_k, SHARED=count_shared(shared, size),
        ROWS=strip.rows, TILE=strip.columns, num_warps=strip.num_warps, **pdl(inner.device),
    )  # fmt: skip


def count_shared(shared: Pair | None, size: int) -> int:
    """How many experts of `size` the shared ones make."""
    return 0 if shared is None else shared[1].shape[1] // size


@triton.jit(do_not_specialize=["tokens"])
def _tiles_up(
    x_ptr, order_ptr, ends_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, gate_up_ptr, shared_ptr, inner_ptr, tokens,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
        at_x = x_ptr + token[:, None].to(tl.int64) * HIDDEN + col[None, :]  # rows past the block's last are read, not used
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
    x: torch.Tensor, top_k: int, by_expert: Sorted, block: int, experts: Pair, shared: Pair | None, tile: Tile
) -> torch.Tensor:
    """x [T, H] -> inner [pairs + S T, I] in the places of `by_expert`, whose blocks are of `block` pairs."""
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
    inner: torch.Tensor, by_expert: Sorted, block: int, experts: Pair, shared: Pair | None, tile: Tile
) -> torch.Tensor:
    """inner as `tiles_up` gives it -> rows [pairs + S T, H] in the same places, not yet weighted."""
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


@triton.jit
def _spread(x_ptr, place_ptr, out_ptr, SIZE: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + token * SIZE + col, mask=col < SIZE)
    for i in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + i).to(tl.int64)
        tl.store(out_ptr + place * SIZE + col, x, mask=col < SIZE)


def spread(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """x [T, H] -> [pairs, H]: each token's row at the places [pairs] int32 of its pairs, as many for each."""
    tokens, size = x.shape
    top_k = place.shape[0] // tokens
    out = torch.empty(place.shape[0], size, dtype=x.dtype, device=x.device)
    tile = min(2048, power_of_two(size))
    _spread[(tokens, cdiv(size, tile))](
        x, place, out, SIZE=size, TOP_K=top_k, TILE=tile, num_warps=max(1, tile // 256), **pdl(x.device)
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _add_weighted(
    rows_ptr, place_ptr, weights_ptr, out_ptr, tokens,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = col < SIZE
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at_out = out_ptr + token * SIZE + col
    acc = tl.load(at_out, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + i).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + i)
        acc += tl.load(rows_ptr + place * SIZE + col, mask=inside, other=0.0).to(tl.float32) * weight
    for i in tl.static_range(SHARED):
        place = tokens.to(tl.int64) * (TOP_K + i) + token
        acc += tl.load(rows_ptr + place * SIZE + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def add_weighted(out: torch.Tensor, rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> None:
    """out [T, H] += the rows [pairs + S T, H] at place [pairs], by weights [T, top_k], and the shared rows, which are last."""
    (tokens, top_k), size = weights.shape, rows.shape[1]
    tile = min(1024, power_of_two(size))
    _add_weighted[(tokens, cdiv(size, tile))](
        rows, place, weights, out, tokens,
        SIZE=size, TOP_K=top_k, SHARED=rows.shape[0] // tokens - top_k, TILE=tile,
        num_warps=max(1, tile // 256), **pdl(rows.device),
    )  # fmt: skip
