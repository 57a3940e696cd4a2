"""Grouped-query attention in plain torch. CPUs run this implementation, and it is the plain twin of `triton_gqa.py`.

`torch_step.py` plans a step.
"""

from __future__ import annotations

import torch

from engine.attention.torch_step import GatheredStep, TorchPaged, attend_chunk
from engine.batch import ForwardBatch, LayerPools


class TorchGqa(TorchPaged):
    """Grouped-query attention in plain torch, on any device. Implements PagedGqa."""

    def prepare(self, batch: ForwardBatch) -> TorchGqaStep:
        return TorchGqaStep(GatheredStep.of(batch))


class TorchGqaStep:
    """Grouped-query attention for the tokens of one step, in plain torch. Implements GqaStep."""

    def __init__(self, step: GatheredStep) -> None:
        self._step = step

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: LayerPools, *, scale: float) -> torch.Tensor:
        step, decodes = self._step, self._step.num_decodes
        if not step.chunks:
            return step.decode(q, pools["k"], pools["v"], scale)
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        if decodes:
            out[:decodes] = step.decode(q[:decodes], pools["k"], pools["v"], scale)
        for chunk in step.chunks:
            span = slice(chunk.begin, chunk.end)
            keys = k[span].transpose(0, 1) if chunk.source is None else chunk.source.read(pools["k"])[0]  # [kv_heads, L, dim]
            values = v[span].transpose(0, 1) if chunk.source is None else chunk.source.read(pools["v"])[0]
            out[span] = attend_chunk(q[span], keys, values, chunk.mask, scale)
        return out
