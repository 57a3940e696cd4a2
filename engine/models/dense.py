"""Llama, Mistral, Ministral 3, Qwen2, Qwen3, SmolLM3 and Seed-OSS: grouped-query attention and a gated MLP.

These architectures differ in fields of the spec: biases on q, k and v (Qwen2, Seed-OSS), a bias on o, norms on q and k (Qwen3),
layers without rotary embedding (SmolLM3), and queries that grow far into a long context (Ministral 3). `GqaAttention` also serves
families with experts, of which some rotate a part of each head, or norm q and k over all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.attention.base import GqaStep
from engine.batch import LayerPools, PoolSpec
from engine.layers.linear import Linear, Norm, Weights
from engine.layers.mlp import GatedMlp
from engine.layers.norm import RMSNorm
from engine.models.base import Attention, DecoderModel, Mlp, Projected, Step
from engine.models.spec import ModelSpec


class GqaAttention(nn.Module):
    def __init__(self, spec: ModelSpec, *, rotary: bool = True, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if rotary and spec.rope.interleaved:
            raise ValueError("GqaAttention rotates the halves of a head, but the ModelSpec asks for interleaved pairs")
        self.rotary = rotary
        self.dtype = dtype
        self.head_dim = spec.head_dim
        self.scale = spec.head_dim**-0.5
        self.norm_eps = spec.norm_eps
        self.q_size, self.kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv_proj = Linear(spec.hidden_size, self.q_size + 2 * self.kv_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.o_proj = Linear(self.q_size, spec.hidden_size, bias=spec.o_bias, dtype=dtype, device=device)
        self.norm_all = spec.qk_norm_all
        self.q_norm = _head_norm(spec, self.q_size, dtype=dtype, device=device)
        self.k_norm = _head_norm(spec, self.kv_size, dtype=dtype, device=device)

    def project(self, hidden: torch.Tensor, norm: Norm, step: Step[Any], pools: LayerPools) -> Projected:
        qkv = self.qkv_proj.of_norm(hidden, norm, step.ops)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        if norms is not None and self.norm_all:
            q, k, _ = torch.split(qkv, [self.q_size, self.kv_size, self.kv_size], -1)
            for part, part_norm in zip((q, k), norms, strict=True):
                part.copy_(step.ops.norm(part, *part_norm.params))
        heads = qkv.view(hidden.shape[0], -1, self.head_dim)  # [T, q, k and v heads, dim]
        angles = (step.cos, step.sin) if self.rotary else None
        of_heads = None if norms is None or self.norm_all else (norms[0].weight, norms[1].weight)
        q, k, v = step.ops.norm_rotate(heads, angles, of_heads, self.norm_eps, step.slots, pools)
        if step.query_scale is not None:
            q = q.mul_(step.query_scale.to(q.dtype))
        return q, k, v

    def attend(self, hidden: torch.Tensor, projected: Projected, attention: GqaStep, pools: LayerPools) -> None:
        q, k, v = projected
        out = attention.attend(q, k, v, pools, scale=self.scale)
        self.o_proj.add_to(hidden, out.flatten(1))

    def weights(self, prefix: str) -> Weights:
        out = self.qkv_proj.weights(
            {f"{prefix}q_proj": self.q_size, f"{prefix}k_proj": self.kv_size, f"{prefix}v_proj": self.kv_size}
        )
        out |= self.o_proj.weights({f"{prefix}o_proj": self.o_proj.weight.shape[0]})
        if self.q_norm is not None and self.k_norm is not None:
            out |= {f"{prefix}q_norm.weight": self.q_norm.weight, f"{prefix}k_norm.weight": self.k_norm.weight}
        return out

    def pools(self) -> list[PoolSpec]:
        shape = (self.kv_size // self.head_dim, self.head_dim)
        return [PoolSpec(name=name, shape=shape, dtype=self.dtype) for name in ("k", "v")]


def _head_norm(spec: ModelSpec, size: int, *, dtype: torch.dtype, device: torch.device) -> RMSNorm | None:
    """Make the norm of the queries or of the keys, which have `size` numbers over all heads, if the architecture has one."""
    if not (spec.qk_norm or spec.qk_norm_all):
        return None
    return RMSNorm(size if spec.qk_norm_all else spec.head_dim, spec.norm_eps, dtype=dtype, device=device)


class DenseModel(DecoderModel[GqaStep]):
    def make_attention(self, index: int) -> Attention[GqaStep]:
        rotary = index not in self.spec.nope_layers
        return GqaAttention(self.spec, rotary=rotary, dtype=self.dtype, device=self.device)

    def make_mlp(self, index: int) -> Mlp:
        return GatedMlp(self.spec.hidden_size, self.spec.intermediate_size, dtype=self.dtype, device=self.device)
