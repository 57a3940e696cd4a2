"""Paged attention by our Triton kernels: the CUDA backend. `torch_ref.py` is its twin.

Decodes of K/V and of latents read the paged pools directly, and so do chunks of K/V. The latents of chunks are expanded to
keys and values, all of a step together (`latent_chunks.py`).
"""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as F

from engine.attention import long_prompts
from engine.attention.latent_chunks import LatentGroup, plan_groups
from engine.batch import ForwardBatch, LayerPools
from engine.kernels.latent import absorb, absorb_few, build_keys, expand, merge_expand
from engine.kernels.mla_decode import decode_splits, is_alone, merge, mla_decode
from engine.kernels.mla_mixed import mla_mixed
from engine.kernels.mla_mixed import tile_tokens as latent_tile_tokens
from engine.kernels.mla_prefill import choose_tile, mla_prefill
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.kernels.paged_prefill import map_tiles, paged_prefill, tile_tokens


class TritonAttention:
    """AttentionBackend."""

    graphable = True

    def __init__(self, num_processors: int, *, latent: bool = False) -> None:
        """`num_processors`: of the device, which decides into how many parts a sequence is cut. `latent`: what pools hold."""
        self._num_processors = num_processors
        # A larger step takes longer than its launches; and without expansion, chunks of latents cost more arithmetic.
        self.graph_tokens = 1024 if latent else 2048

    def prepare(self, batch: ForwardBatch) -> TritonStepAttention:
        return TritonStepAttention(batch, self._num_processors)

    def prompt_lengths(self, most: int, dtype: torch.dtype) -> list[int]:
        return long_prompts.kinds(most, dtype)


