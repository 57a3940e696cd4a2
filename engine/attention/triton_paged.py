"""Paged attention by our Triton kernels: the CUDA backend. `torch_ref.py` is its twin.

Decodes of K/V and of latents read the paged pools directly, and so do chunks of K/V. A chunk of latent attention is
expanded to keys and values as in the twin, whose code it shares.
"""

from __future__ import annotations

import torch

from engine.attention.torch_ref import TorchStepAttention, absorb, expand_output, prepare_chunks
from engine.batch import ForwardBatch, LayerPools
from engine.kernels.elementwise import write_kv
from engine.kernels.mla_decode import mla_decode
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.kernels.paged_prefill import paged_prefill, tile_tokens


class TritonAttention:
    """AttentionBackend."""

    graphable = True

    def __init__(self, num_processors: int) -> None:
        """`num_processors`: of the device, which decides into how many parts a sequence is cut."""
        self._num_processors = num_processors

    def prepare(self, batch: ForwardBatch) -> TritonStepAttention:
        return TritonStepAttention(batch, self._num_processors)


class TritonStepAttention:
    """StepAttention."""

    def __init__(self, batch: ForwardBatch, num_processors: int) -> None:
        self._batch = batch
        self._num_processors = num_processors
        self._tiles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by tokens a tile
        self._chunks: TorchStepAttention | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        batch, k_pool, v_pool = self._batch, pools["k"], pools["v"]
        write_kv(k, v, batch.slots, k_pool, v_pool)
        decodes, heads, kv_heads = batch.num_decodes, q.shape[1], k_pool.shape[2]
        out = None
        if batch.num_queries > decodes:
            tiles = self._query_tiles(tile_tokens(heads, kv_heads))
            out = paged_prefill(q, k_pool, v_pool, batch.block_tables, batch.kv_lens, batch.query_starts, tiles, scale)
        if decodes:
            splits = choose_splits(decodes, kv_heads, self._num_processors)
            decoded = paged_decode(q[:decodes], k_pool, v_pool, batch.block_tables, batch.kv_lens, scale, splits)
            if out is None:
                return decoded
            out[:decodes] = decoded
        assert out is not None
        return out

    def attend_latent(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        batch, pool = self._batch, pools["latent"]
        pool.flatten(0, 1).index_copy_(0, batch.slots, latent)
        decodes, rank = batch.num_decodes, kv_b.shape[2]
        nope = q.shape[2] - (latent.shape[1] - rank)
        out = torch.empty(*q.shape[:2], kv_b.shape[1] - nope, dtype=q.dtype, device=q.device)
        if decodes:
            absorbed = absorb(q[:decodes], kv_b, nope)
            splits = choose_splits(decodes, 1, self._num_processors)
            mixed = mla_decode(absorbed, pool, batch.block_tables, batch.kv_lens, scale, rank, splits)
            out[:decodes] = expand_output(mixed, kv_b, nope)
        if batch.num_queries > decodes:
            self._chunks = self._chunks or prepare_chunks(batch)
            self._chunks.latent_chunks(out, q, latent, kv_b, pool, scale=scale)
        return out

    def _query_tiles(self, tile_q: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(query, first token within its chunk) of each tile of the step's chunks, those with most work first."""
        if tile_q not in self._tiles:
            batch = self._batch
            tiles = [
                (query, first)
                for query in range(batch.num_decodes, batch.num_queries)
                for first in range(0, batch.query_lens_host[query], tile_q)
            ]
            tiles.sort(key=lambda t: batch.query_lens_host[t[0]] - batch.kv_lens_host[t[0]] - t[1])
            both = torch.tensor(tiles, dtype=torch.int32).T.contiguous()
            if batch.slots.is_cuda:
                both = both.pin_memory().to(batch.slots.device, non_blocking=True)
            self._tiles[tile_q] = (both[0], both[1])
        return self._tiles[tile_q]
