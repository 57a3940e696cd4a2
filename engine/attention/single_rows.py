"""Decode attention of one row at a time over the row's own tokens and nothing else, in plain torch.

Faster plain attention computes many rows in one call, and a mask gives weight 0 to tokens that are not a row's own. That does
not hide NaN or infinity in the KV of another row, or of an earlier owner of a block, since 0 times NaN is NaN.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from engine.batch import ForwardBatch


def is_finite(out: torch.Tensor) -> bool:
    """Whether `out` holds neither NaN nor infinity. A sum that overflows also counts as not finite."""
    return math.isfinite(out.sum(dtype=torch.float32).item())


def decode_rows(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: ForwardBatch, scale: float) -> torch.Tensor:
    """Attend from q [D, heads, dim], the first D queries of `batch`, which are decodes -> averaged values [D, heads, v_dim].

    The KV pools are [num_blocks, block_size, kv_heads, dim or v_dim].
    """
    rows = [_decode_row(row, q, k_pool, v_pool, batch, scale) for row in range(q.shape[0])]
    return torch.cat(rows)


def _decode_row(
    row: int, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: ForwardBatch, scale: float
) -> torch.Tensor:
    length, kv_heads = batch.kv_lens_host[row], k_pool.shape[2]
    blocks = batch.block_tables[row, : -(-length // k_pool.shape[1])].long()
    keys, values = (pool.index_select(0, blocks).flatten(0, 1)[:length].transpose(0, 1)[None] for pool in (k_pool, v_pool))
    query = q[row].view(1, kv_heads, -1, q.shape[2])  # the heads that share a K/V head take the place of query positions
    return F.scaled_dot_product_attention(query, keys, values, scale=scale).flatten(1, 2)
