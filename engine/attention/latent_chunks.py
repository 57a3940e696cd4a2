"""Plans latent attention of a step's chunks on CUDA: which latents are expanded together, and the tiles that attend to them.

The latents of fresh prompts are the step's own and adjacent: one product expands them all. For chunks behind a cached prefix, the
latents of prefix and chunk are gathered from the pool, for as many chunks together as EXPANDED_NUMBERS allows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from engine.attention.upload import upload
from engine.batch import ForwardBatch
from engine.kernels.query_tiles import cut_tiles

EXPANDED_NUMBERS = 1 << 27  # most numbers of expanded keys and values in memory at a time, unless one chunk needs more


@dataclass(frozen=True, slots=True)
class LatentGroup:
    """Latents that one product expands, and the tiles that attend to them."""

    rows: range  # without `slots`: the tokens of the step whose latents are expanded; with `slots`: range(L)
    slots: torch.Tensor | None  # [L] int64: the pool slots to gather; None for the step's own latents
    tiles: torch.Tensor | None  # [3, N] int32, as `mla_prefill` takes them; None if cuDNN attends to all of the group's chunks


def plan_groups(batch: ForwardBatch, elsewhere: list[range], *, tile_q: int, token_numbers: int) -> list[LatentGroup]:
    """The groups of a step's chunks.

    `elsewhere` are the tokens of fresh prompts that cuDNN attends to: their latents are expanded, but they get no tiles.
    `tile_q` is the number of tokens of a tile, `token_numbers` that of the numbers (keys and values) that one latent expands
    to.
    """
    starts = list(itertools.accumulate(batch.query_lens_host, initial=0))
    chunks = range(batch.num_decodes, batch.num_queries)
    fresh = [q for q in chunks if batch.query_lens_host[q] == batch.kv_lens_host[q]]
    groups = []
    if fresh:
        rows = range(starts[fresh[0]], starts[fresh[-1] + 1])
        others = {span.start for span in elsewhere}
        key_starts = {q: starts[q] - rows.start for q in fresh if starts[q] not in others}
        groups.append(LatentGroup(rows, None, _tiles(batch, key_starts, tile_q)))
    behind = [q for q in chunks if batch.query_lens_host[q] != batch.kv_lens_host[q]]
    for queries in _parts(behind, batch.kv_lens_host, EXPANDED_NUMBERS // token_numbers):
        ends = list(itertools.accumulate((batch.kv_lens_host[q] for q in queries), initial=0))
        tiles = _tiles(batch, dict(zip(queries, ends, strict=False)), tile_q)
        groups.append(LatentGroup(range(ends[-1]), _slots(batch, queries), tiles))
    return groups


def _parts(queries: list[int], lens: list[int], most: int) -> list[list[int]]:
    """Cut `queries` into runs of at most `most` tokens by `lens`; a query with more tokens is a run of its own."""
    parts: list[list[int]] = []
    total = 0
    for query in queries:
        if not parts or total + lens[query] > most:
            parts.append([])
            total = 0
        parts[-1].append(query)
        total += lens[query]
    return parts


def _slots(batch: ForwardBatch, queries: list[int]) -> torch.Tensor:
    """The pool slots of all tokens of these sequences, one sequence after another: [L] int64."""
    block_size = next(iter(batch.kv[0].values())).shape[1]
    lens = [batch.kv_lens_host[q] for q in queries]
    owners = torch.repeat_interleave(torch.tensor(queries), torch.tensor(lens))
    both = upload(torch.stack((owners, torch.cat([torch.arange(n) for n in lens]))), batch.slots.device)
    owner, position = both[0], both[1]
    slots: torch.Tensor = batch.block_tables[owner, position // block_size].long() * block_size + position % block_size
    return slots


def _tiles(batch: ForwardBatch, key_starts: dict[int, int], tile_q: int) -> torch.Tensor | None:
    """The tiles of `mla_prefill` for the queries in `key_starts`, which has the row of each query's first expanded latent."""
    tiles = cut_tiles(key_starts, batch.query_lens_host, batch.kv_lens_host, tile_q)
    if not tiles:
        return None
    rows = [(query, first, key_starts.get(query, 0)) for query, first in tiles]  # 0 for tiles that only pad
    return upload(torch.tensor(rows, dtype=torch.int32).T.contiguous(), batch.slots.device)
