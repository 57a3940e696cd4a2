"""A kernel that finds the argmax token of each row of logits. `sample_filtered.py` then replaces the tokens of rows with a
temperature.

grid: (rows, ceil(V / VOCAB_TILE)); a program finds the maximum of one tile of a row, and the last program of a row to finish
combines the tiles. The twin is torch's argmax. This kernel also writes the token to the batch row's state and never waits for the
device, whereas the first call of torch's argmax does, while torch loads its kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import arrivals, cdiv, pdl, power_of_two
from engine.plan import NO_TOKEN

VOCAB_TILE = 4096  # logits that one program reads


@triton.jit
def _argmax(
    logits_ptr, rows_ptr, latest_ptr, tokens_ptr, best_ptr, index_ptr, arrived_ptr, vocab,
    NO_TOKEN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, tile) finds the argmax of one tile of TILE logits. The last program of a row to finish combines the tiles.

    A row has TILES tiles. PADDED is TILES rounded up to a power of two. best_ptr and index_ptr are scratch [rows, TILES].
    """
    seq, tile = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    col = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(logits_ptr + seq.to(tl.int64) * vocab + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
    # NaN becomes +inf, since a maximum may skip NaN. A row whose largest logit is +inf then gets NO_TOKEN, as one with NaN must.
    logits = tl.where(logits != logits, float("inf"), logits)
    best = tl.max(logits, 0)
    # Of equal logits the first index wins, as in torch's argmax.
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
        largest = tl.max(bests, 0)
        token = tl.min(tl.where(inside & (bests == largest), indices, vocab), 0).to(tl.int64)
        failed = tl.abs(largest) == float("inf")
        tl.store(tokens_ptr + seq, tl.where(failed, NO_TOKEN, token))
        tl.store(latest_ptr + tl.load(rows_ptr + seq), tl.where(failed, 0, token))


def argmax_tokens(logits: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest logit in each row of logits [B, V], as [B] int64. Of equal logits the first counts.

    The kernel also writes row b's index to latest[rows[b]]; `latest` [R] is int64, `rows` [B] int32. A row whose logits hold NaN
    or +inf, or are all -inf, gets NO_TOKEN, and 0 in `latest`.
    """
    num, vocab = logits.shape
    tiles = cdiv(vocab, VOCAB_TILE)
    tokens = torch.empty(num, dtype=torch.int64, device=logits.device)
    best = torch.empty(num, tiles, dtype=torch.float32, device=logits.device)
    index = torch.empty(num, tiles, dtype=torch.int32, device=logits.device)
    _argmax[(num, tiles)](
        logits, rows, latest, tokens, best, index, arrivals(logits.device), vocab,
        NO_TOKEN=NO_TOKEN, TILE=VOCAB_TILE, TILES=tiles, PADDED=power_of_two(tiles), num_warps=4, **pdl(logits.device),
    )  # fmt: skip
    return tokens
