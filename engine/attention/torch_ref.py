"""Paged attention in plain torch: the CPU's backend, and the twin that faster kernels are compared with.

    decodes   on a CPU straight from the pool where that pays (`in_pool.py`). Else rows of similar length go together: K and
              V are gathered [n, L, kv_heads, dim] (or viewed, where one row's blocks lie side by side), and the heads that
              share a KV head stand in as the query positions of it
    chunks    one by one: K and V of a fresh prompt are the step's own, otherwise gathered; causal with an offset

A decode of latent attention runs in the latent space (the expansion moves over to query and output); a chunk expands.
Pools must be finite from the start (zeros, say): what a mask hides is still multiplied by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.attention.in_pool import InPool, plan
from engine.attention.single_rows import decode_rows, is_finite
from engine.batch import ForwardBatch, LayerPools
from engine.errors import InternalError

GROUP_NUMBERS = 1 << 20  # gathered K (or V) of a decode group: small enough to stay in a core's cache


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a set of rows finds its KV: a run of slots (one row, no copy) or blocks [n * blocks_per_row] to gather."""

    rows: int
    length: int
    start: int | None
    blocks: torch.Tensor | None

    def read(self, pool: torch.Tensor) -> torch.Tensor:
        """pool [num_blocks, block_size, heads, dim] -> [rows, heads, length, dim]"""
        if self.start is not None:
            return pool.flatten(0, 1)[self.start : self.start + self.length].transpose(0, 1).unsqueeze(0)
        assert self.blocks is not None
        gathered = pool.index_select(0, self.blocks).view(self.rows, -1, *pool.shape[2:])
        return gathered[:, : self.length].transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Group:
    """Decode rows [begin, end) of the sorted order. `mask` is None where all are equally long."""

    begin: int
    end: int
    source: _Source
    mask: torch.Tensor | None  # [n, 1, 1, L] bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens [begin, end) of the batch. `source` is None for a prompt's first chunk, `mask` [end - begin, L] otherwise."""

    begin: int
    end: int
    source: _Source | None
    mask: torch.Tensor | None


