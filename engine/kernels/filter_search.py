"""Device functions of the sampling kernels. Within one program they find a filter's threshold and pick a token.

A filter (top_k, top_p, min_p) is a threshold on the logit: tokens with a logit at or above the threshold pass.

Thresholds are found by narrowing a range of keys. A key is an integer that orders the logits: from one representable number of
the logits' type to the next it grows by 1. The key of a number is its bits, with the magnitude bits inverted if the number is
negative. Tokens themselves are compared as numbers, so that -0 equals 0.

`best` is the row's largest logit. The weight of a token is exp((logit - best) / temperature), so the largest weight is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x, BITS: tl.constexpr):
    """Return the int64 key of float32 x. x is first cut to the logits' BITS (16 for bfloat16, 32 for float32)."""
    code = x.to(tl.int32, bitcast=True) >> (32 - BITS)
    return (code ^ ((code >> 31) & ((1 << (BITS - 1)) - 1))).to(tl.int64)


@triton.jit
def number_of(key, BITS: tl.constexpr):
    """Return the float32 number whose key is `key`. This is the inverse of `key_of`."""
    code = key.to(tl.int32)
    return ((code ^ ((code >> 31) & ((1 << (BITS - 1)) - 1))) << (32 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def at_or_above(at, num, best, temperature, x1, x2, x3, TILE: tl.constexpr, COUNT: tl.constexpr):
    """Sum over the `num` logits at `at` that are at least x1, then x2, then x3. Returns three float64 sums.

    With COUNT each sum is the number of such tokens; otherwise it is their total weight.
    """
    col = tl.arange(0, TILE)
    zero = tl.zeros([TILE], tl.float32)
    a, b, c = zero, zero, zero
    # The loads bypass the L1 cache: other programs wrote these numbers, and the L1 may hold those of an older launch.
    following = tl.load(at + col, mask=col < num, other=float("-inf"), cache_modifier=".cg")
    for start in range(0, num, TILE):
        x = following.to(tl.float32)
        after = start + TILE + col  # the next tile is loaded while the current one is summed
        following = tl.load(at + after, mask=after < num, other=float("-inf"), cache_modifier=".cg")
        weight = tl.where(start + col < num, 1.0, 0.0) if COUNT else tl.exp((x - best) / temperature)
        a += tl.where(x >= x1, weight, 0.0)
        b += tl.where(x >= x2, weight, 0.0)
        c += tl.where(x >= x3, weight, 0.0)
    return tl.sum(a.to(tl.float64), 0), tl.sum(b.to(tl.float64), 0), tl.sum(c.to(tl.float64), 0)


@triton.jit
def threshold(
    at, num, best, temperature, wanted, low, high, TILE: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Find the largest key in [low, high) such that the tokens at or above it number (COUNT) or weigh at least `wanted`.

    The result is `low` if there is no such key. Each pass reads the logits once and quarters the range.
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        t1, t2, t3 = low + step, low + 2 * step, low + 3 * step
        x1, x2, x3 = number_of(t1, BITS), number_of(t2, BITS), number_of(t3, BITS)
        a, b, c = at_or_above(at, num, best, temperature, x1, x2, x3, TILE, COUNT)
        low = tl.where((a >= wanted) & (t1 < high), t1, low)
        low = tl.where((b >= wanted) & (t2 < high), t2, low)
        low = tl.where((c >= wanted) & (t3 < high), t3, low)
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def passing_weights(x, best, temperature, least, floor):
    """Return the weights of tokens with logits x. A weight is 0 unless x >= least and (x - best) / temperature >= floor."""
    scaled = (x - best) / temperature
    return tl.where((x >= least) & (scaled >= floor), tl.exp(scaled), 0.0)


@triton.jit
def min_p_floor(min_p):
    """Return the least (logit - best) / temperature that passes min_p: log(min_p), or minus infinity if min_p is 0."""
    return tl.where(min_p > 0.0, tl.log(tl.maximum(min_p.to(tl.float32), 1e-38)), float("-inf"))


@triton.jit
def pick(sums_ptr, at, num, best, temperature, least, floor, uniform, TILE: tl.constexpr, PADDED: tl.constexpr):
    """Sample one of `num` tokens: the first at which the running sum of weights exceeds uniform * total weight.

    Returns the index of the sampled token. The tokens' logits are at `at`. `sums_ptr` holds each tile's total passing weight.
    """
    tiles = tl.arange(0, PADDED)
    sums = tl.load(sums_ptr + tiles, mask=tiles * TILE < num, other=0.0, cache_modifier=".cg")
    ends = tl.cumsum(sums, 0)
    target = uniform * tl.sum(sums, 0)
    # Rounding may make the target equal to the total. Then the last token with a weight above 0 is sampled.
    last = tl.max(tl.where(sums > 0.0, tiles, 0), 0)
    tile = tl.minimum(tl.sum(tl.where(ends <= target, 1, 0), 0), last)
    rest = target - tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
    col = tl.arange(0, TILE)
    x = tl.load(at + tile * TILE + col, mask=tile * TILE + col < num, other=float("-inf")).to(tl.float32)
    weights = passing_weights(x, best, temperature, least, floor)
    running = tl.cumsum(weights.to(tl.float64), 0)
    last_col = tl.max(tl.where(weights > 0.0, col, 0), 0)
    first = tl.min(tl.where((running > rest) & (weights > 0.0), col, last_col), 0)
    return tile * TILE + first


@triton.jit
def search(
    at, num, best, temperature, top_k, top_p, min_p, total, low, high, uniform, sums_ptr, vocab,
    TILE: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Find the exact thresholds of top_k, top_p and min_p, and sample a token. Returns the token's index among the `num` logits.

    The `num` logits at `at` include every token that passes. The threshold's key is in [low, high). `total` is the weight of
    the whole row, used for top_p if top_k does not filter. `sums_ptr` is scratch memory: one float64 a tile.
    """
    if top_k < vocab:
        low = threshold(at, num, best, temperature, top_k, low, high, TILE, BITS, True)
        if top_p < 1.0:
            # top_p is a share of the top_k tokens' weight. Of tokens tied at place top_k, count only those that fill the k
            # places.
            least, next_one = number_of(low, BITS), number_of(low + 1, BITS)
            above, number, _ = at_or_above(at, num, best, temperature, next_one, least, least, TILE, True)
            weight_above, weight, _ = at_or_above(at, num, best, temperature, next_one, least, least, TILE, False)
            tied = (weight - weight_above) / tl.maximum(number - above, 1.0)
            total = weight_above + (tl.minimum(top_k, number) - above) * tied
    if top_p < 1.0:
        low = threshold(at, num, best, temperature, top_p * total, low, high, TILE, BITS, False)
    least, floor = number_of(low, BITS), min_p_floor(min_p)
    col = tl.arange(0, TILE)
    for start in range(0, num, TILE):
        x = tl.load(at + start + col, mask=start + col < num, other=float("-inf")).to(tl.float32)
        weights = passing_weights(x, best, temperature, least, floor)
        tl.store(sums_ptr + start // TILE, tl.sum(weights.to(tl.float64), 0))
    tl.debug_barrier()
    return pick(sums_ptr, at, num, best, temperature, least, floor, uniform, TILE, PADDED)
