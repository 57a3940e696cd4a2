"""A backend owns a whole forward: torch here; another library's runtime would stand beside it."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import ForwardBatch, PoolSpec


class Backend(Protocol):
    @property
    def graphable(self) -> bool:
        """Whether `forward` of a batch of decodes never waits for the device, so that a CUDA graph can hold it."""
        ...

    @property
    def graph_tokens(self) -> int:
        """Tokens of the largest batch `by_length`, of decodes and chunks, of which that holds too; 0: of none."""
        ...

    def prompt_lengths(self, most: int) -> list[int]:
        """Whole prompts of up to `most` tokens whose kind takes longer the first time it comes: one length of each kind."""
        ...

    def kv_pools(self) -> list[list[PoolSpec]]:
        """The pools that each layer keeps."""
        ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """-> hidden, one row a token, [T, H], or [S, H] of those that `batch` says are read; ready for `logits`. Writes the
        step's KV into the pools of `batch`."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [N, H] -> [N, V] in the model's own type, in `out` where given; the caller may overwrite it."""
        ...

    def close(self) -> None: ...
