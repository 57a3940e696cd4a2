"""DeepSeek-V3's multi-token prediction (MTP): one more decoder layer, which guesses the token after the next one.

    token[i + 1] --embedding, enorm--+
                                     +--cat, eh_proj--> decoder layer at position i --> out
    hidden[i] -----------------hnorm-+
    out --shared_head.norm, head--> logits of token[i + 2]

hidden[i] is the main model's output, final norm included. The layer has KV pools of its own, and attends over its own
positions 0..i. Embedding and head are the main model's; a checkpoint may hold them again under the module's names.

What is computed is what vLLM and SGLang compute, except that vLLM zeroes the embedding at position 0, which was trained like
any other. Only the first module of a checkpoint is here: published ones have no second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from engine.attention.base import PagedMla
from engine.batch import ForwardBatch, PoolSpec
from engine.layers.linear import Linear, Weights
from engine.layers.norm import RMSNorm
from engine.layers.ops import Ops
from engine.layers.rotary import Rotary
from engine.models.base import DecoderLayer, Step, WeightMap
from engine.models.deepseek import DeepseekModel
from engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Shared:
    """What is the main model's. In a dataclass, so that the module does not count, fill or move it as its own."""

    embedding: torch.Tensor  # [V, H]
    lm_head: Linear
    rotary: Rotary
    ops: Ops
    attention: PagedMla


class DeepseekMtp(nn.Module):
    """Run it under `torch.inference_mode()`. Weights are empty until a loader has filled what `weights` lists."""

    def __init__(self, model: DeepseekModel) -> None:
        super().__init__()
        spec, dtype, device = model.spec, model.dtype, model.device
        self.spec = spec
        self._shared = _Shared(model.embedding, model.lm_head, model.rotary, model.ops, model.attention)
        self.embedding_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self.join = Linear(2 * spec.hidden_size, spec.hidden_size, dtype=dtype, device=device)
        index = spec.num_layers
        self.layer = DecoderLayer(spec, model.make_attention(index), model.make_mlp(index), dtype=dtype, device=device)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor, next_ids: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """hidden [T, H] of the main model at the batch's positions, and the tokens that follow them [T] -> out [T, H].

        `batch` is that of the main model's step with `kv` of `kv_pools`; its `token_ids` are not looked at. `out` may stand
        for `hidden` of the next position when more than one token ahead is guessed.
        """
        shared = self._shared
        embedded = self.embedding_norm(F.embedding(next_ids, shared.embedding))
        out: torch.Tensor = self.join(torch.cat((embedded, self.hidden_norm(hidden)), -1))  # [T, H]
        cos, sin = shared.rotary(batch.positions)
        (pools,) = batch.kv
        return self.layer(out, Step(shared.attention.prepare(batch), cos, sin, batch.slots, shared.ops), pools)  # type: ignore[no-any-return]

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """out [N, H] -> [N, V] float32: of the token two after each position."""
        logits: torch.Tensor = self._shared.lm_head(self.norm(out))
        return logits.float()

    def weights(self) -> WeightMap:
        prefix = mtp_prefix(self.spec)
        targets: Weights = {
            f"{prefix}enorm.weight": self.embedding_norm.weight,
            f"{prefix}hnorm.weight": self.hidden_norm.weight,
            f"{prefix}shared_head.norm.weight": self.norm.weight,
            **self.join.weights({f"{prefix}eh_proj": self.spec.hidden_size}),
            **self.layer.weights(prefix),
        }
        copies: Weights = {
            f"{prefix}embed_tokens.weight": self._shared.embedding,
            f"{prefix}shared_head.head.weight": self._shared.lm_head.weight,
        }
        mine = re.escape(prefix)
        return WeightMap(targets, re.compile(rf"(?!{mine}).*|{mine}self_attn\.rotary_emb\.inv_freq"), copies)

    def kv_pools(self) -> list[list[PoolSpec]]:
        """As a model's: of one layer."""
        return [self.layer.attention.pools()]


def mtp_prefix(spec: ModelSpec) -> str:
    """What the names of the module's tensors begin with."""
    return f"model.layers.{spec.num_layers}."
