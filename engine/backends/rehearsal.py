"""Rehearsal: a backend that runs one layer of each kind, for steps whose results nobody reads.

Such a step launches the same kernels as a whole step, and needs as much memory, since a layer frees its memory at its end. It
takes a fraction of the time.
"""

from __future__ import annotations

import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, PoolSpec, WarmupChunk


class Rehearsal:
    """A backend whose forward is a rehearsal. Implements Backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.graphable = backend.graphable
        self.graph_tokens = backend.graph_tokens

    def warmup_chunks(self, max_tokens: int, max_len: int) -> list[WarmupChunk]:
        return self._backend.warmup_chunks(max_tokens, max_len)

    def kv_pools(self) -> list[list[PoolSpec]]:
        return self._backend.kv_pools()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self._backend.rehearse(batch)

    def rehearse(self, batch: ForwardBatch) -> torch.Tensor:
        return self._backend.rehearse(batch)

    def allow_plans(self, allowed: bool) -> None:
        self._backend.allow_plans(allowed)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._backend.logits(hidden, out)

    def close(self) -> None:
        self._backend.close()