class TritonStepAttention:
    """StepAttention."""

    def __init__(self, batch: ForwardBatch, num_processors: int) -> None:
        self._batch = batch
        self._num_processors = num_processors
        self._tiles: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}  # by tokens a tile
        self._groups: list[LatentGroup] | None = None
        self._prompts: list[range] | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        batch, k_pool, v_pool = self._batch, pools["k"], pools["v"]
        if batch.by_length:
            return self._attend_by_length(q, k_pool, v_pool, scale)
        decodes, heads, kv_heads = batch.num_decodes, q.shape[1], k_pool.shape[2]
        fresh = self._long_prompts(q.dtype)
        if long_prompts.fill(fresh, q.shape[0]):
            return long_prompts.attend(q, k, v, scale, len(fresh))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for span in fresh:
            part = slice(span.start, span.stop)
            out[part] = long_prompts.attend(q[part], k[part], v[part], scale)
        tiles = self._query_tiles(tile_tokens(heads, kv_heads), q.dtype)
        if tiles is not None:
            paged_prefill(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, batch.query_starts, tiles, scale, out)
        if decodes:
            splits = choose_splits(decodes, kv_heads, self._num_processors)
            paged_decode(q[:decodes], k_pool, v_pool, batch.block_tables, batch.kv_lens, scale, splits, out[:decodes])
        return out

    def _attend_by_length(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        batch, heads, kv_heads = self._batch, q.shape[1], k_pool.shape[2]
        tile_q = tile_tokens(heads, kv_heads)
        if tile_q not in self._tiles:
            self._tiles[tile_q] = map_tiles(batch.query_starts, q.shape[0], tile_q, least=2)
        tiles = self._tiles[tile_q]
        assert tiles is not None
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        paged_prefill(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, batch.query_starts, tiles, scale, out)
        splits = choose_splits(batch.kv_lens.shape[0], kv_heads, self._num_processors)
        starts = batch.query_starts
        return paged_decode(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, scale, splits, out, starts)

    def attend_latent(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        batch, pool = self._batch, pools["latent"]
        decodes, rank = batch.num_decodes, kv_b.shape[2]
        nope = q.shape[2] - (latent.shape[1] - rank)
        if not batch.by_length and long_prompts.fill(prompts := self._long_prompts(q.dtype), q.shape[0]):
            return attend_latent_prompts(q, latent, expand_all(latent, kv_b), rank, scale, len(prompts))
        out = torch.empty(*q.shape[:2], kv_b.shape[1] - nope, dtype=q.dtype, device=q.device)
        if batch.by_length:
            tiles, starts = self._latent_tiles(q), batch.query_starts
            q_latent, q_rope = absorb(q, kv_b, nope), q[:, :, nope:]
            mixed = mla_mixed(q_latent, q_rope, pool, batch.block_tables, batch.kv_lens, starts, tiles, scale)
            expand(mixed, kv_b, nope, out)
            return out
        if decodes:
            self._decode_latent(q[:decodes], kv_b, nope, pool, scale, out[:decodes])
        if batch.num_queries > decodes:
            self._latent_chunks(out, q, latent, kv_b, pool, scale)
        return out

    def _decode_latent(
        self, q: torch.Tensor, kv_b: torch.Tensor, nope: int, pool: torch.Tensor, scale: float, out: torch.Tensor
    ) -> None:
        batch, (decodes, heads) = self._batch, q.shape[:2]
        splits = decode_splits(decodes, heads, self._num_processors, q.dtype)
        alone = splits > 1 and is_alone(decodes, heads)
        q_latent = absorb_few(q, kv_b, nope) if alone else absorb(q, kv_b, nope)
        parts = mla_decode(q_latent, q[..., nope:], pool, batch.block_tables, batch.kv_lens, scale, splits)
        if alone:
            merge_expand(*parts, kv_b, nope, out)
        else:
            expand(merge(parts, q.dtype), kv_b, nope, out)

    def _latent_tiles(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For `mla_mixed`: made once a step, for all layers."""
        tile_q = latent_tile_tokens(q.shape[1], q.dtype)
        if tile_q not in self._tiles:
            self._tiles[tile_q] = map_tiles(self._batch.query_starts, q.shape[0], tile_q, least=1)
        tiles = self._tiles[tile_q]
        assert tiles is not None
        return tiles

    def _latent_chunks(
        self, out: torch.Tensor, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pool: torch.Tensor, scale: float
    ) -> None:
        batch, (heads, width, rank) = self._batch, kv_b.shape
        tile, prompts = choose_tile(q.dtype), self._long_prompts(q.dtype)
        if self._groups is None:
            self._groups = plan_groups(batch, prompts, tile_q=tile.queries, token_numbers=heads * width)
        for group in self._groups:
            rows = group.rows
            cached = latent[rows.start : rows.stop] if group.slots is None else pool.flatten(0, 1).index_select(0, group.slots)
            expanded = expand_all(cached, kv_b)
            if group.tiles is not None:
                k_rope = cached[:, rank:]
                mla_prefill(out, q, expanded, k_rope, batch.query_starts, batch.kv_lens, group.tiles, scale, tile)
            for span in prompts if group.slots is None else []:
                tokens, part = slice(span.start, span.stop), slice(span.start - rows.start, span.stop - rows.start)
                out[tokens] = attend_latent_prompts(q[tokens], cached[part], expanded[part], rank, scale)

    def _long_prompts(self, dtype: torch.dtype) -> list[range]:
        if self._prompts is None:
            self._prompts = long_prompts.find(self._batch, dtype)
        return self._prompts

    def _query_tiles(self, tile_q: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(query, first token within its chunk) of each tile of the step's other chunks, those with most work first."""
        if tile_q not in self._tiles:
            batch = self._batch
            starts = list(itertools.accumulate(batch.query_lens_host, initial=0))
            elsewhere = {span.start for span in self._long_prompts(dtype)}
            tiles = [
                (query, first)
                for query in range(batch.num_decodes, batch.num_queries)
                if starts[query] not in elsewhere
                for first in range(0, batch.query_lens_host[query], tile_q)
            ]
            if not tiles:
                self._tiles[tile_q] = None
                return None
            tiles.sort(key=lambda t: batch.query_lens_host[t[0]] - batch.kv_lens_host[t[0]] - t[1])
            tiles += [(-1, 0)] * (-len(tiles) % 4)  # the second row begins on 16 bytes
            both = torch.tensor(tiles, dtype=torch.int32).T.contiguous()
            if batch.slots.is_cuda:
                both = both.pin_memory().to(batch.slots.device, non_blocking=True)
            self._tiles[tile_q] = (both[0], both[1])
        return self._tiles[tile_q]


def expand_all(latents: torch.Tensor, kv_b: torch.Tensor) -> torch.Tensor:
    """latents [L, rank + rope] -> every head's key (nope) and value, [L, heads, nope + v_dim], in one product."""
    heads, width, rank = kv_b.shape
    return F.linear(latents[:, :rank], kv_b.flatten(0, 1)).view(-1, heads, width)


def attend_latent_prompts(
    q: torch.Tensor, latents: torch.Tensor, expanded: torch.Tensor, rank: int, scale: float, num: int = 1
) -> torch.Tensor:
    """`long_prompts.attend` of latents [T, rank + rope] and what they expand to -> [T, heads, v_dim]."""
    nope = q.shape[2] - (latents.shape[1] - rank)
    return long_prompts.attend(q, build_keys(expanded, latents, nope, rank), expanded[:, :, nope:], scale, num)
