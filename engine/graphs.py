"""CUDA graphs of decode steps: one launch in place of a few hundred. The backend's own forward is the plain twin.

    batch of 13 decodes --> static inputs of 16 rows --> replay --> static hidden [16, H] --> first 13

A graph is captured when a step first wants its size, so none delays start-up. Rows that only pad write to a scratch block
that no request owns. All graphs share one memory pool: they run one after the other, and what one returns is used up, in
the same stream, before the next begins.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, LayerPools

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LARGER = 64  # past the last of SIZES, rows between graphs


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor  # [size, H]


def graph_sizes(max_rows: int) -> list[int]:
    """Sizes to capture, ascending; the last holds `max_rows`."""
    larger = range(SIZES[-1] + LARGER, max_rows + LARGER, LARGER)
    sizes = [size for size in (*SIZES, *larger) if size < max_rows]
    return [*sizes, max_rows]


class DecodeGraphs:
    """`scratch_block` is one that no request owns; `width` the most blocks a request may have."""

    def __init__(
        self,
        backend: Backend,
        kv: list[LayerPools],
        *,
        max_rows: int,
        width: int,
        block_size: int,
        scratch_block: int,
        device: torch.device,
    ) -> None:
        self._backend = backend
        self._kv = kv
        self._sizes = graph_sizes(max_rows)
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._scratch_slot = scratch_block * block_size
        self._token_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots = torch.full((max_rows,), self._scratch_slot, dtype=torch.int64, device=device)
        self._kv_lens = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._tables = torch.full((max_rows, width), scratch_block, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """-> hidden [T, H], as the backend's forward gives it, from a graph where the batch has decodes alone."""
        if batch.num_decodes != batch.num_queries:
            return self._backend.forward(batch)
        num = batch.num_decodes
        size = self._sizes[bisect_left(self._sizes, num)]
        self._fill(batch, num, size)
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.hidden[:num]

    def _fill(self, batch: ForwardBatch, num: int, size: int) -> None:
        self._token_ids[:num].copy_(batch.token_ids)
        self._positions[:num].copy_(batch.positions)
        self._slots[:num].copy_(batch.slots)
        self._kv_lens[:num].copy_(batch.kv_lens)
        self._tables[:num, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        if num < size:
            self._slots[num:size].fill_(self._scratch_slot)
            self._kv_lens[num:size].fill_(1)  # of whatever block: nobody reads what they give

    def _capture(self, size: int) -> _Captured:
        batch = ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            query_starts=self._starts[: size + 1],
            kv_lens=self._kv_lens[:size],
            block_tables=self._tables[:size],
            num_decodes=size,
            query_lens_host=[1] * size,
            kv_lens_host=[1] * size,
            kv=self._kv,
        )
        self._backend.forward(batch)  # compiles kernels and fills the libraries' caches; writes what the replay writes again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._backend.forward(batch)
        return _Captured(graph, hidden)
