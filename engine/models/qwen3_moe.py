"""Qwen3-MoE: Qwen3's attention, and a mixture of experts instead of the MLP in most or all layers."""

from __future__ import annotations

from engine.layers.moe import MoeMlp
from engine.models.base import Mlp
from engine.models.dense import DenseModel


class Qwen3MoeModel(DenseModel):
    def make_mlp(self, index: int) -> Mlp:
        moe = self.spec.moe
        if moe is None or index not in moe.layers:
            return super().make_mlp(index)
        return MoeMlp(
            moe.routing,
            self.spec.hidden_size,
            moe.intermediate_size,
            router_dtype=self.dtype,
            dtype=self.dtype,
            device=self.device,
        )
