"""The decoder that all families share: embedding, layers of (attention, MLP) on a residual stream, final norm, head.

A family's file brings the attention and MLP modules of each layer. `weights` says where each tensor of a checkpoint goes;
`kv_pools` what a layer keeps of a token. A batch goes down as an argument; nothing of a step is kept here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from engine.attention import select
from engine.attention.base import PagedAttention
from engine.batch import ForwardBatch, LayerPools, PoolSpec
from engine.layers.linear import Linear, Norm, Weights, linear, parameter
from engine.layers.moe import can_group
from engine.layers.norm import RMSNorm
from engine.layers.ops import Ops, ops_for
from engine.layers.rotary import Rotary
from engine.models.spec import ModelSpec

Projected = Sequence[torch.Tensor]
"""What a family's attention hands from one of its halves to the other, each [T, ...]."""

StepT = TypeVar("StepT")
"""The kind of attention of a family: GqaStep or MlaStep."""
StepT_contra = TypeVar("StepT_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Step(Generic[StepT]):
    """What every layer of one forward is handed: the batch's attention and the angles of its positions."""

    attention: StepT  # of the tokens of `read` alone, where that is set
    cos: torch.Tensor  # [T, 1, rotary dim]
    sin: torch.Tensor  # likewise, signed for `rotate`
    slots: torch.Tensor  # [T] int64: where each token's records go in a layer's pools
    ops: Ops
    read: torch.Tensor | None = None  # [S] int64: the tokens that attend and go on; None: all do


@dataclass(frozen=True, slots=True)
class WeightMap:
    """`targets`: every tensor the checkpoint must hold. `skip`: those it may hold and we know we do not need. `copies`: those
    it may hold a second time, and what they must then be equal to."""

    targets: Weights
    skip: re.Pattern[str]
    copies: Weights = field(default_factory=dict)


class Attention(Protocol[StepT_contra]):
    """An attention module, as the decoder sees it."""

    def project(self, hidden: torch.Tensor, norm: Norm, step: Step[Any], pools: LayerPools) -> Projected:
        """Of the norm of hidden [T, H]: what attention takes of each token. Its records are then in the pools."""
        ...

    def attend(self, hidden: torch.Tensor, projected: Projected, attention: StepT_contra, pools: LayerPools) -> None:
        """Add to hidden [S, H], in place, what attention makes of the same tokens' `projected`."""
        ...

    def weights(self, prefix: str) -> Weights: ...
    def pools(self) -> list[PoolSpec]: ...


class Mlp(Protocol):
    """It adds to hidden [S, H], in place, what it makes of its norm."""

    def __call__(self, hidden: torch.Tensor, norm: Norm, ops: Ops) -> None: ...
    def weights(self, prefix: str) -> Weights: ...


class DecoderLayer(nn.Module, Generic[StepT]):
    def __init__(
        self, spec: ModelSpec, attention: Attention[StepT], mlp: Mlp, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self.post_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self.attention = attention
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor, step: Step[StepT], pools: LayerPools) -> torch.Tensor:
        """hidden [T, H] -> itself, with what attention and then the MLP make of it added in place; or rows [S, H] of it, where
        the step reads only those."""
        projected = self.attention.project(hidden, self.input_norm.params, step, pools)
        if step.read is not None:
            hidden, *projected = (x.index_select(0, step.read) for x in (hidden, *projected))
        if hidden.shape[0]:
            self.attention.attend(hidden, projected, step.attention, pools)
            self.mlp(hidden, self.post_norm.params, step.ops)
        return hidden

    def weights(self, prefix: str) -> Weights:
        return {
            f"{prefix}input_layernorm.weight": self.input_norm.weight,
            f"{prefix}post_attention_layernorm.weight": self.post_norm.weight,
            **self.attention.weights(f"{prefix}self_attn."),
            **self.mlp.weights(f"{prefix}mlp."),
        }


class DecoderModel(nn.Module, Generic[StepT]):
    """Run it under `torch.inference_mode()`. Weights are empty until a loader has filled what `weights` lists."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.ops = ops_for(device, spec.head_dim if spec.mla is None else spec.mla.rope_dim)
        self.embedding = parameter(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, self.make_attention(i), self.make_mlp(i), dtype=dtype, device=device)
            for i in range(spec.num_layers)
        )
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, dtype=dtype, device=torch.device("meta"))
        if spec.tie_embeddings:
            self.lm_head.weight = self.embedding
        else:
            self.lm_head.weight = parameter(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self.rotary = Rotary(spec.rope, device=device)
        self.attention: PagedAttention[StepT] = select.plain(self.kv_pools()[0])

    @property
    def graphable(self) -> bool:
        """Whether a forward of decodes never waits for the device: see `run_experts` for what may."""
        return self.attention.graphable and (self.spec.moe is None or can_group(self.dtype, self.device))

    @property
    def graph_tokens(self) -> int:
        """Largest mixed step (decodes and prefill chunks), in tokens, that a CUDA graph may hold; 0 if none can be captured."""
        return self.attention.graph_tokens if self.graphable else 0

    def make_attention(self, index: int) -> Attention[StepT]:
        raise NotImplementedError

    def make_mlp(self, index: int) -> Mlp:
        raise NotImplementedError

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """-> hidden [T, H], or [S, H] of the tokens that are read, final norm applied. Writes this step's KV into the pools of
        `batch`."""
        hidden = F.embedding(batch.token_ids, self.embedding)
        cos, sin = self.rotary(batch.positions)
        step = Step(self.attention.prepare(batch), cos, sin, batch.slots, self.ops)
        *others, last = zip(self.layers, batch.kv, strict=True)
        for layer, pools in others:
            hidden = layer(hidden, step, pools)
        if batch.read is not None:
            step = replace(step, attention=self.attention.prepare(batch.read.batch), read=batch.read.index)
        layer, pools = last
        hidden = layer(hidden, step, pools)
        return self.ops.norm(hidden, *self.norm.params) if hidden.shape[0] else hidden

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [N, H] -> [N, V], in `out` where given"""
        return linear(hidden, self.lm_head.weight, out=out)

    def weights(self) -> WeightMap:
        targets: Weights = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        skip = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
        if self.spec.tie_embeddings:
            skip.append(r"lm_head\.weight")
        else:
            targets["lm_head.weight"] = self.lm_head.weight
        for i, layer in enumerate(self.decoder_layers()):
            targets |= layer.weights(f"model.layers.{i}.")
        return WeightMap(targets, re.compile("|".join([*skip, *self.skipped()])))

    def skipped(self) -> list[str]:
        """Patterns of further tensors a checkpoint of this family may hold that are not used."""
        return []

    def kv_pools(self) -> list[list[PoolSpec]]:
        return [layer.attention.pools() for layer in self.decoder_layers()]

    def decoder_layers(self) -> list[DecoderLayer[StepT]]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
