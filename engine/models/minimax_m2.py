"""MiniMax-M2: attention that rotates a part of each head and norms q and k over all heads together; experts in all layers."""

from __future__ import annotations

from engine.layers.linear import Weights
from engine.layers.moe import MoeMlp
from engine.models.base import Mlp
from engine.models.dense import DenseModel
from engine.models.experts import make_mlp

EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class MiniMaxExperts(MoeMlp):
    def weights(self, prefix: str) -> Weights:
        """Name the tensors as this family's checkpoints do: block_sparse_moe.experts.0.w1.weight."""
        out: Weights = {}
        for name, target in super().weights(prefix.removesuffix("mlp.") + "block_sparse_moe.").items():
            name = name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias")
            for ours, theirs in EXPERT_NAMES.items():
                name = name.replace(f".{ours}.weight", f".{theirs}.weight")
            out[name] = target
        return out


class MiniMaxM2Model(DenseModel):
    def make_mlp(self, index: int) -> Mlp:
        return make_mlp(self.spec, index, dtype=self.dtype, device=self.device, experts=MiniMaxExperts)
