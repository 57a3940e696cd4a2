"""What a model asks of attention. A backend is chosen once; each step it prepares what all layers share, then serves them.

The model has written the step's records into the layer's pools. Both methods attend over everything that the pools hold of each
query: the cached prefix and the chunk itself, causally.
"""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import ForwardBatch, LayerPools


class StepAttention(Protocol):
    """Attention for one ForwardBatch."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        """q [T, heads, dim], k and v [T, kv_heads, dim] -> [T, heads, dim]. Pools "k" and "v", [kv_heads, dim] a token, hold the
        step's own k and v already.
        """
        ...

    def attend_latent(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        """Multi-head latent attention -> [T, heads, v_dim].

        q [T, heads, nope + rope]; latent [T, rank + rope] is what pool "latent" keeps of a token, and of the step's own tokens
        holds already: the normalised latent, then the rotated key all heads share. kv_b [heads, nope + v_dim, rank] expands a
        latent to each head's key and value.
        """
        ...


class AttentionBackend(Protocol):
    graphable: bool
    """Whether the decode of a prepared step never waits for the device."""
    graph_tokens: int
    """Tokens of the largest batch `by_length` that it takes, without waiting for the device; 0: none."""

    def prepare(self, batch: ForwardBatch) -> StepAttention: ...

    def prompt_lengths(self, most: int, dtype: torch.dtype) -> list[int]:
        """Whole prompts of up to `most` tokens, of queries in `dtype`, whose kind takes longer the first time it comes, for a
        library plans it: one length of each kind."""
        ...
