"""The decoder that all model families share: embedding, layers of (attention, MLP) on a residual stream, final norm, head.

A family's file provides the attention and MLP modules of each layer. `weights` maps each checkpoint tensor to its parameter.
`kv_pools` lists what each layer stores per token. The batch is passed down as an argument; a model keeps no state of a step.
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
"""Tensors [T, ...] that an attention module passes from `project` to `attend`."""

StepT = TypeVar("StepT")
"""The kind of attention of a family: GqaStep or MlaStep."""
StepT_contra = TypeVar("StepT_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Step(Generic[StepT]):
    """Per-step values that every layer receives, such as the step's attention and the rotary angles of its positions."""

    attention: StepT  # attends from all tokens, or only from those of `read` if that is set
    cos: torch.Tensor  # [T, 1, rotary dim]: cosines of the rotary angles
    sin: torch.Tensor  # [T, 1, rotary dim]: sines of the rotary angles, the first half negated
    slots: torch.Tensor  # [T] int64: where each token's KV is written in a layer's KV pools
    ops: Ops
    query_scale: torch.Tensor | None = None  # [T, 1, 1]: factor of each token's queries; None: there is none
    read: torch.Tensor | None = None  # [S] int64: tokens that this layer continues with after `project`; None: all


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The tensors that a model's checkpoint must or may hold.

    targets: every tensor that the checkpoint must hold, with the parameter to fill.
    skip: patterns of tensors that the checkpoint may hold and that are not used, each with the reason for the log, or "".
    copies: tensors that the checkpoint may hold a second time, with the parameter that each must equal.
    """

    targets: Weights
    skip: dict[str, str]
    copies: Weights = field(default_factory=dict)


# Patterns of tensors that any checkpoint may hold and that are not used, and why.
UNUSED = {
    r"(model\.layers\.\d+\.self_attn\.|model\.)rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)": "config.json has "
    "the rotary embedding",
    r".*\.self_attn\.([a-z]+_proj\.|attn\.)?(k|v|kv|q|prob)_scale": "scales of an FP8 KV cache; the KV cache has the type of the "
    "computation",
    r"(model\.)?(visual|vision_tower|vision_model|vision_encoder|vision_projection|multi_modal_projector|audio_tower|image_newline"
    r"|vision_language_adapter|pre_mm_projector_norm|patch_merger)\b.*": "parts other than text",
    r"(v_head|value_head|score)\..*": "heads of training and of classifiers",
    r"(model\.)?mtp\..*": "multi-token prediction layers",
}
HEAD = "lm_head.weight"


class Attention(Protocol[StepT_contra]):
    """The interface of a layer's attention module to the decoder."""

    def project(self, hidden: torch.Tensor, norm: Norm, step: Step[Any], pools: LayerPools) -> Projected:
        """Norm hidden [T, H], project it, and write each token's KV to the KV pools. Returns the input of `attend`."""
        ...

    def attend(self, hidden: torch.Tensor, projected: Projected, attention: StepT_contra, pools: LayerPools) -> None:
        """Attend from S tokens, of which `project` made `projected`, and add the output to hidden [S, H] in place."""
        ...

    def weights(self, prefix: str) -> Weights: ...
    def pools(self) -> list[PoolSpec]: ...


class Mlp(Protocol):
    """A feed-forward module. It norms hidden [S, H], and adds its output to hidden in place."""

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
        """Add the attention's output and then the MLP's output to hidden [T, H] in place, and return hidden.

        If the step reads only S of the tokens, the result holds those rows alone: [S, H].
        """
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
    """A decoder-only model. Call it under `torch.inference_mode()`, after a loader has filled what `weights` lists."""

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
        self.spilled_attention: PagedAttention[StepT] = select.spilled(self.kv_pools()[0])

    @property
    def graphable(self) -> bool:
        """Whether a forward of decodes never waits for the device, as a CUDA graph requires. Plain torch experts do wait."""
        return self.attention.graphable and (self.spec.moe is None or can_group(self.dtype, self.device))

    @property
    def graph_tokens(self) -> int:
        """Largest mixed step (decodes and prefill chunks), in tokens, that a CUDA graph may hold; 0 if none can be captured."""
        return self.attention.graph_tokens if self.graphable else 0

    def make_attention(self, index: int) -> Attention[StepT]:
        raise NotImplementedError

    def make_mlp(self, index: int) -> Mlp:
        raise NotImplementedError

    def forward(self, batch: ForwardBatch, only: Sequence[int] | None = None) -> torch.Tensor:
        """Run the layers and the final norm -> hidden [T, H], or [S, H] if the batch reads only S tokens.

        The KV of all T tokens is written to the KV pools of `batch`. `only` lists the layers to run, by default all of them.
        """
        hidden = F.embedding(batch.token_ids, self.embedding)
        cos, sin = self.rotary(batch.positions)
        attention = self.attention if batch.spilled is None else self.spilled_attention
        step = Step(attention.prepare(batch), cos, sin, batch.slots, self.ops, self.rotary.query_scale(batch.positions))
        layers = list(zip(self.layers, batch.kv, strict=True))
        *others, last = layers if only is None else [layers[i] for i in only]
        for layer, pools in others:
            hidden = layer(hidden, step, pools)
        if batch.read is not None:
            step = replace(step, attention=attention.prepare(batch.read.batch), read=batch.read.index)
        layer, pools = last
        hidden = layer(hidden, step, pools)
        return self.ops.norm(hidden, *self.norm.params) if hidden.shape[0] else hidden

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the head to hidden [N, H] -> logits [N, V]. The logits are written to `out` if that is given."""
        return linear(hidden, self.lm_head.weight, out=out)

    @property
    def head_is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.lm_head.weight is self.embedding

    def untie_head(self) -> None:
        """Give the head a weight of its own, which the loader then fills."""
        shape = self.embedding.shape
        self.lm_head.weight = parameter(*shape, dtype=self.embedding.dtype, device=self.embedding.device)

    def weights(self) -> WeightMap:
        targets: Weights = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        skip = dict(UNUSED)
        if self.head_is_tied:
            skip[re.escape(HEAD)] = ""  # equal to the embedding: the loader has compared the two
        else:
            targets[HEAD] = self.lm_head.weight
        for i, layer in enumerate(self.decoder_layers()):
            targets |= layer.weights(f"model.layers.{i}.")
        if self.spec.num_mtp_layers:
            extra = "|".join(str(self.spec.num_layers + i) for i in range(self.spec.num_mtp_layers))
            skip[rf"model\.layers\.({extra})\..*"] = "multi-token prediction layers"
        return WeightMap(targets, skip)

    def kv_pools(self) -> list[list[PoolSpec]]:
        return [layer.attention.pools() for layer in self.decoder_layers()]

    def distinct_layers(self) -> list[int]:
        """List the index of one layer of each kind, and the last layer, which computes only the tokens that are read.

        Layers of one kind have the same modules with the same shapes and values, and so launch the same kernels.
        """
        *others, last = range(len(self.layers))
        kinds = {_kind(self.layers[i]): i for i in reversed(others)}
        return [*sorted(kinds.values()), last]

    def decoder_layers(self) -> list[DecoderLayer[StepT]]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return what two layers of one kind have in common: the shapes of their parameters, and their modules' own settings."""
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    settings = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, tuple)) and key != "training"
    )
    return shapes, settings
