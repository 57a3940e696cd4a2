"""DeepSeek-V3's multi-token prediction (MTP): one more decoder layer, which predicts the token after the next one.

    token[i + 1] --embedding, enorm--+
                                     +--cat, eh_proj--> decoder layer at position i --> out
    hidden[i] -----------------hnorm-+
    out --shared_head.norm, head--> logits of token[i + 2]

hidden[i] is the main model's output after the final norm. The MTP layer has KV pools of its own and attends over its own
positions 0..i. It uses the main model's embedding and head. A checkpoint may hold both again under the module's names.

vLLM and SGLang compute the same, except that vLLM zeroes the embedding at position 0, although it was trained like any other.
Only the first MTP module of a checkpoint is supported; published checkpoints have no second.
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
    """The parts of the main model that the MTP module uses.

    A dataclass holds them, so that torch does not register them as parts of the MTP module.
    """

    embedding: torch.Tensor  # [V, H]: the embedding's weight
    lm_head: Linear
    rotary: Rotary
    ops: Ops
    attention: PagedMla


class DeepseekMtp(nn.Module):
    """The multi-token prediction module. Call it under `torch.inference_mode()`, after a loader has filled its weights."""

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
        """Run the MTP module on the main model's hidden [T, H] and the token after each position [T] -> out [T, H].

        `batch` is the main model's batch, with the KV pools of this module in `kv`. Its `token_ids` are not read. To predict
        further ahead, pass `out` as the `hidden` of the next position.
        """
        shared = self._shared
        embedded = self.embedding_norm(F.embedding(next_ids, shared.embedding))
        out: torch.Tensor = self.join(torch.cat((embedded, self.hidden_norm(hidden)), -1))  # [T, H]
        cos, sin = shared.rotary(batch.positions)
        (pools,) = batch.kv
        return self.layer(out, Step(shared.attention.prepare(batch), cos, sin, batch.slots, shared.ops), pools)  # type: ignore[no-any-return]

    def logits(self, out: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, V] float32 of the token two positions ahead, from out [N, H]."""
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
        return WeightMap(targets, {rf"(?!{mine}).*|{mine}self_attn\.rotary_emb\.inv_freq": ""}, copies)

    def kv_pools(self) -> list[list[PoolSpec]]:
        """Describe the KV pools of the MTP module's one layer, in the form of `DecoderModel.kv_pools`."""
        return [self.layer.attention.pools()]


def mtp_prefix(spec: ModelSpec) -> str:
    """Return the prefix of the names that the MTP module's tensors have in a checkpoint."""
    return f"model.layers.{spec.num_layers}."
