"""GLM-4-MoE: grouped-query attention that rotates a part of each head, and the experts of DeepSeek-V3."""

from __future__ import annotations

from engine.models.base import Mlp
from engine.models.dense import DenseModel
from engine.models.experts import make_mlp


class Glm4MoeModel(DenseModel):
    def make_mlp(self, index: int) -> Mlp:
        return make_mlp(self.spec, index, dtype=self.dtype, device=self.device)
