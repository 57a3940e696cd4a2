"""The interface of a backend, which runs a model's whole forward pass with one library. The one backend uses torch."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import ForwardBatch, PoolSpec, WarmupChunk


class Backend(Protocol):
    @property
    def graphable(self) -> bool:
        """Whether `forward` of a batch of decodes never waits for the device, so that a CUDA graph can hold it."""
        ...

    @property
    def graph_tokens(self) -> int:
        """Largest mixed step (decodes and prefill chunks), in tokens, that a CUDA graph may hold; 0 if none can be captured.

        The batch of such a step has `by_length` set.
        """
        ...

    def warmup_chunks(self, max_tokens: int, max_len: int) -> list[WarmupChunk]:
        """List the prefill chunks to run as a warm-up: one of each kind whose first chunk takes longer than later chunks.

        `max_tokens` is the longest chunk of a step, and `max_len` the longest context, both in tokens. The list may be empty.
        """
        ...

    def kv_pools(self) -> list[list[PoolSpec]]:
        """Describe the pools of the KV cache: a list for each layer."""
        ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run all layers and write the step's KV into the KV pools of `batch`. Returns hidden states, the input of `logits`.

        They are [T, H] of all tokens, or [S, H] of the tokens of `batch.read` if that is set.
        """
        ...

    def rehearse(self, batch: ForwardBatch) -> torch.Tensor:
        """Run one layer of each kind, as `forward` runs all. It loads and plans what `forward` needs, in much less time."""
        ...

    def allow_plans(self, allowed: bool) -> None:
        """Say whether `forward` may wait while a library plans a kernel (`PagedAttention.allow_plans`). `rehearse` always may."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits [N, V], in the model's own dtype, from hidden [N, H]. The caller may overwrite the logits.

        They are written to `out` if that is given.
        """
        ...

    def close(self) -> None: ...
