"""Samples tokens by temperature, top_k, top_p and min_p, without a sort. `sampling/choose.py` is the plain twin.

The tokens that pass all filters are taken in vocabulary order. The sampled token is the first whose running sum of weights
exceeds `uniform` times the total. Each filter is a threshold on the logit (`filter_search.py`). Two kernels, with several
programs a row:

`_survey`, grid (rows, programs a row), sums the weights of the row's tiles of TILE logits. If only min_p filters, the last
program of the row to finish samples: first a tile, then a token in that tile. Otherwise this program bounds the threshold by two
keys:

    top_k   the lower bound is the top_k-th largest of the maxima of groups of GROUP tokens: at least top_k tokens reach it
    top_p   each tile stores the weight of its tokens at or above each of MARKS marks; the threshold lies between two marks

`_finish`, with the same grid, lists the tokens at or above the lower bound, which are usually few. The last program of a row to
finish searches this list for the exact threshold, and samples from the list. If a tile has more such tokens than SLOTS, this
program searches the whole row instead, with the same result. For 64 rows of 151,936 logits, sampling takes 94 us with short
lists, and 197 to 283 us if whole rows are searched (docs/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.filter_search import key_of, min_p_floor, number_of, passing_weights, pick, search, threshold
from engine.kernels.hardware import processors
from engine.kernels.launch import arrivals, cdiv, pdl, power_of_two

# These sizes are all powers of two.
LOGITS_TILE = 4096  # logits that a program reads in one pass of its loop
GROUP = 128  # `_survey` stores the largest logit of each group of this many tokens
MARKS = 16  # number of marks between which top_p's threshold is found; the last mark is below all logits
SLOTS = 512  # tokens that `_finish` can list for one tile
_PACKED = 32  # slots of each tile that the last program of `_finish` packs into one list in a pass
_SURVEY_WARPS, _SURVEYS = 8, 2  # warps of a program of `_survey`, and programs for each multiprocessor
_FINISH_WARPS, _FINISHES = 16, 1


class SampleParams(NamedTuple):
    """The sampling parameters of every batch row, [R] float64 each. `sampling.choose.Choice` has the same fields."""

    temperature: torch.Tensor  # 0: the row keeps its argmax token
    top_k: torch.Tensor  # at least 1; the vocabulary's size means no limit
    top_p: torch.Tensor  # 0 to 1; 1 means no limit
    min_p: torch.Tensor  # 0 to 1; 0 means no limit


@triton.jit
def _is_last(arrived_ptr, programs):
    """Whether this program is the last of the row's `programs` to finish.

    The last program must read the results of the other programs past the L1 cache.
    """
    tl.debug_barrier()  # all threads must have written their results before the program counts as finished
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)  # the next launch needs the counter at 0
    return last


@triton.jit
def _between_marks(
    sums_ptr, above_ptr, marks_ptr, top_p, lowest, above_highest,
    TILES: tl.constexpr, PADDED: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Find the marks around top_p's threshold. Returns (low, high, total): the threshold's key is in [low, high).

    `low` and `high` are keys, and `total` is the weight of all tokens.
    """
    tiles, i = tl.arange(0, PADDED), tl.arange(0, MARKS)
    inside = tiles < TILES
    total = tl.sum(tl.load(sums_ptr + tiles, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    at_above = above_ptr + i[:, None] * TILES + tiles[None, :]
    above = tl.load(at_above, mask=inside[None, :], other=0.0, cache_modifier=".cg")
    above = tl.sum(above.to(tl.float64), 1)
    marks = tl.load(marks_ptr + i, cache_modifier=".cg")
    # The weights above a mark are float32 sums. If a mark is so close to the threshold that rounding matters, it is no bound.
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
    """Run the first of the two kernels that sample with a temperature.

    Program (row, part) sums the weights of every parts-th tile of the row's logits, in total and above some marks. The last
    program of a row to finish samples a token at once, or, if the row has top_k or top_p, stores a lower and an upper bound of
    the threshold for `_finish`. Rows with temperature 0 keep their argmax token. TILES is the number of tiles of a row, and
    PADDED is TILES rounded up to a power of two.
    """
    seq, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + seq)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    argmax = tl.load(tokens_ptr + seq)
    if (temperature == 0.0) | (argmax < 0):  # a negative token is NO_TOKEN, which is not replaced
        return
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    at = logits_ptr + seq.to(tl.int64) * vocab
    best = tl.load(at + argmax).to(tl.float32)
    lowest, highest = key_of(tl.full([], float("-inf"), tl.float32), BITS), key_of(best, BITS)
    # With top_p, min_p must not remove weights from the total yet, since top_p is a share of that total.
    floor = tl.where(top_p < 1.0, float("-inf"), min_p_floor(min_p))
    # Tokens that are `depth` below the best logit weigh so little that all together weigh no more than top_p may leave out.
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
        col += parts * TILE  # the next tile is loaded while the weights of the current one are summed
        following = tl.load(at + col, mask=col < vocab, other=float("-inf"))
        if top_k < vocab:
            maxima = tl.max(tl.reshape(x, [GROUPS, GROUP]), 1)
            tl.store(maxima_ptr + tile * GROUPS + tl.arange(0, GROUPS), maxima.to(maxima_ptr.dtype.element_ty))
        else:
            weights = passing_weights(x, best, temperature, float("-inf"), floor)
            tl.store(sums_ptr + tile, tl.sum(weights.to(tl.float64), 0))
            if top_p < 1.0:
                for i in tl.static_range(MARKS):
                    mark = lowest
                    if i < MARKS - 1:
                        mark = key_of(best - depth * ((i + 1) / (MARKS - 1)), BITS)
                    above = tl.sum(tl.where(x >= number_of(mark, BITS), weights, 0.0), 0)
                    tl.store(above_ptr + i * TILES + tile, above)
                    tl.store(marks_ptr + i, mark, mask=tile == 0)

    if _is_last(arrived_ptr + seq, parts):
        if (top_k >= vocab) & (top_p >= 1.0):
            uniform = tl.load(uniform_ptr + seq)
            token = pick(sums_ptr, at, vocab, best, temperature, float("-inf"), floor, uniform, TILE, PADDED).to(tl.int64)
            tl.store(tokens_ptr + seq, token)
            tl.store(latest_ptr + row, token)
        else:
            low, high = lowest, highest + 1
            if top_k < vocab:
                low = threshold(maxima_ptr, TILES * GROUPS, best, temperature, top_k, low, high, TILE // 2, BITS, True)
            else:
                low, high, total = _between_marks(sums_ptr, above_ptr, marks_ptr, top_p, low, high, TILES, PADDED, MARKS)
                tl.store(total_ptr + seq, total)
            tl.store(bracket_ptr + seq * 2, low)
            tl.store(bracket_ptr + seq * 2 + 1, high)


@triton.jit
def _finish(
    logits_ptr, rows_ptr, latest_ptr, tokens_ptr, uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    sums_ptr, bracket_ptr, total_ptr, counts_ptr, slots_ptr, listed_ptr, places_ptr, arrived_ptr, vocab,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr,
    BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Run the second of the two kernels that sample by top_k and top_p. `_survey`, the first, has bounded each row's threshold.

    Program (row, part) lists the row's tokens at or above the lower bound, from every parts-th tile of its logits. The last
    program of a row to finish finds the exact threshold among the listed tokens and samples from those above it. Rows that
    `_survey` could sample at once, and rows with temperature 0, keep their tokens.
    """
    seq, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + seq)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    argmax = tl.load(tokens_ptr + seq)
    if (temperature == 0.0) | (argmax < 0):  # a negative token is NO_TOKEN, which is not replaced
        return
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if (top_k >= vocab) & (top_p >= 1.0):
        return
    at = logits_ptr + seq.to(tl.int64) * vocab
    best = tl.load(at + argmax).to(tl.float32)
    low, high = tl.load(bracket_ptr + seq * 2), tl.load(bracket_ptr + seq * 2 + 1)
    col = part * TILE + tl.arange(0, TILE)
    following = tl.load(at + col, mask=col < vocab, other=float("nan"))  # NaN compares false, so padding is never listed
    for tile in range(part, TILES, parts):
        listed = following.to(tl.float32) >= number_of(low, BITS)
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
            found = search(listed_ptr, tl.sum(counts, 0), best, temperature, top_k, top_p, min_p, total, low, high, uniform,
                            sums_ptr + seq * TILES, vocab, TILE, PADDED, BITS)  # fmt: skip
            token = tl.load(places_ptr + found, cache_modifier=".cg").to(tl.int64)
        else:
            token = search(at, vocab, best, temperature, top_k, top_p, min_p, total, low, high, uniform,
                            sums_ptr + seq * TILES, vocab, TILE, PADDED, BITS).to(tl.int64)  # fmt: skip
        tl.store(tokens_ptr + seq, token)
        tl.store(latest_ptr + row, token)


def sample_filtered(
    logits: torch.Tensor,
    rows: torch.Tensor,
    latest: torch.Tensor,
    tokens: torch.Tensor,
    uniform: torch.Tensor,
    params: SampleParams,
) -> None:
    """Replace the argmax tokens of rows with a temperature by sampled ones, in `tokens` [B] and in `latest` [R], int64.

    NO_TOKEN is not replaced.

    logits [B, V] are bfloat16 or float32. `tokens` holds the argmax of each row, which `argmax_tokens` computes. rows [B] int32
    are the indices into `latest` and `params`; uniform [B] is float64 in [0, 1).
    """
    num, vocab = logits.shape
    tiles, groups = cdiv(vocab, LOGITS_TILE), LOGITS_TILE // GROUP

    def scratch(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num, *shape, dtype=dtype, device=logits.device)

    sums, total = scratch(torch.float64, tiles), scratch(torch.float64)
    bracket = scratch(torch.int64, 2)  # bounds (low, high) of the threshold's key: low <= key < high
    inputs = (logits, rows, latest, tokens, uniform, *params)
    bits = 16 if logits.dtype == torch.bfloat16 else 32
    options = {"TILE": LOGITS_TILE, "TILES": tiles, "PADDED": power_of_two(tiles), "BITS": bits, **pdl(logits.device)}
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
