"""The draw of tokens that `sampling/choose.py` describes, its twin, in Triton: two launches, many programs a row.

A draw keeps the tokens that pass top_k, top_p and min_p, in the vocabulary's order, and takes the one at which their running
weight passes `uniform` of the total. Each filter is a threshold on the logit.

`_survey` weighs the tiles of a row. Where nothing but min_p filters, the program that is last to finish draws: it picks the
tile, then the token in it. Otherwise it brackets the threshold from below and above:

    top_k   at least top_k tokens are as likely as the top_k-th largest of the maxima of groups of tokens
    top_p   each tile has told what its tokens weigh from each of some marks on; the threshold lies between two marks

`_finish` lists the tokens above the lower end, which are few as a rule. The last program searches the list for the exact
threshold, and draws from it. Where a tile has more of them than there are slots, it does the same with the whole row: slower,
and just as right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.hardware import processors
from engine.kernels.launch import arrivals, cdiv, pdl, power_of_two

DRAW_TILE = 4096  # logits that a program looks at at a time
GROUP = 128  # tokens, in a tile, of which `_survey` notes the largest
MARKS = 16  # the last of them is below all tokens. All of these are powers of two
SLOTS = 512  # tokens that a tile can list
_PACKED = 32  # slots of each tile that are packed at a time
_SURVEY_WARPS, _SURVEYS = 8, 2  # a program's, and how many programs a processor holds
_FINISH_WARPS, _FINISHES = 16, 1


class DrawParams(NamedTuple):
    """How each row chooses, as in `sampling.choose.Choice`; [R] each."""

    temperature: torch.Tensor  # float64; 0: not drawn
    top_k: torch.Tensor  # float64, from 1; the vocabulary's size where there is no limit
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64


# A key is an integer that grows with a number, and by 1 from each number of the logits' type to the next: the bits of its
# magnitude, inverted where it is negative. Searches halve ranges of keys; tokens are compared as numbers, -0 with 0 too.


@triton.jit
def _key(x, BITS: tl.constexpr):
    """The key, int64, of float32 x cut to BITS."""
    code = x.to(tl.int32, bitcast=True) >> (32 - BITS)
    return (code ^ ((code >> 31) & ((1 << (BITS - 1)) - 1))).to(tl.int64)


@triton.jit
def _number(key, BITS: tl.constexpr):
    """The float32 of a key."""
    code = key.to(tl.int32)
    return ((code ^ ((code >> 31) & ((1 << (BITS - 1)) - 1))) << (32 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _at_or_above(at, num, best, temperature, x1, x2, x3, TILE: tl.constexpr, COUNT: tl.constexpr):
    """How many of `num` tokens have a logit of at least x1, x2 and x3, or what they weigh; float64."""
    col = tl.arange(0, TILE)
    zero = tl.zeros([TILE], tl.float32)
    a, b, c = zero, zero, zero
    # Past the L1, which may hold what an older launch had there: other programs wrote the maxima.
    following = tl.load(at + col, mask=col < num, other=float("-inf"), cache_modifier=".cg")
    for start in range(0, num, TILE):
        x = following.to(tl.float32)
        after = start + TILE + col  # on its way while the sums of these are made
        following = tl.load(at + after, mask=after < num, other=float("-inf"), cache_modifier=".cg")
        weight = tl.where(start + col < num, 1.0, 0.0) if COUNT else tl.exp((x - best) / temperature)
        a += tl.where(x >= x1, weight, 0.0)
        b += tl.where(x >= x2, weight, 0.0)
        c += tl.where(x >= x3, weight, 0.0)
    return tl.sum(a.to(tl.float64), 0), tl.sum(b.to(tl.float64), 0), tl.sum(c.to(tl.float64), 0)


@triton.jit
def _threshold(
    at, num, best, temperature, wanted, low, high, TILE: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """The largest key below `high` at or above which there are `wanted` tokens, or tokens of that weight; `low` if none is."""
    while high - low > 1:
        step = (high - low + 3) // 4
        t1, t2, t3 = low + step, low + 2 * step, low + 3 * step
        x1, x2, x3 = _number(t1, BITS), _number(t2, BITS), _number(t3, BITS)
        a, b, c = _at_or_above(at, num, best, temperature, x1, x2, x3, TILE, COUNT)
        low = tl.where((a >= wanted) & (t1 < high), t1, low)
        low = tl.where((b >= wanted) & (t2 < high), t2, low)
        low = tl.where((c >= wanted) & (t3 < high), t3, low)
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def _weights(x, best, temperature, least, floor):
    """What the tokens that pass weigh, 1 the likeliest."""
    scaled = (x - best) / temperature
    return tl.where((x >= least) & (scaled >= floor), tl.exp(scaled), 0.0)


@triton.jit
def _floor(min_p):
    return tl.where(min_p > 0.0, tl.log(tl.maximum(min_p.to(tl.float32), 1e-38)), float("-inf"))


@triton.jit
def _pick(sums_ptr, at, num, best, temperature, least, floor, uniform, TILE: tl.constexpr, PADDED: tl.constexpr):
    """The place among `num` tokens of the one that is drawn; `sums_ptr` has what passes in each tile of them weighs."""
    tiles = tl.arange(0, PADDED)
    sums = tl.load(sums_ptr + tiles, mask=tiles * TILE < num, other=0.0, cache_modifier=".cg")
    ends = tl.cumsum(sums, 0)
    target = uniform * tl.sum(sums, 0)
    # Where rounding puts the target on the total, the last tile that has any weight, and in it the last token.
    last = tl.max(tl.where(sums > 0.0, tiles, 0), 0)
    tile = tl.minimum(tl.sum(tl.where(ends <= target, 1, 0), 0), last)
    rest = target - tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
    col = tl.arange(0, TILE)
    x = tl.load(at + tile * TILE + col, mask=tile * TILE + col < num, other=float("-inf")).to(tl.float32)
    weights = _weights(x, best, temperature, least, floor)
    running = tl.cumsum(weights.to(tl.float64), 0)
    last_col = tl.max(tl.where(weights > 0.0, col, 0), 0)
    first = tl.min(tl.where((running > rest) & (weights > 0.0), col, last_col), 0)
    return tile * TILE + first


@triton.jit
def _is_last(arrived_ptr, programs):
    """Whether the row's other `programs` are done; what they wrote must be read past the L1."""
    tl.debug_barrier()  # all that the program writes is written before it says so
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)  # for the next launch
    return last


