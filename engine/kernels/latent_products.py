"""Kernels for the products with the weight kv_b around latent attention, and a kernel that builds keys from expanded latents.

kv_b [heads, nope + v_dim, rank] expands a latent to each head's key (the first nope rows, W_k) and value (the others, W_v).
Decodes attend in latent space (DeepSeek-V2, arXiv 2405.04434, section 2.1), so both expansions move to the other side:

    absorb      before attention: computes W_k^T q of each head, which attention multiplies with latents
    expand      after attention: computes W_v times each head's averaged latents

For a single sequence of few heads, `absorb_few` and `merge_expand` do this in plain arithmetic; `merge_expand` also merges the
splits of the decode. From absorb to expand, one sequence of 16 heads and 1,100 tokens takes 12.6 us, and took 16.3 us before
these two kernels existed; for two or more sequences plain arithmetic is slower (docs/gpu.md).

`build_keys` puts the two parts of each key together for cuDNN, which takes keys as one tensor. The twins are in
`attention/torch_mla.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dot import MIN_DOT_ROWS, precision
from engine.kernels.launch import cdiv, pdl, power_of_two

COLUMNS = 64  # numbers of an absorbed query, [rank], that one program of `absorb` computes
VALUES = 32  # numbers of a head's value that one program of `merge_expand` computes
MAX_TOKENS = 64  # most tokens that one program of `absorb` computes


@triton.jit(do_not_specialize=["num_tokens"])
def _absorb(
    q_ptr, w_ptr, out_ptr, num_tokens, q_stride,
    HEADS: tl.constexpr, HEAD: tl.constexpr, NOPE: tl.constexpr, PADDED: tl.constexpr, EXPANDED: tl.constexpr,
    RANK: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, head, tile) computes COLS numbers of W_k^T q for TOKENS tokens of one head, by `tl.dot`."""
    part, head, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dim = tl.arange(0, PADDED)
    col = part * COLS + tl.arange(0, COLS)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    known = dim < NOPE
    w = tl.load(w_ptr + (head * EXPANDED + dim)[:, None] * RANK + col[None, :], mask=known[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = token.to(tl.int64) * q_stride + head * HEAD
    q = tl.load(q_ptr + at[:, None] + dim[None, :], mask=live[:, None] & known[None, :], other=0.0)
    out = tl.dot(q, w, input_precision=PRECISION)
    at = (token.to(tl.int64) * HEADS + head) * RANK
    tl.store(out_ptr + at[:, None] + col[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])


def absorb(q: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """Compute W_k^T q_nope of each head, [D, heads, rank], from q [D, heads, nope + rope], on tensor cores.

    W_k is the first `nope` rows of each head in kv_b [heads, nope + v_dim, rank]. A token's heads are adjacent in q; rank is a
    power of two. grid: (rank / COLUMNS, heads, tiles of tokens).
    """
    num, heads, head = q.shape
    _, expanded, rank = kv_b.shape
    columns, tokens = min(COLUMNS, rank), _token_tile(num)
    out = torch.empty(num, heads, rank, dtype=q.dtype, device=q.device)
    _absorb[(rank // columns, heads, cdiv(num, tokens))](
        q, kv_b, out, num, q.stride(0),
        HEADS=heads, HEAD=head, NOPE=nope, PADDED=max(MIN_DOT_ROWS, power_of_two(nope)), EXPANDED=expanded,
        RANK=rank, COLS=columns, TOKENS=tokens, PRECISION=precision(q.dtype), num_warps=4, **pdl(q.device),
    )  # fmt: skip
    return out


@triton.jit
def _absorb_few(
    q_ptr, w_ptr, out_ptr, q_stride,
    HEADS: tl.constexpr, HEAD: tl.constexpr, NOPE: tl.constexpr, PADDED: tl.constexpr, EXPANDED: tl.constexpr,
    RANK: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, head, token) computes COLS numbers of W_k^T q of one token and head, in plain arithmetic."""
    part, head, token = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, PADDED)
    col = part * COLS + tl.arange(0, COLS)
    known = dim < NOPE
    w = tl.load(w_ptr + (head * EXPANDED + dim)[:, None] * RANK + col[None, :], mask=known[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    q = tl.load(q_ptr + token * q_stride + head * HEAD + dim, mask=known, other=0.0).to(tl.float32)
    out = tl.sum(w.to(tl.float32) * q[:, None], 0)
    tl.store(out_ptr + (token * HEADS + head) * RANK + col, out.to(out_ptr.dtype.element_ty))


def absorb_few(q: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """Compute the result of `absorb` in plain arithmetic. The weights are read once for each token. grid: (rank / COLUMNS, heads,
    D)."""
    num, heads, head = q.shape
    _, expanded, rank = kv_b.shape
    columns = min(COLUMNS, rank)
    out = torch.empty(num, heads, rank, dtype=q.dtype, device=q.device)
    _absorb_few[(rank // columns, heads, num)](
        q, kv_b, out, q.stride(0),
        HEADS=heads, HEAD=head, NOPE=nope, PADDED=power_of_two(nope), EXPANDED=expanded,
        RANK=rank, COLS=columns, num_warps=4, **pdl(q.device),
    )  # fmt: skip
    return out


@triton.jit
def _merge_expand(
    parts_ptr, lse_ptr, w_ptr, out_ptr,
    HEADS: tl.constexpr, NOPE: tl.constexpr, EXPANDED: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, head, token) merges SPLITS averaged latents, and computes COLS numbers of W_v times the result."""
    part, head, token = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    V_DIM: tl.constexpr = EXPANDED - NOPE
    col = part * COLS + tl.arange(0, COLS)
    dim = tl.arange(0, RANK)
    known = col < V_DIM
    w = tl.load(w_ptr + (head * EXPANDED + NOPE + col)[:, None] * RANK + dim[None, :], mask=known[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = token * HEADS + head
    split = pair * SPLITS + tl.arange(0, SPLITS)
    # The latents of every split are loaded, even of empty splits, which wrote none: so these loads do not wait for `lse`.
    parts = tl.load(parts_ptr + split[:, None] * RANK + dim[None, :])
    lse = tl.load(lse_ptr + split)
    weight = tl.exp2(lse - tl.max(lse, 0))
    parts = tl.where(weight[:, None] > 0.0, parts, 0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    out = tl.sum(w.to(tl.float32) * mixed[None, :], 1)
    tl.store(out_ptr + pair * V_DIM + col, out.to(out_ptr.dtype.element_ty), mask=known)


def merge_expand(parts: torch.Tensor, lse: torch.Tensor, kv_b: torch.Tensor, nope: int, out: torch.Tensor) -> None:
    """Merge the splits of `mla_decode`, and write W_v times the merged latents to `out` [D, heads, v_dim], contiguous.

    parts [D, heads, splits, rank] and lse [D, heads, splits] float32 are the fields of `mla_decode.Parts`.
    grid: (v_dim / VALUES, heads, D). Every program merges the splits itself: that is cheaper than another launch.
    """
    num, heads, splits, rank = parts.shape
    expanded = kv_b.shape[1]
    _merge_expand[(cdiv(expanded - nope, VALUES), heads, num)](
        parts, lse, kv_b, out,
        HEADS=heads, NOPE=nope, EXPANDED=expanded, RANK=rank, COLS=VALUES, SPLITS=splits, num_warps=8, **pdl(out.device),
    )  # fmt: skip


def expand(mixed: torch.Tensor, kv_b: torch.Tensor, nope: int, out: torch.Tensor) -> None:
    """Write W_v times mixed [D, heads, rank], each head's averaged latents, to `out` [D, heads, v_dim], contiguous.

    This is torch's product. A kernel that also merged the splits was slower: 38.7 against 34.3 us for 64 sequences (docs/gpu.md).
    """
    torch.bmm(mixed.transpose(0, 1), kv_b[:, nope:].transpose(1, 2), out=out.transpose(0, 1))


def _token_tile(num: int) -> int:
    return min(MAX_TOKENS, max(MIN_DOT_ROWS, power_of_two(num)))


@triton.jit
def _build_keys(
    expanded_ptr, latent_ptr, out_ptr, latent_stride,
    HEADS: tl.constexpr, PADDED: tl.constexpr, NOPE: tl.constexpr, NOPE_PADDED: tl.constexpr, EXPANDED: tl.constexpr,
    RANK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Program (token,) writes the keys [nope | rope] of all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)
    dim = tl.arange(0, NOPE_PADDED)
    rope = tl.arange(0, ROPE)
    live = (head < HEADS)[:, None]
    inside = live & (dim < NOPE)[None, :]
    source = expanded_ptr + (token * HEADS + head)[:, None] * EXPANDED
    target = out_ptr + (token * HEADS + head)[:, None] * (NOPE + ROPE)
    tl.store(target + dim[None, :], tl.load(source + dim[None, :], mask=inside), mask=inside)
    key = tl.load(latent_ptr + token * latent_stride + RANK + rope)
    tl.store(target + NOPE + rope[None, :], tl.broadcast_to(key[None, :], [PADDED, ROPE]), mask=live)


def build_keys(expanded: torch.Tensor, latent: torch.Tensor, nope: int, rank: int) -> torch.Tensor:
    """Build each head's whole key, [L, heads, nope + rope]: its expanded key, then the rotary key that all heads share.

    expanded [L, heads, nope + v_dim], contiguous, holds each head's expanded key and value. latent [L, rank + rope] are the
    tokens' records. grid: (L,).
    """
    num, heads, width = expanded.shape
    rope = latent.shape[1] - rank
    out = torch.empty(num, heads, nope + rope, dtype=expanded.dtype, device=expanded.device)
    _build_keys[(num,)](
        expanded, latent, out, latent.stride(0),
        HEADS=heads, PADDED=power_of_two(heads), NOPE=nope, NOPE_PADDED=power_of_two(nope),
        EXPANDED=width, RANK=rank, ROPE=rope, num_warps=4 if heads <= 32 else 8,
    )  # fmt: skip
    return out
