"""From logits to tokens, in Triton: the likeliest, and the draw that `sampling/choose.py` describes, its twin.

A draw keeps the tokens that pass top_k, top_p and min_p, in the vocabulary's order, and takes the one at which their running
weight passes `uniform` of the total. Each filter is a threshold on the logit. It is found without sorting, two bits of it at
a time: a pass over the row counts (for top_k) or weighs (for top_p) the tokens at or above each of three candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import pdl
from engine.kernels.paged_decode import arrivals

VOCAB_TILE = 4096  # logits that one program of `choose_likeliest` looks at
DRAW_TILE = 8192  # and one pass of `draw`


class DrawParams(NamedTuple):
    """How each row chooses, as in `sampling.choose.Choice`; [R] each."""

    temperature: torch.Tensor  # float64; 0: not drawn
    top_k: torch.Tensor  # float64, from 1; the vocabulary's size where there is no limit
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64


@triton.jit
def _likeliest(
    logits_ptr, rows_ptr, latest_ptr, tokens_ptr, best_ptr, index_ptr, arrived_ptr, vocab,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    seq, tile = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    col = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(logits_ptr + seq.to(tl.int64) * vocab + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
    best = tl.max(logits, 0)
    # Of equals the first, as torch's argmax has it. A row of NaN alone gives the first token there is.
    index = tl.min(tl.where(logits == best, col, vocab), 0)
    tl.store(best_ptr + seq * TILES + tile, best)
    tl.store(index_ptr + seq * TILES + tile, index)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + seq, 1, sem="acq_rel")
    if arrived == TILES - 1:
        tl.store(arrived_ptr + seq, 0)
        tiles = tl.arange(0, PADDED)
        inside = tiles < TILES
        bests = tl.load(best_ptr + seq * TILES + tiles, mask=inside, other=float("-inf"), cache_modifier=".cg")
        indices = tl.load(index_ptr + seq * TILES + tiles, mask=inside, other=0, cache_modifier=".cg")
        token = tl.min(tl.where(inside & (bests == tl.max(bests, 0)), indices, vocab), 0)
        token = tl.where(token < vocab, token, 0).to(tl.int64)
        tl.store(tokens_ptr + seq, token)
        tl.store(latest_ptr + tl.load(rows_ptr + seq), token)


def choose_likeliest(logits: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
    """The largest of each row of logits [B, V], the first of equals: [B] int64, written to `latest` [R] at `rows` [B] too."""
    num, vocab = logits.shape
    tiles = triton.cdiv(vocab, VOCAB_TILE)
    tokens = torch.empty(num, dtype=torch.int64, device=logits.device)
    best = torch.empty(num, tiles, dtype=torch.float32, device=logits.device)
    index = torch.empty(num, tiles, dtype=torch.int32, device=logits.device)
    _likeliest[(num, tiles)](
        logits, rows, latest, tokens, best, index, arrivals(logits.device), vocab,
        TILE=VOCAB_TILE, TILES=tiles, PADDED=triton.next_power_of_2(tiles), num_warps=4, **pdl(logits.device),
    )  # fmt: skip
    return tokens


@triton.jit
def _key(x):
    """An int64 that grows with the float32 x, from 0 (no number) to 2^32 - 1."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _at_or_above(at, vocab, best, temperature, t1, t2, t3, TILE: tl.constexpr, COUNT: tl.constexpr):
    """How many tokens of the row have a key of at least t1, t2 and t3, or what they weigh; float64."""
    col = tl.arange(0, TILE)
    zero = tl.zeros([TILE], tl.float32)
    a, b, c = zero, zero, zero
    for start in range(0, vocab, TILE):
        inside = start + col < vocab
        x = tl.load(at + start + col, mask=inside, other=float("-inf")).to(tl.float32)
        key = _key(x)
        weight = tl.where(inside, 1.0, 0.0) if COUNT else tl.exp((x - best) / temperature)
        a += tl.where(key >= t1, weight, 0.0)
        b += tl.where(key >= t2, weight, 0.0)
        c += tl.where(key >= t3, weight, 0.0)
    return tl.sum(a.to(tl.float64), 0), tl.sum(b.to(tl.float64), 0), tl.sum(c.to(tl.float64), 0)