class TorchAttention:
    """AttentionBackend."""

    graphable = False
    graph_tokens = 0

    def prepare(self, batch: ForwardBatch) -> TorchStepAttention:
        if batch.by_length:
            raise InternalError("plain attention is given a captured step's batch: it needs the lengths on the host")
        per_token = max(pool[0, 0].numel() for pool in batch.kv[0].values())
        num_blocks, block_size = next(iter(batch.kv[0].values())).shape[:2]
        # Past a row's own blocks the entries are meaningless: make them harmless, a mask hides what they point to.
        tables = batch.block_tables.long().clamp_(0, num_blocks - 1)
        # Reading a table is free on the CPU only; elsewhere it would wait for the device.
        runs = tables.tolist() if tables.device.type == "cpu" else None
        reader = _TableReader(tables, runs, block_size)
        in_pool = _in_pool(batch, reader) if runs is not None and batch.num_decodes > 1 else None
        order = sorted(range(batch.num_decodes), key=batch.kv_lens_host.__getitem__)
        in_order = order == list(range(batch.num_decodes))
        device = tables.device
        return TorchStepAttention(
            batch,
            order=None if in_order else torch.tensor(order, device=device),
            in_pool=in_pool,
            groups=[] if in_pool else _groups(order, batch, reader, max_tokens=GROUP_NUMBERS // per_token),
            chunks=_chunks(batch, reader),
        )

    def prompt_lengths(self, most: int, dtype: torch.dtype) -> list[int]:
        return []


@dataclass(frozen=True, slots=True)
class _TableReader:
    tables: torch.Tensor  # [B, max_blocks] int64
    runs: list[list[int]] | None  # the same on the host
    block_size: int

    def source(self, rows: list[int], length: int) -> _Source:
        """KV of `rows`, up to `length` tokens each."""
        count = -(-length // self.block_size)
        if len(rows) == 1 and self.runs is not None:
            blocks = self.runs[rows[0]][:count]
            if blocks[-1] - blocks[0] == count - 1 and blocks == list(range(blocks[0], blocks[0] + count)):
                return _Source(1, length, blocks[0] * self.block_size, None)
        return _Source(len(rows), length, None, self.tables[rows, :count].flatten())


def _groups(order: list[int], batch: ForwardBatch, reader: _TableReader, max_tokens: int) -> list[_Group]:
    """Cut the rows, shortest first, where padding would double the work or a group would outgrow the cache."""
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


class TorchStepAttention:
    """StepAttention."""

    def __init__(
        self,
        batch: ForwardBatch,
        *,
        in_pool: InPool | None,
        order: torch.Tensor | None,
        groups: list[_Group],
        chunks: list[_Chunk],
    ) -> None:
        self._batch = batch
        self._in_pool = in_pool
        self._order = order
        self._groups = groups
        self._chunks = chunks

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        if not self._chunks:
            return self._decode(q, pools["k"], pools["v"], scale)
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        decodes = self._batch.num_decodes
        if decodes:
            out[:decodes] = self._decode(q[:decodes], pools["k"], pools["v"], scale)
        for c in self._chunks:
            span = slice(c.begin, c.end)
            # [1, kv_heads, L, dim]
            keys = k[span].transpose(0, 1).unsqueeze(0) if c.source is None else c.source.read(pools["k"])
            values = v[span].transpose(0, 1).unsqueeze(0) if c.source is None else c.source.read(pools["v"])
            out[span] = _attend_chunk(q[span], keys[0], values[0], c.mask, scale)
        return out

    def attend_latent(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        pool = pools["latent"]
        decodes, rank = self._batch.num_decodes, kv_b.shape[2]
        nope = q.shape[2] - (latent.shape[1] - rank)
        out = torch.empty(*q.shape[:2], kv_b.shape[1] - nope, dtype=q.dtype, device=q.device)
        if decodes:
            absorbed = absorb(q[:decodes], kv_b, nope)
            shared = pool.unsqueeze(2)  # one KV head for all
            mixed = self._decode(absorbed, shared, shared, scale)[..., :rank]
            out[:decodes] = expand_output(mixed, kv_b, nope)
        for c in self._chunks:
            span = slice(c.begin, c.end)
            cached = latent[span] if c.source is None else c.source.read(pool.unsqueeze(2))[0, 0]  # [L, rank + rope]
            keys, values = expand_latent(cached, kv_b, nope)
            out[span] = _attend_chunk(q[span], keys, values, c.mask, scale)
        return out

    def _decode(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """q [D, heads, dim], pools [num_blocks, block_size, kv_heads, dim] -> [D, heads, dim]"""
        out = self._decode_together(q, k_pool, v_pool, scale)
        masked = self._in_pool is not None or any(group.mask is not None for group in self._groups)
        return decode_rows(q, k_pool, v_pool, self._batch, scale) if masked and not is_finite(out) else out

    def _decode_together(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """`_decode` with many rows in one call, some of which read memory of other rows behind a mask."""
        if self._in_pool is not None:
            shaped = q.view(q.shape[0], k_pool.shape[2], -1, q.shape[2])
            return self._in_pool.attend(shaped, k_pool, v_pool, scale).flatten(1, 2)
        if self._order is not None:
            q = q.index_select(0, self._order)
        kv_heads = k_pool.shape[2]
        q = q.view(q.shape[0], kv_heads, -1, q.shape[2])  # [D, kv_heads, heads of each, dim]
        outs = []
        for g in self._groups:
            keys = g.source.read(k_pool)
            values = keys if v_pool is k_pool else g.source.read(v_pool)
            outs.append(F.scaled_dot_product_attention(q[g.begin : g.end], keys, values, attn_mask=g.mask, scale=scale))
        out = (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1, 2)
        return out if self._order is None else torch.empty_like(out).index_copy_(0, self._order, out)


def absorb(q: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """q [D, heads, nope + rope] -> [D, heads, rank + rope], to meet latents as they are: q . (W_k c) = (W_k^T q) . c"""
    q_latent = torch.bmm(q[..., :nope].transpose(0, 1), kv_b[:, :nope]).transpose(0, 1)  # [D, heads, rank]
    return torch.cat((q_latent, q[..., nope:]), -1)


def expand_output(mixed: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """mixed [D, heads, rank], latents averaged by attention -> [D, heads, v_dim]: the value expansion, behind the sum."""
    return torch.bmm(mixed.transpose(0, 1), kv_b[:, nope:].transpose(1, 2)).transpose(0, 1)


def expand_latent(cached: torch.Tensor, kv_b: torch.Tensor, nope: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cached [L, rank + rope] -> keys [heads, L, nope + rope], values [heads, L, v_dim]"""
    heads, _, rank = kv_b.shape
    expanded = torch.matmul(cached[:, :rank], kv_b.transpose(1, 2))  # [heads, L, nope + v_dim]
    shared = cached[:, rank:].expand(heads, -1, -1)
    return torch.cat((expanded[..., :nope], shared), -1), expanded[..., nope:]


def _attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q [T, heads, dim], k and v [kv_heads, L, dim] -> [T, heads, dim]; no mask: T = L, causal.

    KV heads play the batch and the heads that share one are a view of it, so nothing is repeated in memory.
    """
    kv_heads, shared, v_dim = k.shape[0], q.shape[1] // k.shape[0], v.shape[2]
    if v.device.type == "cpu" and v_dim < k.shape[2]:
        # torch's blocked kernel wants equal dims; without it all scores are in memory at once, at a third of the speed.
        v = F.pad(v, (0, k.shape[2] - v_dim))
    queries = q.view(-1, kv_heads, shared, q.shape[2]).permute(1, 2, 0, 3)  # [kv_heads, shared, T, dim]
    keys = k.unsqueeze(1).expand(-1, shared, -1, -1)
    values = v.unsqueeze(1).expand(-1, shared, -1, -1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :v_dim].permute(2, 0, 1, 3).flatten(1, 2)
