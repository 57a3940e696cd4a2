"""Qwen3-MoE: Qwen3's attention, and a mixture of experts instead of the MLP in most or all layers."""

from __future__ import annotations

from engine.models.base import Mlp
from engine.models.dense import DenseModel
from engine.models.experts import make_mlp


class Qwen3MoeModel(DenseModel):
    def make_mlp(self, index: int) -> Mlp:
        return make_mlp(self.spec, index, dtype=self.dtype, device=self.device)
