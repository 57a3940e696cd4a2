"""Warm-up of long prefill chunks: the first chunk of a kind takes longer, so an idle engine runs one of each kind beforehand.

A library plans attention for each length of a chunk and of its context, and loads its code for the first plan (docs/gpu.md).
"""

from __future__ import annotations

import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, LayerPools, WarmupChunk


class PromptWarmup:
    """Runs one warm-up chunk at a time, each as a step of its own without a graph.

    A chunk's KV goes to the scratch block, which also stands for all blocks of its context.
    """

    def __init__(
        self,
        backend: Backend,
        kv: list[LayerPools],
        *,
        scratch_block: int,
        block_size: int,
        max_tokens: int,
        max_len: int,
        device: torch.device,
    ) -> None:
        """`max_tokens` is the longest chunk that one step may hold, and `max_len` the longest context, both in tokens."""
        self._backend = backend
        self._kv = kv
        self._scratch_block = scratch_block
        self._block_size = block_size
        self._device = device
        self._chunks = backend.warmup_chunks(max_tokens, max_len)

    def run_next(self) -> bool:
        """Run the next warm-up chunk, in one layer of each kind, and wait until it is done.

        Returns False, and runs nothing, if no chunk is left.

        A request that arrives meanwhile waits for one chunk at most.
        """
        if not self._chunks:
            return False
        self._backend.rehearse(self._batch(self._chunks.pop(0)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return True

    def _batch(self, chunk: WarmupChunk) -> ForwardBatch:
        scratch, device, length = self._scratch_block, self._device, chunk.cached + chunk.num
        positions = torch.arange(chunk.cached, length, device=device)
        tables = torch.full((1, -(-length // self._block_size)), scratch, dtype=torch.int32, device=device)
        return ForwardBatch(
            token_ids=torch.zeros(chunk.num, dtype=torch.int64, device=device),
            positions=positions,
            slots=scratch * self._block_size + positions % self._block_size,
            query_starts=torch.tensor([0, chunk.num], dtype=torch.int32, device=device),
            kv_lens=torch.tensor([length], dtype=torch.int32, device=device),
            block_tables=tables,
            num_decodes=0,
            query_lens_host=[chunk.num],
            kv_lens_host=[length],
            kv=self._kv,
        )
