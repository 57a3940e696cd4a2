"""Cuts the queries of a step into tiles. A tile is the tokens from which one program of a prefill kernel attends.

A tile is written as a query (its index in the batch) and a first token, counted within the query. A tile has `tile_tokens`
tokens, but the last tile of a query may have fewer. Query -1 marks a tile without work: its program returns at once. Tiles with
most work come first, since programs start in the order of their tiles, and a long one that starts last would run alone.

The host cuts the tiles if it knows the lengths (`cut_tiles`). In a CUDA graph lengths change from replay to replay, so a kernel
cuts them (`map_tiles`). The number of tiles is a multiple of 4 in both cases: int32 arrays of tiles then begin on 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl, power_of_two

NO_QUERY = -1  # the query of a tile without work
_MULTIPLE = 4  # the number of tiles is padded to a multiple of this


class Tiles(NamedTuple):
    """The tiles of a step on the device, int32. Those with work come first."""

    query: torch.Tensor  # [N]: index of the query, or NO_QUERY
    first: torch.Tensor  # [N]: the tile's first token within the query
    number: torch.Tensor  # [1]: number of tiles with work


def cut_tiles(
    queries: Iterable[int], query_lens: Sequence[int], kv_lens: Sequence[int], tile_tokens: int
) -> list[tuple[int, int]]:
    """Cut `queries` into tiles on the host. Returns (query, first token) of each tile, padded with (NO_QUERY, 0).

    query_lens has each query's number of tokens in this step, and kv_lens its number of tokens in the KV cache after the step.
    The list is empty if `queries` is. The work of a tile grows with the position of its first token, which is kv_len - query_len
    + first.
    """
    tiles = [(query, first) for query in queries for first in range(0, query_lens[query], tile_tokens)]
    tiles.sort(key=lambda tile: query_lens[tile[0]] - kv_lens[tile[0]] - tile[1])
    return tiles + [(NO_QUERY, 0)] * (-len(tiles) % _MULTIPLE)


def columns(tiles: list[tuple[int, int]]) -> torch.Tensor:
    """Return the result of `cut_tiles` as rows [3, N] int32 of one tensor on the host. `Tiles(*rows)` of its copy on the device
    are the tiles; the third row is their number with work, N times."""
    count = sum(query != NO_QUERY for query, _ in tiles)
    return torch.tensor([(*tile, count) for tile in tiles], dtype=torch.int32).T.contiguous()


@triton.jit(do_not_specialize=["num_queries", "num_tiles"])
def _map_tiles(
    starts_ptr, tile_query_ptr, tile_start_ptr, count_ptr, num_queries, num_tiles,
    LEAST: tl.constexpr, TILE_Q: tl.constexpr, QUERIES: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query,) writes the tiles of one query, behind the tiles of the queries before it. Program 0 also marks surplus
    tiles, and counts the others.
    """
    mine = tl.program_id(0)
    query = tl.arange(0, QUERIES)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inside = query < num_queries
    tokens = tl.load(starts_ptr + query + 1, mask=inside, other=0) - tl.load(starts_ptr + query, mask=inside, other=0)
    tiles = tl.where(tokens >= LEAST, tl.cdiv(tokens, TILE_Q), 0)
    before = tl.sum(tl.where(query < mine, tiles, 0), 0)
    own = tl.sum(tl.where(query == mine, tiles, 0), 0)
    i = tl.arange(0, TILES)
    tl.store(tile_query_ptr + before + i, mine, mask=i < own)
    # The query's last tile, which has most work, comes first.
    tl.store(tile_start_ptr + before + i, (own - 1 - i) * TILE_Q, mask=i < own)
    if mine == 0:
        count = tl.sum(tiles, 0)
        tl.store(tile_query_ptr + i, -1, mask=(i >= count) & (i < num_tiles))
        tl.store(count_ptr, count)


def map_tiles(query_starts: torch.Tensor, num_tokens: int, tile_q: int, *, least: int) -> Tiles:
    """Cut all queries with at least `least` tokens into tiles on the device.

    query_starts [B + 1] int32 are the queries' first tokens, and a tile has `tile_q` tokens. The tensors hold as many tiles as
    `num_tokens` tokens of B queries can need, and surplus tiles have query -1. Within a query the last tile, which has most work,
    comes first; queries keep their order.
    grid: (B,); a program writes one query's tiles.
    """
    num_queries = query_starts.shape[0] - 1
    num_tiles = cdiv(num_tokens // tile_q + min(num_queries, num_tokens // least), _MULTIPLE) * _MULTIPLE
    numbers = torch.empty(2 * num_tiles + 1, dtype=torch.int32, device=query_starts.device)
    tiles = Tiles(*numbers.split([num_tiles, num_tiles, 1]))
    _map_tiles[(num_queries,)](
        query_starts, *tiles, num_queries, num_tiles,
        LEAST=least, TILE_Q=tile_q, QUERIES=power_of_two(num_queries), TILES=power_of_two(num_tiles),
        num_warps=4,
        **pdl(query_starts.device),
    )  # fmt: skip
    return tiles
