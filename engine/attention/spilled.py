"""Attention of a step whose context lies in the host tier in part (`ForwardBatch.spilled`), in plain torch, on any device.

The step has one query, of T tokens. Its keys and values come in pieces, each of which is attended to by itself:

    keys      slots of the host, a segment at a time | blocks of the GPU, a segment at a time | the step's own
    mask      none                                   | none                                   | causal

A segment of the host is copied to the device first. The pieces are merged by their log-sum-exps in float32. Memory does not grow
with the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from engine.attention.torch_mla import absorb, expand_latent, expand_output
from engine.attention.torch_step import TorchPaged
from engine.batch import HOST, ForwardBatch, LayerPools
from engine.errors import InternalError

QUERY_TOKENS = 512  # query tokens of one product
SEGMENT_TOKENS = 2048  # keys of one product

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys [kv_heads, L, dim] and values [kv_heads, L, v_dim]."""


class SpilledGqa(TorchPaged):
    """Grouped-query attention over a spilled context. Implements PagedGqa."""

    def prepare(self, batch: ForwardBatch) -> SpilledGqaStep:
        return SpilledGqaStep(_Context(batch))


class SpilledMla(TorchPaged):
    """Multi-head latent attention over a spilled context. Implements PagedMla."""

    def prepare(self, batch: ForwardBatch) -> SpilledMlaStep:
        return SpilledMlaStep(_Context(batch))


class SpilledGqaStep:
    """Implements GqaStep."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        cached = zip(self._context.read(pools, "k"), self._context.read(pools, "v"), strict=True)
        pieces = ((keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in cached)
        return _attend(q, (k.transpose(0, 1), v.transpose(0, 1)), pieces, scale).to(q.dtype)


class SpilledMlaStep:
    """Implements MlaStep. A single token attends in latent space; for a chunk, each piece is expanded to keys and values."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    def attend(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        rank = kv_b.shape[2]
        nope = q.shape[2] - (latent.shape[1] - rank)
        cached = self._context.read(pools, "latent")
        if q.shape[0] == 1:
            pieces = ((piece[None], piece[None]) for piece in cached)
            mixed = _attend(absorb(q, kv_b, nope), (latent[None], latent[None]), pieces, scale)
            return expand_output(mixed[..., :rank].to(q.dtype), kv_b, nope)
        expanded = (expand_latent(piece, kv_b, nope) for piece in cached)
        return _attend(q, expand_latent(latent, kv_b, nope), expanded, scale).to(q.dtype)


class _Context:
    """Reads the cached tokens before the tokens of a step, in the order of their positions."""

    def __init__(self, batch: ForwardBatch) -> None:
        if batch.spilled is None or batch.num_queries > 1:
            raise InternalError("attention over a spilled context takes one query, whose older blocks lie in the host")
        self._batch = batch
        self._slots = batch.spilled
        self._blocks = batch.block_tables.flatten().long()

    def read(self, pools: LayerPools, name: str) -> Iterator[torch.Tensor]:
        """Yield the records of a pool as tensors [L, *shape], a segment at a time."""
        pool, size = pools[name], pools[name].shape[1]
        count = max(1, SEGMENT_TOKENS // size)  # blocks of a segment
        for first in range(0, self._slots.shape[0], count):
            yield _to_device(pools[HOST + name], self._slots[first : first + count], pool.device).flatten(0, 1)
        num = (
            self._batch.kv_lens_host[0] - self._batch.num_tokens - self._slots.shape[0] * size
        )  # in the GPU before the step's own
        for first in range(0, -(-num // size), count):
            yield pool.index_select(0, self._blocks[first : first + count]).flatten(0, 1)[: num - first * size]


def _to_device(records: torch.Tensor, slots: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the records [num_slots, ...] of some slots to a device."""
    if device.type == "cpu":
        return records.index_select(0, slots)
    staging = torch.empty(slots.shape[0], *records.shape[1:], dtype=records.dtype, device=device)
    for there, slot in zip(staging, slots.tolist(), strict=True):
        there.copy_(records[slot], non_blocking=True)  # the host's memory is page-locked
    return staging


class Part(NamedTuple):
    """Attention to some of the keys, in float32."""

    out: torch.Tensor  # [kv_heads, query heads of each, T, v_dim]: averaged values
    lse: torch.Tensor  # [kv_heads, query heads of each, T]: logarithm of the sum of exp(score)


def _attend(q: torch.Tensor, own: KeysValues, cached: Iterable[KeysValues], scale: float) -> torch.Tensor:
    """Attend from q [T, heads, dim] to all of `cached`, and causally to the step's `own` -> [T, heads, v_dim] in float32."""
    keys, values = own
    queries = q.float().view(q.shape[0], keys.shape[0], -1, q.shape[2]).permute(1, 2, 0, 3)  # [kv_heads, of each, T, dim]
    tiles = [slice(begin, begin + QUERY_TOKENS) for begin in range(0, q.shape[0], QUERY_TOKENS)]
    totals = [attend_part(queries[:, :, tile], (keys[:, tile], values[:, tile]), scale, causal=True) for tile in tiles]
    for i, tile in enumerate(tiles):
        for before in tiles[:i]:
            part = attend_part(queries[:, :, tile], (keys[:, before], values[:, before]), scale, causal=False)
            totals[i] = merge(totals[i], part)
    for piece in cached:
        for i, tile in enumerate(tiles):
            totals[i] = merge(totals[i], attend_part(queries[:, :, tile], piece, scale, causal=False))
    return torch.cat([total.out for total in totals], 2).permute(2, 0, 1, 3).flatten(1, 2)


def attend_part(q: torch.Tensor, piece: KeysValues, scale: float, *, causal: bool) -> Part:
    """Attend from q [kv_heads, query heads of each, T, dim], float32, to some keys. With `causal`, there are as many as T."""
    keys, values = (x.float().unsqueeze(1) for x in piece)
    if q.device.type != "cpu":
        return plain_part(q, keys, values, scale, causal=causal)
    v_dim = values.shape[3]
    if v_dim < keys.shape[3]:  # the kernel needs keys and values of equal dims
        values = F.pad(values, (0, keys.shape[3] - v_dim))
    keys, values = (x.expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, is_causal=causal, scale=scale)
    return Part(out[..., :v_dim], lse)


def plain_part(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool) -> Part:
    """Do the same as `attend_part` by plain products. Keys and values are [kv_heads, 1, L, dim or v_dim], float32."""
    scores = torch.matmul(q, keys.transpose(2, 3)).mul_(scale)
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    return Part(torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), values), lse)


def merge(a: Part, b: Part) -> Part:
    """Return attention to the keys of both parts."""
    lse = torch.logaddexp(a.lse, b.lse)
    weights = [(part.lse - lse).exp_().unsqueeze(-1) for part in (a, b)]
    return Part(a.out * weights[0] + b.out * weights[1], lse)
