"""Multi-head latent attention on CUDA, by our Triton kernels and cuDNN. `torch_mla.py` is the plain twin.

decodes               in latent space, from the KV pool: `kernels/mla_decode.py` between two products of `latent_products.py`
chunks                over latents expanded to keys and values: `kernels/mla_prefill.py`, planned by `latent_chunks.py`
long whole prompts    over expanded latents too, by cuDNN (`long_prompts.py`), outside CUDA graphs
long cached contexts  likewise, segment by segment (`cached_context.py`): long chunks behind a long context
captured mixed steps  in a CUDA graph all queries attend in latent space: `kernels/mla_mixed.py` reads lengths on the device
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.attention import cached_context, long_prompts
from engine.attention.cached_context import LongChunks
from engine.attention.latent_chunks import LatentGroup, plan_groups
from engine.attention.plans import Plans
from engine.batch import ForwardBatch, LayerPools, WarmupChunk
from engine.kernels.latent_products import absorb, absorb_few, build_keys, expand, merge_expand
from engine.kernels.mla_decode import decode_splits, is_alone, merge, mla_decode
from engine.kernels.mla_mixed import mla_mixed, tile_tokens
from engine.kernels.mla_prefill import choose_tile, mla_prefill
from engine.kernels.query_tiles import Tiles, map_tiles


class TritonMla:
    """Multi-head latent attention on CUDA, by Triton kernels and cuDNN. Implements PagedMla."""

    graphable = True
    # A graph cannot expand the latents of chunks, and without expansion a large chunk costs more arithmetic than a graph saves.
    graph_tokens = 1024

    def __init__(self, num_processors: int) -> None:
        """`num_processors` is the number of multiprocessors. It decides into how many splits a decode's sequence is cut."""
        self._num_processors = num_processors
        self.plans = Plans()

    def prepare(self, batch: ForwardBatch) -> TritonMlaStep:
        return TritonMlaStep(batch, self._num_processors, self.plans)

    def allow_plans(self, allowed: bool) -> None:
        self.plans.on_demand = allowed

    def warmup_chunks(self, max_tokens: int, max_len: int, dtype: torch.dtype) -> list[WarmupChunk]:
        whole = [WarmupChunk(num) for num in long_prompts.warmup_lengths(max_tokens, dtype)]
        return whole + cached_context.warmup_chunks(max_tokens, max_len, dtype)


