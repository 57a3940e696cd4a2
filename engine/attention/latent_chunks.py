"""Plans latent attention of a step's chunks on CUDA: the groups of latents that are expanded together, and their query tiles.

The latents of prompts without a cached prefix are the step's own and adjacent, so one product expands all of these. For chunks
behind a cached prefix, the latents of prefix and chunk are gathered from the KV pool, for as many chunks together as
EXPANDED_NUMBERS allows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from engine.attention.upload import upload
from engine.batch import ForwardBatch
from engine.kernels.query_tiles import cut_tiles

EXPANDED_NUMBERS = 1 << 27  # most numbers of expanded keys and values at a time, unless a single chunk needs more


@dataclass(frozen=True, slots=True)
class LatentGroup:
    """A group of latents that one product expands, and the query tiles that attend to these latents."""

    rows: range  # without `slots`: the tokens of the step whose latents are expanded; with `slots`: range(L)
    slots: torch.Tensor | None  # [L] int64: the KV pool's slots to gather; None for the step's own latents
    tiles: torch.Tensor | None  # [3, N] int32, for `mla_prefill`; None if cuDNN attends from all chunks of the group


def plan_groups(batch: ForwardBatch, elsewhere: list[range], *, tile_q: int, token_numbers: int) -> list[LatentGroup]:
    """Plan the groups of a step's chunks.

    `elsewhere` lists the tokens of each chunk from which cuDNN attends. These chunks get no tiles, but if they have no cached
    prefix, their latents are expanded with the others. A tile has `tile_q` tokens. One latent expands to `token_numbers` numbers
    of keys and values.
    """
    starts = list(itertools.accumulate(batch.query_lens_host, initial=0))
    chunks = range(batch.num_decodes, batch.num_queries)
    fresh = [q for q in chunks if batch.query_lens_host[q] == batch.kv_lens_host[q]]
    others = {span.start for span in elsewhere}
    groups = []
    if fresh:
        rows = range(starts[fresh[0]], starts[fresh[-1] + 1])
        key_starts = {q: starts[q] - rows.start for q in fresh if starts[q] not in others}
        groups.append(LatentGroup(rows, None, _tiles(batch, key_starts, tile_q)))
    behind = [q for q in chunks if batch.query_lens_host[q] != batch.kv_lens_host[q] and starts[q] not in others]
    for queries in _parts(behind, batch.kv_lens_host, EXPANDED_NUMBERS // token_numbers):
        ends = list(itertools.accumulate((batch.kv_lens_host[q] for q in queries), initial=0))
        tiles = _tiles(batch, dict(zip(queries, ends, strict=False)), tile_q)
        groups.append(LatentGroup(range(ends[-1]), _slots(batch, queries), tiles))
    return groups


def _parts(queries: list[int], lens: list[int], most: int) -> list[list[int]]:
    """Cut `queries` into runs of at most `most` tokens together. `lens` has the tokens of each query of the batch.

    A query with more tokens than `most` is a run of its own.
    """
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
    """List the KV pool's slots of all tokens of the sequences `queries`, one sequence after another -> [L] int64."""
    block_size = next(iter(batch.kv[0].values())).shape[1]
    lens = [batch.kv_lens_host[q] for q in queries]
    owners = torch.repeat_interleave(torch.tensor(queries), torch.tensor(lens))
    both = upload(torch.stack((owners, torch.cat([torch.arange(n) for n in lens]))), batch.slots.device)
    owner, position = both[0], both[1]
    slots: torch.Tensor = batch.block_tables[owner, position // block_size].long() * block_size + position % block_size
    return slots


def _tiles(batch: ForwardBatch, key_starts: dict[int, int], tile_q: int) -> torch.Tensor | None:
    """Cut tiles for `mla_prefill`. `key_starts` maps each query to the row of its first expanded latent."""
    tiles = cut_tiles(key_starts, batch.query_lens_host, batch.kv_lens_host, tile_q)
    if not tiles:
        return None
    rows = [(query, first, key_starts.get(query, 0)) for query, first in tiles]  # padding tiles get 0
    return upload(torch.tensor(rows, dtype=torch.int32).T.contiguous(), batch.slots.device)
