"""Warm-up of long prompts: the first prompt of a kind takes longer, so an idle engine runs one of each kind beforehand.

A library plans attention for each prompt length, and loads its code for the first plan (docs/gpu.md).
"""

from __future__ import annotations

import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, LayerPools


class PromptWarmup:
    """Runs one warm-up prompt at a time, each as a step of its own without a graph. Their KV goes to the scratch block."""

    def __init__(
        self,
        backend: Backend,
        kv: list[LayerPools],
        *,
        scratch_block: int,
        block_size: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """`max_tokens` is the longest prompt that one step may hold."""
        self._backend = backend
        self._kv = kv
        self._scratch_block = scratch_block
        self._block_size = block_size
        self._device = device
        self._lengths = backend.prompt_lengths(max_tokens)

    def run_next(self) -> bool:
        """Run the next prompt and wait for it, so that a request that arrives meanwhile waits for one prompt at most. Returns
        False, and runs nothing, if none is left."""
        if not self._lengths:
            return False
        self._backend.forward(self._batch(self._lengths.pop(0)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return True

    def _batch(self, length: int) -> ForwardBatch:
        scratch, device = self._scratch_block, self._device
        positions = torch.arange(length, device=device)
        tables = torch.full((1, -(-length // self._block_size)), scratch, dtype=torch.int32, device=device)
        return ForwardBatch(
            token_ids=torch.zeros(length, dtype=torch.int64, device=device),
            positions=positions,
            slots=scratch * self._block_size + positions % self._block_size,
            query_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
            kv_lens=torch.tensor([length], dtype=torch.int32, device=device),
            block_tables=tables,
            num_decodes=0,
            query_lens_host=[length],
            kv_lens_host=[length],
            kv=self._kv,
        )