class TritonMlaStep:
    """Multi-head latent attention of one step on CUDA. Implements MlaStep.

    The call of the first layer plans tiles, groups of latents and long chunks. The calls of later layers reuse all of these.
    """

    def __init__(self, batch: ForwardBatch, num_processors: int, plans: Plans) -> None:
        self._batch = batch
        self._plans = plans
        self._num_processors = num_processors
        self._tiles: dict[int, Tiles] = {}  # of a captured step; the key is a tile's tokens
        self._groups: list[LatentGroup] | None = None
        self._long: LongChunks | None = None

    def attend(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        batch, pool = self._batch, pools["latent"]
        decodes, rank = batch.num_decodes, kv_b.shape[2]
        nope = q.shape[2] - (latent.shape[1] - rank)
        if not batch.by_length and (prompts := self._long_chunks(q, kv_b, nope).prompts).together:
            return attend_prompts(q, latent, expand_all(latent, kv_b), rank, scale, len(prompts.tokens))
        out = torch.empty(*q.shape[:2], kv_b.shape[1] - nope, dtype=q.dtype, device=q.device)
        if batch.by_length:
            self._captured(q, kv_b, nope, pool, scale, out)
            return out
        if decodes:
            self._decode(q[:decodes], kv_b, nope, pool, scale, out[:decodes])
        if batch.num_queries > decodes:
            self._chunks(out, q, latent, kv_b, pool, scale)
        return out

    def _captured(
        self, q: torch.Tensor, kv_b: torch.Tensor, nope: int, pool: torch.Tensor, scale: float, out: torch.Tensor
    ) -> None:
        """Attend in latent space from all queries of a step captured in a CUDA graph, and write the result into `out`."""
        batch, tile_q = self._batch, tile_tokens(q.shape[1], q.dtype)
        if tile_q not in self._tiles:
            self._tiles[tile_q] = map_tiles(batch.query_starts, q.shape[0], tile_q, least=1)
        q_latent, q_rope, tiles = absorb(q, kv_b, nope), q[:, :, nope:], self._tiles[tile_q]
        mixed = mla_mixed(q_latent, q_rope, pool, batch.block_tables, batch.kv_lens, batch.query_starts, tiles, scale)
        expand(mixed, kv_b, nope, out)

    def _decode(
        self, q: torch.Tensor, kv_b: torch.Tensor, nope: int, pool: torch.Tensor, scale: float, out: torch.Tensor
    ) -> None:
        """Attend from the step's D decodes, q [D, heads, nope + rope], and write the result into `out` [D, heads, v_dim]."""
        batch, (decodes, heads) = self._batch, q.shape[:2]
        splits = decode_splits(decodes, heads, self._num_processors, q.dtype)
        alone = splits > 1 and is_alone(decodes, heads)
        q_latent = absorb_few(q, kv_b, nope) if alone else absorb(q, kv_b, nope)
        parts = mla_decode(q_latent, q[..., nope:], pool, batch.block_tables, batch.kv_lens, scale, splits)
        if alone:
            merge_expand(*parts, kv_b, nope, out)
        else:
            expand(merge(parts, q.dtype), kv_b, nope, out)

    def _chunks(
        self, out: torch.Tensor, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pool: torch.Tensor, scale: float
    ) -> None:
        """Attend from the step's prefill chunks, and write the result into the chunks' rows of `out` [T, heads, v_dim]."""
        batch, (heads, width, rank) = self._batch, kv_b.shape
        nope = q.shape[2] - (latent.shape[1] - rank)
        tile, long = choose_tile(q.dtype), self._long_chunks(q, kv_b, nope)
        if self._groups is None:
            self._groups = plan_groups(batch, long.tokens, tile_q=tile.queries, token_numbers=heads * width)
        for group in self._groups:
            rows = group.rows
            cached = latent[rows.start : rows.stop] if group.slots is None else pool.flatten(0, 1).index_select(0, group.slots)
            expanded = expand_all(cached, kv_b)
            if group.tiles is not None:
                k_rope = cached[:, rank:]
                mla_prefill(out, q, expanded, k_rope, batch.query_starts, batch.kv_lens, group.tiles, scale, tile)
            for prompt in long.prompts.tokens if group.slots is None else []:
                tokens, own = slice(prompt.start, prompt.stop), slice(prompt.start - rows.start, prompt.stop - rows.start)
                out[tokens] = attend_prompts(q[tokens], cached[own], expanded[own], rank, scale)
        for chunk in long.cached:
            tokens, gather = slice(chunk.tokens.start, chunk.tokens.stop), self._gatherer(chunk.query, pool, kv_b, nope)
            cached_context.attend(q[tokens], chunk.cached, gather, scale, out[tokens])

    def _gatherer(self, query: int, pool: torch.Tensor, kv_b: torch.Tensor, nope: int) -> cached_context.Gather:
        """Make a function that reads a range of a sequence's latents from the KV pool and expands them to keys and values."""
        table, block_size, rank = self._batch.block_tables[query], pool.shape[1], kv_b.shape[2]

        def gather(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = table[first // block_size : -(-last // block_size)]
            latents = pool.index_select(0, blocks).flatten(0, 1)[: last - first]
            expanded = expand_all(latents, kv_b)
            return build_keys(expanded, latents, nope, rank), expanded[:, :, nope:]

        return gather

    def _long_chunks(self, q: torch.Tensor, kv_b: torch.Tensor, nope: int) -> LongChunks:
        if self._long is None:
            self._long = cached_context.find_long(self._batch, q.dtype, q.shape[2], kv_b.shape[1] - nope, self._plans)
        return self._long


def expand_all(latents: torch.Tensor, kv_b: torch.Tensor) -> torch.Tensor:
    """Expand records [L, rank + rope] to every head's key [nope] and value, [L, heads, nope + v_dim], in one product."""
    heads, width, rank = kv_b.shape
    return F.linear(latents[:, :rank], kv_b.flatten(0, 1)).view(-1, heads, width)


def attend_prompts(
    q: torch.Tensor, latents: torch.Tensor, expanded: torch.Tensor, rank: int, scale: float, num: int = 1
) -> torch.Tensor:
    """Attend causally within each of `num` prompts of one length, by `long_prompts.attend` -> [T, heads, v_dim].

    latents [T, rank + rope] are the prompts' records. expanded [T, heads, nope + v_dim] is the result of `expand_all` for them.
    """
    nope = q.shape[2] - (latents.shape[1] - rank)
    return long_prompts.attend(q, build_keys(expanded, latents, nope, rank), expanded[:, :, nope:], scale, num)
