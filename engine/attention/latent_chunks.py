"""Chunks of latent attention for the CUDA backend: which latents are expanded together, and which tiles attend to them.

Those of fresh prompts are the step's own and lie side by side: one product expands them all. Behind a prefix, the latents of
prefix and chunk are gathered from the pool, for as many chunks together as EXPANDED_NUMBERS allow.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from engine.batch import ForwardBatch

EXPANDED_NUMBERS = 1 << 27  # keys and values of gathered latents that are in memory at a time, unless one chunk has more


@dataclass(frozen=True, slots=True)
class LatentGroup:
    """Latents to expand together: `slots` of the pool, or where that is None `rows` of the step's own."""

    rows: range
    slots: torch.Tensor | None  # [L] int64
    tiles: torch.Tensor | None  # [3, N] int32, see `mla_prefill`; None where all chunks are attended to elsewhere


def plan_groups(batch: ForwardBatch, elsewhere: list[range], *, tile_q: int, token_numbers: int) -> list[LatentGroup]:
    """`elsewhere`: tokens of fresh prompts that get no tiles; `token_numbers`: keys and values that a latent expands to."""
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
    """Cut `queries` where more than `most` tokens would come together."""
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
    """Where the tokens of these sequences are, one sequence after the other: [L] int64."""
    block_size = next(iter(batch.kv[0].values())).shape[1]
    lens = [batch.kv_lens_host[q] for q in queries]
    owners = torch.repeat_interleave(torch.tensor(queries), torch.tensor(lens))
    both = _to_device(torch.stack((owners, torch.cat([torch.arange(n) for n in lens]))), batch)
    owner, position = both[0], both[1]
    slots: torch.Tensor = batch.block_tables[owner, position // block_size].long() * block_size + position % block_size
    return slots


def _tiles(batch: ForwardBatch, key_starts: dict[int, int], tile_q: int) -> torch.Tensor | None:
    """Of the chunks of these queries, those with most work first."""
    lens, kv_lens = batch.query_lens_host, batch.kv_lens_host
    tiles = [(query, first, key) for query, key in key_starts.items() for first in range(0, lens[query], tile_q)]
    if not tiles:
        return None
    tiles.sort(key=lambda t: lens[t[0]] - kv_lens[t[0]] - t[1])
    tiles += [(-1, 0, 0)] * (-len(tiles) % 4)  # so that each row begins on 16 bytes
    return _to_device(torch.tensor(tiles, dtype=torch.int32).T.contiguous(), batch)


def _to_device(host: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    return host.pin_memory().to(batch.slots.device, non_blocking=True) if batch.slots.is_cuda else host
