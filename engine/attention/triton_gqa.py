"""Grouped-query attention on CUDA, by our Triton kernels and cuDNN. `torch_gqa.py` is the plain twin.

decodes               `kernels/paged_decode.py`
chunks                `kernels/paged_prefill.py`, all in one launch
long whole prompts    cuDNN (`long_prompts.py`), outside CUDA graphs
long cached contexts  cuDNN (`cached_context.py`), outside CUDA graphs: long chunks behind a long context
captured mixed steps  both kernels run over all queries of a step in a CUDA graph, and read lengths on the device: a query of one
                      token is a decode
"""

from __future__ import annotations

import itertools

import torch

from engine.attention import cached_context, long_prompts
from engine.attention.cached_context import LongChunks
from engine.attention.plans import Plans
from engine.attention.upload import upload
from engine.batch import ForwardBatch, LayerPools, WarmupChunk
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.kernels.paged_prefill import paged_prefill, tile_tokens
from engine.kernels.query_tiles import Tiles, columns, cut_tiles, map_tiles


class TritonGqa:
    """Grouped-query attention on CUDA, by Triton kernels and cuDNN. Implements PagedGqa."""

    graphable = True
    graph_tokens = 2048  # the kernels of a larger step take longer than their launches, so a graph would gain nothing

    def __init__(self, num_processors: int) -> None:
        """`num_processors` is the number of multiprocessors. It decides into how many parts a decode's sequence is cut."""
        self._num_processors = num_processors
        self.plans = Plans()

    def prepare(self, batch: ForwardBatch) -> TritonGqaStep:
        return TritonGqaStep(batch, self._num_processors, self.plans)

    def allow_plans(self, allowed: bool) -> None:
        self.plans.on_demand = allowed

    def warmup_chunks(self, max_tokens: int, max_len: int, dtype: torch.dtype) -> list[WarmupChunk]:
        whole = [WarmupChunk(num) for num in long_prompts.warmup_lengths(max_tokens, dtype)]
        return whole + cached_context.warmup_chunks(max_tokens, max_len, dtype)


class TritonGqaStep:
    """Grouped-query attention of one step on CUDA. Implements GqaStep.

    The call of the first layer cuts the tiles and finds the long chunks. The calls of later layers reuse both.
    """

    def __init__(self, batch: ForwardBatch, num_processors: int, plans: Plans) -> None:
        self._batch = batch
        self._plans = plans
        self._num_processors = num_processors
        self._tiles: dict[int, Tiles | None] = {}  # the key is a tile's number of tokens; None if no query needs tiles
        self._long: LongChunks | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        batch, k_pool, v_pool = self._batch, pools["k"], pools["v"]
        if batch.by_length:
            return self._attend_captured(q, k_pool, v_pool, scale)
        decodes, heads, kv_heads = batch.num_decodes, q.shape[1], k_pool.shape[2]
        long = self._long_chunks(q)
        prompts = long.prompts
        if prompts.together:
            return long_prompts.attend(q, k, v, scale, len(prompts.tokens))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for prompt in prompts.tokens:
            span = slice(prompt.start, prompt.stop)
            out[span] = long_prompts.attend(q[span], k[span], v[span], scale)
        for chunk in long.cached:
            span, gather = slice(chunk.tokens.start, chunk.tokens.stop), self._gatherer(chunk.query, k_pool, v_pool)
            cached_context.attend(q[span], chunk.cached, gather, scale, out[span])
        tiles = self._chunk_tiles(tile_tokens(heads, kv_heads), long)
        if tiles is not None:
            paged_prefill(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, batch.query_starts, tiles, scale, out)
        if decodes:
            splits = choose_splits(decodes, kv_heads, self._num_processors)
            paged_decode(q[:decodes], k_pool, v_pool, batch.block_tables, batch.kv_lens, scale, splits, out[:decodes])
        return out

    def _attend_captured(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend from a step captured in a CUDA graph: `paged_prefill` takes queries of two or more tokens, `paged_decode` the
        others."""
        batch, heads, kv_heads = self._batch, q.shape[1], k_pool.shape[2]
        tile_q, starts = tile_tokens(heads, kv_heads), batch.query_starts
        tiles = self._tiles.get(tile_q)
        if tiles is None:
            tiles = self._tiles[tile_q] = map_tiles(starts, q.shape[0], tile_q, least=2)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        paged_prefill(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, starts, tiles, scale, out)
        splits = choose_splits(batch.kv_lens.shape[0], kv_heads, self._num_processors)
        return paged_decode(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, scale, splits, out, starts)

    def _long_chunks(self, q: torch.Tensor) -> LongChunks:
        if self._long is None:
            self._long = cached_context.find_long(self._batch, q.dtype, q.shape[2], q.shape[2], self._plans)
        return self._long

    def _gatherer(self, query: int, k_pool: torch.Tensor, v_pool: torch.Tensor) -> cached_context.Gather:
        table, block_size = self._batch.block_tables[query], k_pool.shape[1]

        def gather(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = table[first // block_size : -(-last // block_size)]
            keys, values = (pool.index_select(0, blocks).flatten(0, 1)[: last - first] for pool in (k_pool, v_pool))
            return keys, values

        return gather

    def _chunk_tiles(self, tile_q: int, long: LongChunks) -> Tiles | None:
        """Cut the step's chunks into tiles, except the chunks from which cuDNN attends. Returns None if there are no others."""
        if tile_q not in self._tiles:
            batch = self._batch
            starts = list(itertools.accumulate(batch.query_lens_host, initial=0))
            elsewhere = {span.start for span in long.tokens}
            queries = [query for query in range(batch.num_decodes, batch.num_queries) if starts[query] not in elsewhere]
            tiles = cut_tiles(queries, batch.query_lens_host, batch.kv_lens_host, tile_q)
            if not tiles:
                self._tiles[tile_q] = None
                return None
            self._tiles[tile_q] = Tiles(*upload(columns(tiles), batch.slots.device))
        return self._tiles[tile_q]
