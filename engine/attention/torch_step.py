"""Plain torch attention of one step. Grouped-query and latent attention share this code, which finds the KV and attends to it.

    decodes   A CPU reads K and V directly from the KV pool if `in_pool.py` can do that. Otherwise decode rows of similar length
              form a group: their K and V are gathered, [n, kv_heads, L, dim], or viewed if one row's blocks are adjacent. The
              query heads that share a K/V head take the place of query positions.
    chunks    Chunks are computed one by one. Without a cached prefix, K and V are the step's own. Behind a cached prefix, K and V
              are gathered, and a mask makes attention causal.

Pools must hold finite numbers from the start, zeros for example: a masked position has weight 0, and 0 times NaN is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.attention.in_pool import InPool, plan
from engine.attention.single_rows import decode_rows, is_finite
from engine.batch import ForwardBatch, WarmupChunk
from engine.errors import InternalError

GROUP_NUMBERS = 1 << 20  # most numbers of K (or V) that are gathered for a group of decodes: a CPU core's cache holds as many


@dataclass(frozen=True, slots=True)
class _Source:
    """Where to read the K and V of a set of rows: either adjacent slots of one row, or KV blocks to gather."""

    rows: int
    length: int  # tokens that are read of each row; those past a shorter row's end are meaningless
    start: int | None  # the first slot, if the slots are adjacent
    blocks: torch.Tensor | None  # [rows * blocks of a row] int64: the blocks to gather, if `start` is None

    def read(self, pool: torch.Tensor) -> torch.Tensor:
        """Read the rows' K or V from pool [num_blocks, block_size, heads, dim] -> [rows, heads, length, dim]."""
        if self.start is not None:
            return pool.flatten(0, 1)[self.start : self.start + self.length].transpose(0, 1).unsqueeze(0)
        assert self.blocks is not None
        gathered = pool.index_select(0, self.blocks).view(self.rows, -1, *pool.shape[2:])
        return gathered[:, : self.length].transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of decode rows that one call computes: rows [begin, end), counted in ascending order of length."""

    begin: int
    end: int
    source: _Source
    mask: torch.Tensor | None  # [n, 1, 1, L] bool, true where a row has a token; None if all rows are equally long


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill chunk, which is tokens [begin, end) of the step."""

    begin: int
    end: int
    source: _Source | None  # None for a prompt's first chunk: K and V are the step's own
    mask: torch.Tensor | None  # [end - begin, L] bool, true where a token sees a key; None for a prompt's first chunk


class TorchPaged:
    """Base class of TorchGqa and TorchMla. A CUDA graph can hold neither, since both read lengths on the host."""

    graphable = False
    graph_tokens = 0

    def allow_plans(self, allowed: bool) -> None:
        """Do nothing, since plain torch needs no plans."""

    def warmup_chunks(self, max_tokens: int, max_len: int, dtype: torch.dtype) -> list[WarmupChunk]:
        return []


