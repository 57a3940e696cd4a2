"""The interface between a model and attention over its paged KV pools.

There are two kinds of attention: grouped-query attention (GQA) over pools "k" and "v", and multi-head latent attention (MLA)
over the pool "latent". A model uses one of them in all layers. `select.py` chooses an implementation of that kind for a device,
once. In each step the implementation prepares what all layers share (`prepare`), and each layer then calls `attend`.

When a layer calls `attend`, the step's own records are already in the pools. Each query token attends causally to all of its
sequence that the pools hold: the cached prefix, and the step's chunk up to the token itself.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from engine.batch import ForwardBatch, LayerPools, WarmupChunk


class GqaStep(Protocol):
    """Grouped-query attention for the tokens of one ForwardBatch."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        """Attend causally from queries q [T, heads, dim] -> averaged values [T, heads, dim].

        k and v [T, kv_heads, dim] are the step's own keys and values. The KV pools "k" and "v", [kv_heads, dim] a token, hold
        them as well. `scale` multiplies q . k before the softmax.
        """
        ...


class MlaStep(Protocol):
    """Multi-head latent attention for the tokens of one ForwardBatch."""

    def attend(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        """Attend causally from queries q [T, heads, nope + rope] -> averaged values [T, heads, v_dim].

        latent [T, rank + rope] are the step's own records: the normed latent [rank], then the rotated key [rope] that all heads
        share. The KV pool "latent" holds them as well. The weight kv_b [heads, nope + v_dim, rank] expands a latent to each
        head's key [nope] and value [v_dim]. `scale` multiplies q . k before the softmax.
        """
        ...


StepT_co = TypeVar("StepT_co", covariant=True)


class PagedAttention(Protocol[StepT_co]):
    """An implementation of one kind of attention on one device. StepT_co is GqaStep or MlaStep."""

    graphable: bool
    """Whether a step of decodes never waits for the device, so that a CUDA graph can hold it."""
    graph_tokens: int
    """Largest mixed step (decodes and prefill chunks), in tokens, that a CUDA graph may hold; 0 if there can be none."""

    def prepare(self, batch: ForwardBatch) -> StepT_co:
        """Compute, once for a step, the values that all layers use to attend.

        Raises InternalError if the batch is a step captured in a CUDA graph and this attention cannot run in one.
        """
        ...

    def allow_plans(self, allowed: bool) -> None:
        """Say whether a step may wait while a library plans a kernel for a new length, up to 0.1 s, as it may at first.

        If not, chunks of lengths without a plan use kernels that need none.
        """
        ...

    def warmup_chunks(self, max_tokens: int, max_len: int, dtype: torch.dtype) -> list[WarmupChunk]:
        """List the prefill chunks that are worth a warm-up: one of each kind that is slow the first time.

        A library may plan a kernel when it first sees a length. `max_tokens` is the longest chunk of a step, `max_len` the
        longest context, and `dtype` the type of the queries.
        """
        ...


PagedGqa = PagedAttention[GqaStep]
PagedMla = PagedAttention[MlaStep]
