"""ForwardBatch: the device tensors of one step, handed down from the runner to every layer.

A query is one slice of the plan. With T tokens, B queries and S sampled positions in the step:

    tokens      q0 | q1 | q2 | q3 q3 q3 q3 | q4 q4          num_decodes = 3, T = 9, B = 5
    query_starts  0    1    2    3             7     9      [B + 1]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

LayerPools = dict[str, torch.Tensor]
"""Per-token pools of one layer by name, each [num_blocks, block_size, *shape]: K and V, an MLA latent, indexer keys, scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """One per-token pool of a layer: its name, the shape of one token's record, and of what sizes its vectors are where a record
    is of several."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[int, ...] = ()


def block_bytes(pools: Iterable[Sequence[PoolSpec]], block_size: int) -> int:
    """Return the bytes of one KV block, summed over all layers and pools."""
    return block_size * sum(math.prod(pool.shape) * pool.dtype.itemsize for layer in pools for pool in layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each token's KV is written
    query_starts: torch.Tensor  # [B + 1] int32
    kv_lens: torch.Tensor  # [B] int32: tokens in the cache once this step's are written
    block_tables: torch.Tensor  # [B, max_blocks] int32; past a row's own blocks the entries are meaningless
    num_decodes: int  # the first num_decodes queries have one token each
    query_lens_host: list[int]  # [B], for the paths that loop on the host
    kv_lens_host: list[int]  # [B]
    kv: list[LayerPools]  # one entry a layer
    by_length: bool = False  # of a captured step: lengths change from replay to replay, so only `query_starts` tells decodes
    # (one token each) from chunks; num_decodes is 0 and the host's lists are empty
    read: Read | None = None  # None: all tokens are

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_queries(self) -> int:
        return int(self.kv_lens.shape[0])

    def last_tokens(
        self, index: torch.Tensor, kv_lens: torch.Tensor, block_tables: torch.Tensor, kv_lens_host: list[int]
    ) -> Read:
        """Of S queries: where their last tokens stand in the step [S] int64, and their lengths [S] int32, tables [S, max_blocks]
        int32 and, for the paths that loop on the host, lengths once more."""
        num, device = index.shape[0], index.device
        return Read(
            index,
            ForwardBatch(
                token_ids=self.token_ids.index_select(0, index),
                positions=self.positions.index_select(0, index),
                slots=self.slots.index_select(0, index),
                query_starts=torch.arange(num + 1, dtype=torch.int32, device=device),
                kv_lens=kv_lens,
                block_tables=block_tables,
                num_decodes=num,
                query_lens_host=[1] * num,
                kv_lens_host=kv_lens_host,
                kv=self.kv,
            ),
        )


@dataclass(frozen=True, slots=True)
class Read:
    """Tokens of a step whose hidden state somebody reads: of the others the last layer only writes the KV."""

    index: torch.Tensor  # [S] int64, of the step's tokens
    batch: ForwardBatch  # these alone: each the decode of a token that is in the cache already