@dataclass(frozen=True, slots=True)
class GatheredStep:
    """The plan of one step: its decodes and chunks, and where the K and V of each are."""

    batch: ForwardBatch
    num_decodes: int
    order: torch.Tensor | None  # [D] int64: decode rows in ascending order of length; None if they have that order
    in_pool: InPool | None  # set if the decodes attend directly in the pool; `groups` is then empty
    groups: list[_Group]
    chunks: list[_Chunk]

    @staticmethod
    def of(batch: ForwardBatch) -> GatheredStep:
        """Plan the step of `batch`. Raises InternalError for a step captured in a CUDA graph, whose lengths only the device
        knows."""
        if batch.by_length:
            raise InternalError("plain torch attention cannot serve a captured batch: it needs the lengths on the host")
        per_token = max(pool[0, 0].numel() for pool in batch.kv[0].values())
        num_blocks, block_size = next(iter(batch.kv[0].values())).shape[:2]
        # Table entries past a row's own blocks are arbitrary. Clamped entries are safe to read, and masks hide the KV behind
        # them.
        tables = batch.block_tables.long().clamp_(0, num_blocks - 1)
        # The host reads tables only if they are on a CPU: it would have to wait for another device.
        runs = tables.tolist() if tables.device.type == "cpu" else None
        reader = _TableReader(tables, runs, block_size)
        in_pool = _in_pool(batch, reader) if runs is not None and batch.num_decodes > 1 else None
        order = sorted(range(batch.num_decodes), key=batch.kv_lens_host.__getitem__)
        in_order = order == list(range(batch.num_decodes))
        return GatheredStep(
            batch,
            batch.num_decodes,
            order=None if in_order else torch.tensor(order, device=tables.device),
            in_pool=in_pool,
            groups=[] if in_pool else _groups(order, batch, reader, max_tokens=GROUP_NUMBERS // per_token),
            chunks=_chunks(batch, reader),
        )

    def decode(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend from the decodes q [D, heads, dim] to pools [num_blocks, block_size, kv_heads, dim] -> [D, heads, dim].

        Both pools may be the same tensor. If the result is not finite, rows are computed again one by one: NaN in the KV of one
        row must not reach another row.
        """
        out = self._decode_together(q, k_pool, v_pool, scale)
        masked = self.in_pool is not None or any(group.mask is not None for group in self.groups)
        return decode_rows(q, k_pool, v_pool, self.batch, scale) if masked and not is_finite(out) else out

    def _decode_together(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """Decode many rows in one call. Some rows then read the KV of other rows behind a mask, with weight 0."""
        kv_heads = k_pool.shape[2]
        if self.in_pool is not None:
            return self.in_pool.attend(q.view(q.shape[0], kv_heads, -1, q.shape[2]), k_pool, v_pool, scale).flatten(1, 2)
        if self.order is not None:
            q = q.index_select(0, self.order)
        q = q.view(q.shape[0], kv_heads, -1, q.shape[2])  # [D, kv_heads, query heads of each, dim]
        outs = []
        for group in self.groups:
            keys = group.source.read(k_pool)
            values = keys if v_pool is k_pool else group.source.read(v_pool)
            rows = q[group.begin : group.end]
            outs.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask, scale=scale))
        out = (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1, 2)
        return out if self.order is None else torch.empty_like(out).index_copy_(0, self.order, out)


@dataclass(frozen=True, slots=True)
class _TableReader:
    """Finds the K and V of rows by the KV block tables of a step."""

    tables: torch.Tensor  # [B, max_blocks] int64: the KV block numbers of each query's sequence
    runs: list[list[int]] | None  # the same tables as lists on the host; None if the tables are not on a CPU
    block_size: int

    def source(self, rows: list[int], length: int) -> _Source:
        """Find where the first `length` tokens of each of `rows` are in the KV pools."""
        count = -(-length // self.block_size)
        if len(rows) == 1 and self.runs is not None:
            blocks = self.runs[rows[0]][:count]
            if blocks[-1] - blocks[0] == count - 1 and blocks == list(range(blocks[0], blocks[0] + count)):
                return _Source(1, length, blocks[0] * self.block_size, None)
        return _Source(len(rows), length, None, self.tables[rows, :count].flatten())


def _groups(order: list[int], batch: ForwardBatch, reader: _TableReader, max_tokens: int) -> list[_Group]:
    """Cut the decode rows, shortest first, into groups. A group ends before padding doubles its work or its KV exceeds
    `max_tokens`."""
    lens = [batch.kv_lens_host[row] for row in order]
    groups, begin = [], 0
    for end in range(1, len(order) + 1):
        done = end == len(order)
        if done or lens[end] > max(64, 2 * lens[begin]) or (end + 1 - begin) * lens[end] > max_tokens:
            groups.append(_group(order[begin:end], lens[begin:end], begin, batch, reader))
            begin = end
    return groups


def _group(rows: list[int], lens: list[int], begin: int, batch: ForwardBatch, reader: _TableReader) -> _Group:
    mask = None
    if lens[0] != lens[-1]:
        device = batch.kv_lens.device
        mask = torch.arange(lens[-1], device=device) < batch.kv_lens[rows].unsqueeze(1)
        mask = mask[:, None, None, :]
    return _Group(begin, begin + len(rows), reader.source(rows, lens[-1]), mask)


def _in_pool(batch: ForwardBatch, reader: _TableReader) -> InPool | None:
    assert reader.runs is not None
    lens, size = batch.kv_lens_host[: batch.num_decodes], reader.block_size
    rows = [blocks[: -(-length // size)] for blocks, length in zip(reader.runs, lens, strict=False)]
    return plan(rows, lens, size, next(iter(batch.kv[0].values())).dtype)


def _chunks(batch: ForwardBatch, reader: _TableReader) -> list[_Chunk]:
    chunks, begin = [], batch.num_decodes
    for row in range(batch.num_decodes, batch.num_queries):
        num, length = batch.query_lens_host[row], batch.kv_lens_host[row]
        if num == length:
            chunks.append(_Chunk(begin, begin + num, None, None))
        else:
            mask = torch.ones(num, length, dtype=torch.bool, device=batch.token_ids.device).tril_(length - num)
            chunks.append(_Chunk(begin, begin + num, reader.source([row], length), mask))
        begin += num
    return chunks


def attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Attend from a chunk's q [T, heads, dim] to k [kv_heads, L, dim] and v [kv_heads, L, v_dim] -> [T, heads, v_dim].

    mask [T, L] is true where a token sees a position. Without a mask, T = L and attention is causal. K/V heads take the place of
    the batch. The query heads that share a K/V head get a view of its K and V, so that these are not repeated in memory.
    """
    kv_heads, shared, v_dim = k.shape[0], q.shape[1] // k.shape[0], v.shape[2]
    if v.device.type == "cpu" and v_dim < k.shape[2]:
        # torch's blocked kernel needs K and V of equal dims. The other kernel keeps all scores in memory, and is a third as fast.
        v = F.pad(v, (0, k.shape[2] - v_dim))
    queries = q.view(-1, kv_heads, shared, q.shape[2]).permute(1, 2, 0, 3)  # [kv_heads, shared, T, dim]
    keys = k.unsqueeze(1).expand(-1, shared, -1, -1)
    values = v.unsqueeze(1).expand(-1, shared, -1, -1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :v_dim].permute(2, 0, 1, 3).flatten(1, 2)