@triton.jit
def _threshold(at, vocab, best, temperature, wanted, least, TILE: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """The largest key, and at least `least`, at or above which there are `wanted` tokens, or tokens of that weight."""
    found = tl.full([], 0, tl.int64)
    for level in range(BITS // 2):
        shift = 30 - 2 * level
        step = tl.full([], 1, tl.int64) << shift
        t1, t2, t3 = found + step, found + 2 * step, found + 3 * step
        a, b, c = _at_or_above(at, vocab, best, temperature, t1, t2, t3, TILE, COUNT)
        found = tl.where((a >= wanted) | (t1 <= least), t1, found)
        found = tl.where((b >= wanted) | (t2 <= least), t2, found)
        found = tl.where((c >= wanted) | (t3 <= least), t3, found)
    return found


@triton.jit(do_not_specialize=["vocab"])
def _draw(
    logits_ptr, rows_ptr, latest_ptr, tokens_ptr, uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, sums_ptr, vocab,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + seq)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature == 0.0:
        return
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    at = logits_ptr + seq.to(tl.int64) * vocab
    best = tl.load(at + tl.load(tokens_ptr + seq)).to(tl.float32)
    col = tl.arange(0, TILE)
    least = tl.full([], 0, tl.int64)
    STEP: tl.constexpr = 1 << (32 - BITS)  # from one key to the next that a number of the logits' type may have
    if top_k < vocab:
        least = _threshold(at, vocab, best, temperature, top_k, least, TILE, BITS, True)
    if top_p < 1.0:
        # Of those tied at the last place of top_k only so many count as there are places.
        above, number, _ = _at_or_above(at, vocab, best, temperature, least + STEP, least, least, TILE, True)
        weight_above, weight, _ = _at_or_above(at, vocab, best, temperature, least + STEP, least, least, TILE, False)
        total = weight_above + (tl.minimum(top_k, number) - above) * (weight - weight_above) / tl.maximum(number - above, 1.0)
        least = tl.maximum(least, _threshold(at, vocab, best, temperature, top_p * total, least, TILE, BITS, False))
    least = tl.minimum(least, _key(best))  # the likeliest always passes, with a top_p of 0 too
    floor = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p.to(tl.float32), 1e-38)), float("-inf"))

    for tile in range(TILES):
        x = tl.load(at + tile * TILE + col, mask=tile * TILE + col < vocab, other=float("-inf")).to(tl.float32)
        scaled = (x - best) / temperature
        weights = tl.where((_key(x) >= least) & (scaled >= floor), tl.exp(scaled), 0.0)
        tl.store(sums_ptr + seq * TILES + tile, tl.sum(weights.to(tl.float64), 0))
    tl.debug_barrier()
    tiles = tl.arange(0, PADDED)
    sums = tl.load(sums_ptr + seq * TILES + tiles, mask=tiles < TILES, other=0.0)
    ends = tl.cumsum(sums, 0)
    target = tl.load(uniform_ptr + seq) * tl.sum(sums, 0)
    # Where rounding puts the target on the total, the last tile that has any weight, and in it the last token.
    last = tl.max(tl.where(sums > 0.0, tiles, 0), 0)
    tile = tl.minimum(tl.sum(tl.where(ends <= target, 1, 0), 0), last)
    rest = target - tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
    x = tl.load(at + tile * TILE + col, mask=tile * TILE + col < vocab, other=float("-inf")).to(tl.float32)
    scaled = (x - best) / temperature
    weights = tl.where((_key(x) >= least) & (scaled >= floor), tl.exp(scaled), 0.0)
    running = tl.cumsum(weights.to(tl.float64), 0)
    last_col = tl.max(tl.where(weights > 0.0, col, 0), 0)
    first = tl.min(tl.where((running > rest) & (weights > 0.0), col, last_col), 0)
    token = (tile * TILE + first).to(tl.int64)
    tl.store(tokens_ptr + seq, token)
    tl.store(latest_ptr + row, token)


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    latest: torch.Tensor,
    tokens: torch.Tensor,
    uniform: torch.Tensor,
    params: DrawParams,
) -> None:
    """Replace `tokens` [B], the likeliest of each row of logits [B, V], by draws where the row has a temperature; `latest` too.

    `rows` [B] int32 are the places in `latest` and `params`, uniform [B] is float64 in [0, 1).
    """
    num, vocab = logits.shape
    tiles = triton.cdiv(vocab, DRAW_TILE)
    sums = torch.empty(num, tiles, dtype=torch.float64, device=logits.device)
    _draw[(num,)](
        logits, rows, latest, tokens, uniform, *params, sums, vocab,
        TILE=DRAW_TILE, TILES=tiles, PADDED=triton.next_power_of_2(tiles), BITS=16 if logits.dtype == torch.bfloat16 else 32,
        num_warps=16, **pdl(logits.device),
    )  # fmt: skip
