"""What multi-head latent attention does between its matrix products and attention itself, in Triton.

    latent_prepare  norm of the latent, rotary embedding of keys and queries, the write into the pool
    absorb          q_nope of each head times its key expansion, before a decode
    expand          averaged latents of each head times its value expansion, behind a decode
    build_keys      expanded keys beside the shared rotary one, for attention that wants them as one tensor

For a single sequence of few heads the two products are plain arithmetic: `absorb_few` and `merge_expand`, which has the merge
of the decode's splits in front. The first has its twin in `layers/ops.py`, the others in `attention/torch_ref.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two
from engine.kernels.paged_decode import MIN_DOT_ROWS, precision

HEADS_A_PROGRAM = 16  # of queries that one program of `latent_prepare` turns
COLUMNS = 64  # of the product in one program of `absorb`
VALUES = 32  # of the product in one program of `merge_expand`
MAX_TOKENS = 64  # rows of a product in one program


@triton.jit
def _turn(at, live, cos_ptr, sin_ptr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both halves, turned, of the heads [N] that begin at `at`: pairs lie side by side, or half a head apart."""
    low = tl.arange(0, HALF)
    if INTERLEAVED:
        both = tl.load(at[:, None] + tl.arange(0, 2 * HALF)[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [at.shape[0], HALF, 2]))
    else:
        a = tl.load(at[:, None] + low[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        b = tl.load(at[:, None] + HALF + low[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    cos_a, cos_b = tl.load(cos_ptr + low)[None, :], tl.load(cos_ptr + HALF + low)[None, :]
    sin_a, sin_b = tl.load(sin_ptr + low)[None, :], tl.load(sin_ptr + HALF + low)[None, :]  # signed, as `rotate` wants them
    return a * cos_a + b * sin_a, b * cos_b + a * sin_b


@triton.jit
def _prepare(
    q_ptr, kv_ptr, weight_ptr, cos_ptr, sin_ptr, pool_ptr, slots_ptr, eps, q_stride, kv_stride,
    HEADS: tl.constexpr, HEAD: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, ROPE: tl.constexpr,
    GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
        key_a, key_b = _turn(kv_ptr + RANK + one, one == 0, cos_ptr, sin_ptr, HALF, INTERLEAVED)
        key_a, key_b = key_a.to(pool_ptr.dtype.element_ty), key_b.to(pool_ptr.dtype.element_ty)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * weight
        x = x.to(pool_ptr.dtype.element_ty)
        key_at = one[:, None] + low[None, :]
        tl.debug_barrier()  # all has been read before it is overwritten
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
        a, b = _turn(at, live, cos_ptr, sin_ptr, HALF, INTERLEAVED)
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
    """See `Ops.latent_prepare`. Each token's numbers lie side by side, the rotary part is a power of two, the pool contiguous;
    q and kv are overwritten and returned.
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


@triton.jit(do_not_specialize=["num_tokens"])
def _absorb(
    q_ptr, w_ptr, out_ptr, num_tokens, q_stride,
    HEADS: tl.constexpr, HEAD: tl.constexpr, NOPE: tl.constexpr, PADDED: tl.constexpr, EXPANDED: tl.constexpr,
    RANK: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
    """q [D, heads, nope + rope], a token's heads side by side, and kv_b [heads, nope + v_dim, rank] -> [D, heads, rank].

    q_nope of each head, to meet latents as they are: see `torch_ref.absorb`. rank is a power of two.
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
    """As `absorb`; each token reads the weights for itself."""
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
    # Loaded whether or not it was written: so these loads need not wait for those of the log-sum-exps.
    parts = tl.load(parts_ptr + split[:, None] * RANK + dim[None, :])
    lse = tl.load(lse_ptr + split)
    weight = tl.exp2(lse - tl.max(lse, 0))
    parts = tl.where(weight[:, None] > 0.0, parts, 0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    out = tl.sum(w.to(tl.float32) * mixed[None, :], 1)
    tl.store(out_ptr + pair * V_DIM + col, out.to(out_ptr.dtype.element_ty), mask=known)


def merge_expand(parts: torch.Tensor, lse: torch.Tensor, kv_b: torch.Tensor, nope: int, out: torch.Tensor) -> None:
    """What `mla_decode` returns, merged, times the value expansion: into `out` [D, heads, v_dim], contiguous. Every
    program merges for itself.
    """
    num, heads, splits, rank = parts.shape
    expanded = kv_b.shape[1]
    _merge_expand[(cdiv(expanded - nope, VALUES), heads, num)](
        parts, lse, kv_b, out,
        HEADS=heads, NOPE=nope, EXPANDED=expanded, RANK=rank, COLS=VALUES, SPLITS=splits, num_warps=8, **pdl(out.device),
    )  # fmt: skip


def expand(mixed: torch.Tensor, kv_b: torch.Tensor, nope: int, out: torch.Tensor) -> None:
    """mixed [D, heads, rank], latents averaged by attention, times the value expansion: into `out` [D, heads, v_dim], contiguous.

    By torch: for more than one sequence kernels of our own, with the merge of the splits in front, were no faster (docs/gpu.md).
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
    """expanded [L, heads, nope + v_dim], contiguous, and latent [L, rank + rope] -> keys [L, heads, nope + rope]."""
    num, heads, width = expanded.shape
    rope = latent.shape[1] - rank
    out = torch.empty(num, heads, nope + rope, dtype=expanded.dtype, device=expanded.device)
    _build_keys[(num,)](
        expanded, latent, out, latent.stride(0),
        HEADS=heads, PADDED=power_of_two(heads), NOPE=nope, NOPE_PADDED=power_of_two(nope),
        EXPANDED=width, RANK=rank, ROPE=rope, num_warps=4 if heads <= 32 else 8,
    )  # fmt: skip
    return out
