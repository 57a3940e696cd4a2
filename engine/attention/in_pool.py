"""Decode attention that reads the pool where it lies, for the CPU: no K or V is copied.

The pool's blocks play the batch of one flash call, each with the query of the row that owns it; the parts of a row are
then merged by their log-sum-exps. Blocks between the used ones are computed for nothing, so they must be the minority,
and a block shared by two rows has no single owner: `plan` answers None in both cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class InPool:
    begin: int  # blocks [begin, end) of the pool
    end: int
    owner: torch.Tensor  # [end - begin] decode row of each; 0 for blocks of nobody
    mask: torch.Tensor  # [end - begin, 1, 1, block_size]: -inf past a row's end
    table: torch.Tensor  # [D, W] each row's blocks, counted from `begin`
    beyond: torch.Tensor  # [D, W, 1, 1] -inf past a row's own blocks

    def attend(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """q [D, kv_heads, heads of each, dim], pools [num_blocks, block_size, kv_heads, dim] -> like q"""
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
    """`rows` are the decode rows' own blocks. None where gathering is the better or the only way."""
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