@triton.jit
def _between_marks(
    sums_ptr, above_ptr, marks_ptr, top_p, lowest, above_highest,
    TILES: tl.constexpr, PADDED: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """The keys between which top_p's threshold lies, and what all tokens weigh."""
    tiles, i = tl.arange(0, PADDED), tl.arange(0, MARKS)
    inside = tiles < TILES
    total = tl.sum(tl.load(sums_ptr + tiles, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    at_above = above_ptr + i[:, None] * TILES + tiles[None, :]
    above = tl.load(at_above, mask=inside[None, :], other=0.0, cache_modifier=".cg")
    above = tl.sum(above.to(tl.float64), 1)
    marks = tl.load(marks_ptr + i, cache_modifier=".cg")
    # What tiles have above a mark is summed in float32, so a mark near the threshold is on neither side for certain.
    low = tl.max(tl.where(above >= top_p * total * 1.00001, marks, lowest), 0)
    high = tl.min(tl.where(above < top_p * total * 0.99999, marks, above_highest), 0)
    return low, high, total


@triton.jit
def _survey(
    logits_ptr, rows_ptr, latest_ptr, tokens_ptr, uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    sums_ptr, maxima_ptr, marks_ptr, above_ptr, bracket_ptr, total_ptr, arrived_ptr, vocab,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, MARKS: tl.constexpr,
    BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    seq, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + seq)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    argmax = tl.load(tokens_ptr + seq)
    if (temperature == 0.0) | (argmax < 0):  # NO_TOKEN stays
        return
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    at = logits_ptr + seq.to(tl.int64) * vocab
    best = tl.load(at + argmax).to(tl.float32)
    lowest, highest = _key(tl.full([], float("-inf"), tl.float32), BITS), _key(best, BITS)
    floor = tl.where(top_p < 1.0, float("-inf"), _floor(min_p))  # top_p is of all tokens' weight
    # Tokens this far down, were they all so likely, would weigh no more than top_p leaves out.
    depth = temperature * tl.log(vocab / tl.maximum((1.0 - top_p).to(tl.float32), 1e-30))
    GROUPS: tl.constexpr = TILE // GROUP
    sums_ptr += seq * TILES
    maxima_ptr += seq * TILES * GROUPS
    marks_ptr += seq * MARKS
    above_ptr += seq * MARKS * TILES

    col = part * TILE + tl.arange(0, TILE)
    following = tl.load(at + col, mask=col < vocab, other=float("-inf"))
    for tile in range(part, TILES, parts):
        x = following.to(tl.float32)
        col += parts * TILE  # on its way while these are weighed
        following = tl.load(at + col, mask=col < vocab, other=float("-inf"))
        if top_k < vocab:
            maxima = tl.max(tl.reshape(x, [GROUPS, GROUP]), 1)
            tl.store(maxima_ptr + tile * GROUPS + tl.arange(0, GROUPS), maxima.to(maxima_ptr.dtype.element_ty))
        else:
            weights = _weights(x, best, temperature, float("-inf"), floor)
            tl.store(sums_ptr + tile, tl.sum(weights.to(tl.float64), 0))
            if top_p < 1.0:
                for i in tl.static_range(MARKS):
                    mark = lowest
                    if i < MARKS - 1:
                        mark = _key(best - depth * ((i + 1) / (MARKS - 1)), BITS)
                    above = tl.sum(tl.where(x >= _number(mark, BITS), weights, 0.0), 0)
                    tl.store(above_ptr + i * TILES + tile, above)
                    tl.store(marks_ptr + i, mark, mask=tile == 0)

    if _is_last(arrived_ptr + seq, parts):
        if (top_k >= vocab) & (top_p >= 1.0):
            uniform = tl.load(uniform_ptr + seq)
            token = _pick(sums_ptr, at, vocab, best, temperature, float("-inf"), floor, uniform, TILE, PADDED).to(tl.int64)
            tl.store(tokens_ptr + seq, token)
            tl.store(latest_ptr + row, token)
        else:
            low, high = lowest, highest + 1
            if top_k < vocab:
                low = _threshold(maxima_ptr, TILES * GROUPS, best, temperature, top_k, low, high, TILE // 2, BITS, True)
            else:
                low, high, total = _between_marks(sums_ptr, above_ptr, marks_ptr, top_p, low, high, TILES, PADDED, MARKS)
                tl.store(total_ptr + seq, total)
            tl.store(bracket_ptr + seq * 2, low)
            tl.store(bracket_ptr + seq * 2 + 1, high)


@triton.jit
def _search(
    at, num, best, temperature, top_k, top_p, min_p, total, low, high, uniform, sums_ptr, vocab,
    TILE: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The place, among `num` tokens in which are all that pass, of the one that is drawn."""
    if top_k < vocab:
        low = _threshold(at, num, best, temperature, top_k, low, high, TILE, BITS, True)
        if top_p < 1.0:
            # Of those tied at the last place of top_k only so many count as there are places.
            least, next_one = _number(low, BITS), _number(low + 1, BITS)
            above, number, _ = _at_or_above(at, num, best, temperature, next_one, least, least, TILE, True)
            weight_above, weight, _ = _at_or_above(at, num, best, temperature, next_one, least, least, TILE, False)
            tied = (weight - weight_above) / tl.maximum(number - above, 1.0)
            total = weight_above + (tl.minimum(top_k, number) - above) * tied
    if top_p < 1.0:
        low = _threshold(at, num, best, temperature, top_p * total, low, high, TILE, BITS, False)
    least, floor = _number(low, BITS), _floor(min_p)
    col = tl.arange(0, TILE)
    for start in range(0, num, TILE):
        x = tl.load(at + start + col, mask=start + col < num, other=float("-inf")).to(tl.float32)
        weights = _weights(x, best, temperature, least, floor)
        tl.store(sums_ptr + start // TILE, tl.sum(weights.to(tl.float64), 0))
    tl.debug_barrier()
    return _pick(sums_ptr, at, num, best, temperature, least, floor, uniform, TILE, PADDED)


@triton.jit
def _finish(
    logits_ptr, rows_ptr, latest_ptr, tokens_ptr, uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    sums_ptr, bracket_ptr, total_ptr, counts_ptr, slots_ptr, listed_ptr, places_ptr, arrived_ptr, vocab,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr,
    BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    seq, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + seq)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    argmax = tl.load(tokens_ptr + seq)
    if (temperature == 0.0) | (argmax < 0):  # NO_TOKEN stays
        return
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if (top_k >= vocab) & (top_p >= 1.0):
        return
    at = logits_ptr + seq.to(tl.int64) * vocab
    best = tl.load(at + argmax).to(tl.float32)
    low, high = tl.load(bracket_ptr + seq * 2), tl.load(bracket_ptr + seq * 2 + 1)
    col = part * TILE + tl.arange(0, TILE)
    following = tl.load(at + col, mask=col < vocab, other=float("nan"))  # which is not above anything
    for tile in range(part, TILES, parts):
        listed = following.to(tl.float32) >= _number(low, BITS)
        following = tl.load(at + col + parts * TILE, mask=col + parts * TILE < vocab, other=float("nan"))
        slot = tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(counts_ptr + seq * TILES + tile, tl.sum(listed.to(tl.int32), 0))
        tl.store(slots_ptr + (seq.to(tl.int64) * TILES + tile) * SLOTS + slot, col, mask=listed & (slot < SLOTS))
        col += parts * TILE
    if _is_last(arrived_ptr + seq, parts):
        min_p, total, uniform = tl.load(min_p_ptr + row), tl.load(total_ptr + seq), tl.load(uniform_ptr + seq)
        tiles = tl.arange(0, PADDED)
        counts = tl.load(counts_ptr + seq * TILES + tiles, mask=tiles < TILES, other=0, cache_modifier=".cg")
        most = tl.max(counts, 0)
        if most <= SLOTS:
            slots_ptr += seq.to(tl.int64) * TILES * SLOTS
            listed_ptr += seq.to(tl.int64) * TILES * SLOTS
            places_ptr += seq.to(tl.int64) * TILES * SLOTS
            starts = tl.cumsum(counts, 0) - counts
            for begin in range(0, most, PACKED):
                slots = begin + tl.arange(0, PACKED)[None, :]
                used = slots < counts[:, None]
                place = tl.load(slots_ptr + tiles[:, None] * SLOTS + slots, mask=used, other=0, cache_modifier=".cg")
                tl.store(places_ptr + starts[:, None] + slots, place, mask=used)
                tl.store(listed_ptr + starts[:, None] + slots, tl.load(at + place, mask=used, other=0.0), mask=used)
            tl.debug_barrier()
            found = _search(listed_ptr, tl.sum(counts, 0), best, temperature, top_k, top_p, min_p, total, low, high, uniform,
                            sums_ptr + seq * TILES, vocab, TILE, PADDED, BITS)  # fmt: skip
            token = tl.load(places_ptr + found, cache_modifier=".cg").to(tl.int64)
        else:
            token = _search(at, vocab, best, temperature, top_k, top_p, min_p, total, low, high, uniform,
                            sums_ptr + seq * TILES, vocab, TILE, PADDED, BITS).to(tl.int64)  # fmt: skip
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
    NO_TOKEN is not replaced.

    `rows` [B] int32 are the places in `latest` and `params`, uniform [B] is float64 in [0, 1).
    """
    num, vocab = logits.shape
    tiles, groups = cdiv(vocab, DRAW_TILE), DRAW_TILE // GROUP

    def scratch(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num, *shape, dtype=dtype, device=logits.device)

    sums, total = scratch(torch.float64, tiles), scratch(torch.float64)
    bracket = scratch(torch.int64, 2)  # keys: the threshold is at the first or above, and below the second
    inputs = (logits, rows, latest, tokens, uniform, *params)
    bits = 16 if logits.dtype == torch.bfloat16 else 32
    options = {"TILE": DRAW_TILE, "TILES": tiles, "PADDED": power_of_two(tiles), "BITS": bits, **pdl(logits.device)}
    maxima = scratch(logits.dtype, tiles, groups)
    marks, above = scratch(torch.int64, MARKS), scratch(torch.float32, MARKS, tiles)
    _survey[(num, min(tiles, max(1, _SURVEYS * processors(logits.device) // num)))](
        *inputs, sums, maxima, marks, above, bracket, total, arrivals(logits.device), vocab,
        GROUP=GROUP, MARKS=MARKS, num_warps=_SURVEY_WARPS, **options,
    )  # fmt: skip
    counts, slots = scratch(torch.int32, tiles), scratch(torch.int32, tiles, SLOTS)
    listed, places = scratch(logits.dtype, tiles, SLOTS), scratch(torch.int32, tiles, SLOTS)
    _finish[(num, min(tiles, max(1, _FINISHES * processors(logits.device) // num)))](
        *inputs, sums, bracket, total, counts, slots, listed, places, arrivals(logits.device), vocab,
        SLOTS=SLOTS, PACKED=_PACKED, num_warps=_FINISH_WARPS, **options,
    )  # fmt: skip
