"""Tests that queries are cut into the same tiles on the host and on the device, and that tiles with most work come first."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.kernels.query_tiles import NO_QUERY, cut_tiles, map_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A step is a list of queries, and a query is (tokens of this step, tokens in the KV cache after the step).
STEPS = [
    [(1, 9), (1, 1), (7, 7)],
    [(8, 8), (8, 30), (3, 100), (16, 16)],
    [(5, 5)],
    [(1, 4)] * 6,
    [(33, 33), (33, 33), (4, 50), (1, 2)],
]


def covered(tiles, query_lens, tile_tokens):
    """List every token that the tiles cover, as (query, token)."""
    return [(query, token) for query, first in tiles for token in range(first, min(first + tile_tokens, query_lens[query]))]


@pytest.mark.parametrize("tile_tokens", [1, 4, 8])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_tiles_cut_on_the_host_cover_every_token_once_and_longest_work_first(step, tile_tokens):
    query_lens, kv_lens = zip(*step, strict=True)
    tiles = cut_tiles(range(len(step)), query_lens, kv_lens, tile_tokens)
    assert len(tiles) % 4 == 0
    used = [tile for tile in tiles if tile[0] != NO_QUERY]
    assert tiles[len(used) :] == [(NO_QUERY, 0)] * (len(tiles) - len(used))  # padding comes only at the end
    expected = [(query, token) for query, num in enumerate(query_lens) for token in range(num)]
    assert sorted(covered(used, query_lens, tile_tokens)) == expected
    assert all(first % tile_tokens == 0 for _, first in used)
    work = [kv_lens[query] - query_lens[query] + first for query, first in used]
    assert work == sorted(work, reverse=True)


def test_only_the_given_queries_get_tiles():
    assert {query for query, _ in cut_tiles([2, 0], (5, 6, 7), (5, 6, 7), 4)} == {0, 2}
    assert cut_tiles([], (5, 6, 7), (5, 6, 7), 4) == []


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("tile_tokens", [4, 8])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_tiles_cut_on_the_device_are_those_of_the_host(step, tile_tokens, least):
    """The device keeps the order of the queries, unlike the host. Within a query both put the last tile first."""
    query_lens, kv_lens = zip(*step, strict=True)
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=DEVICE)
    query, first, count = (x.tolist() for x in map_tiles(starts, sum(query_lens), tile_tokens, least=least))
    found = list(zip(query, first, strict=True))
    queries = [query for query, num in enumerate(query_lens) if num >= least]
    expected = [tile for query in queries for tile in cut_tiles([query], query_lens, kv_lens, tile_tokens) if tile[0] >= 0]
    assert len(found) % 4 == 0
    assert found[: len(expected)] == expected
    assert all(query == NO_QUERY for query, _ in found[len(expected) :])
    assert count == [len(expected)]
