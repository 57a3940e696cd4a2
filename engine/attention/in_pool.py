"""Decode attention on a CPU that reads K and V directly from the KV pool, without copying them.

One flash-attention call takes the pool's KV blocks as its batch, each with the query of the row that owns the block. The results
of a row's blocks are then merged by their log-sum-exps. The call also computes unused blocks between the used ones, in vain.
`plan` therefore returns None unless at least half of the blocks are used. It also returns None if two rows share a block, since
such a block has no single owner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class InPool:
    """The plan by which a step's D decode rows, of up to W KV blocks each, attend directly in the pool."""

    begin: int  # the call computes blocks [begin, end) of the pool
    end: int
    owner: torch.Tensor  # [end - begin] int64: the decode row that owns each block; 0 for unused blocks
    mask: torch.Tensor  # [end - begin, 1, 1, block_size]: added to scores; -inf past the owner's last token
    table: torch.Tensor  # [D, W] int64: each row's blocks, counted from `begin`
    beyond: torch.Tensor  # [D, W, 1, 1]: added to log-sum-exps; -inf past a row's own blocks, else 0

    def attend(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend from q [D, kv_heads, query heads of each, dim] to pools [num_blocks, block_size, kv_heads, dim].

        The result has the shape of q.
        """
        keys = k_pool[self.begin : self.end].transpose(1, 2)
        values = v_pool[self.begin : self.end].transpose(1, 2)
        queries = q.index_select(0, self.owner)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=self.mask, scale=scale
        )
        weights = (lse[self.table] + self.beyond).softmax(1).to(q.dtype)  # [D, W, kv_heads, heads of each]
        merged: torch.Tensor = (out[self.table] * weights.unsqueeze(-1)).sum(1)
        return merged


def plan(rows: list[list[int]], kv_lens: list[int], block_size: int, dtype: torch.dtype) -> InPool | None:
    """Plan attention for decode rows with the KV blocks `rows` and lengths `kv_lens`, in tokens.

    Returns None if K and V have to be gathered instead.
    """
    used = [block for blocks in rows for block in blocks]
    begin, end = min(used), max(used) + 1
    if len(set(used)) != len(used) or 2 * len(used) < end - begin:
        return None
    width = max(len(blocks) for blocks in rows)
    table = torch.tensor([[b - begin for b in blocks] + [0] * (width - len(blocks)) for blocks in rows])
    counts = torch.tensor([len(blocks) for blocks in rows])
    owner = torch.zeros(end - begin, dtype=torch.int64)
    owner[torch.tensor(used) - begin] = torch.repeat_interleave(counts)
    mask = torch.zeros(end - begin, block_size, dtype=dtype)
    for blocks, length in zip(rows, kv_lens, strict=True):
        mask[blocks[-1] - begin, length - (len(blocks) - 1) * block_size :] = float("-inf")
    beyond = torch.zeros(table.shape).masked_fill_(torch.arange(width) >= counts[:, None], float("-inf"))
    return InPool(begin, end, owner, mask[:, None, None, :], table, beyond[:, :, None, None])
