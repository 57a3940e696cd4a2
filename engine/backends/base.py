"""The interface of a backend, which runs a model's whole forward pass with one library. The one backend uses torch."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import ForwardBatch, PoolSpec, WarmupChunk


class Backend(Protocol):
    @property
    def graphable(self) -> bool:
        """Whether a CUDA graph can hold `forward` of a batch of decodes, because it never waits for the device."""
        ...

    @property
    def graph_tokens(self) -> int:
        """Largest mixed step (decodes and prefill chunks), in tokens, that a CUDA graph may hold; 0 if mixed steps cannot be
        captured. Such a step is a batch `by_length`."""
        ...

    def warmup_chunks(self, max_tokens: int, max_len: int) -> list[WarmupChunk]:
        """Prefill chunks to run as a warm-up: one of each kind whose first chunk takes longer than later ones.

        `max_tokens` is the longest chunk of a step, and `max_len` the longest context. Empty if there is no such kind.
        """
        ...

    def kv_pools(self) -> list[list[PoolSpec]]:
        """The pools of the KV cache, a list for each layer."""
        ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run all layers and write the step's KV into the pools of `batch`. Returns the hidden states for `logits`: [T, H] of all
        tokens, or [S, H] of the tokens of `batch.read` if it is set."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [N, H] -> logits [N, V] in the model's own dtype, which the caller may overwrite; in `out` if it is given."""
        ...

    def close(self) -> None: ...
