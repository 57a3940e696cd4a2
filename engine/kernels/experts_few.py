"""Kernels for the experts of one or two tokens, in plain arithmetic. Every (token, expert) pair reads its expert's weights.

With so few tokens hardly any expert is used twice, so sorting pairs by expert would save few reads. `experts.py` explains the
data flow. The twin is `layers.moe.run_experts`.

`_few_up`    grid (tiles of I, pairs + S T), S shared experts: a program computes ROWS numbers of silu(gate) * up of one pair
`_few_down`  grid (tiles of H, T): a program computes ROWS outputs of one token, summed over its experts, and adds them to the
             residual stream
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.experts import ExpertWeights, count_shared
from engine.kernels.launch import cdiv, pdl


class Strip(NamedTuple):
    """The part of a product that one program of `_few_up` or `_few_down` computes."""

    rows: int  # rows of a weight matrix that a program multiplies
    columns: int  # columns that a program reads in one pass of its loop
    num_warps: int


@triton.jit(do_not_specialize=["tokens"])
def _few_up(
    x_ptr, ids_ptr, gate_up_ptr, shared_ptr, inner_ptr, tokens,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, pair) computes ROWS numbers of silu(gate) * up for one (token, expert) pair.

    Pairs from tokens * TOP_K on are the pairs of each shared expert with every token.
    """
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
        # x is loaded once for each row of the weight, since rows could share one load only through shared memory.
        at_x = x_ptr + token.to(tl.int64) * HIDDEN + col
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
    """Program (tile, token) computes ROWS outputs of one token, summed over its TOP_K experts and SHARED shared experts."""
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
            if i + 1 < TOP_K:  # the next expert's id is loaded early: behind this expert's weights it would have to wait
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


def few_up(
    x: torch.Tensor, ids: torch.Tensor, experts: ExpertWeights, shared: ExpertWeights | None, strip: Strip
) -> torch.Tensor:
    """Compute silu(gate) * up of each (token, expert) pair and then of each of S shared experts: inner [pairs + S T, I].

    x [T, H] are the tokens, and ids [T, top_k] the experts of each token.
    """
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
    experts: ExpertWeights,
    shared: ExpertWeights | None,
    strip: Strip,
) -> None:
    """Add the weighted sum of each token's expert outputs to out [T, H]. `inner` is the result of `few_up`.

    `routed` is (weights [T, top_k] float32, ids [T, top_k] int32); shared experts have weight 1.
    """
    (weights, ids), (_, down) = routed, experts
    (tokens, top_k), hidden_size, size = ids.shape, down.shape[1], down.shape[2]
    _few_down[(cdiv(hidden_size, strip.rows), tokens)](
        inner, ids, weights, down, (shared or experts)[1], out, tokens,
        HIDDEN=hidden_size, SIZE=size, TOP_K=top_k, SHARED=count_shared(shared, size),
        ROWS=strip.rows, TILE=strip.columns, num_warps=strip.num_warps, **pdl(inner.device),
    )  # fmt: skip
