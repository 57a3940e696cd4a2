"""DeepSeek-V2 and V3, and GLM-4-MoE-Lite: multi-head latent attention (MLA). Most layers have routed and shared experts.

    x --q_a, norm, q_b (or q)--> q [heads, nope | rope], the rope part rotated
    x --kv_a--> latent [rank] --norm----+--> cached: [rank | rope], one record per token for all heads
            \\-> key   [rope] --rotate--/
    kv_b expands a latent to each head's key (nope) and value; the attention implementation decides when to apply it.

V3 checkpoints carry multi-token prediction layers after num_hidden_layers. They are skipped here; see `deepseek_mtp.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.attention.base import MlaStep
from engine.batch import LayerPools, PoolSpec
from engine.layers.linear import Linear, Norm, Weights, parameter
from engine.layers.norm import RMSNorm
from engine.models.base import Attention, DecoderModel, Mlp, Projected, Step
from engine.models.experts import make_mlp
from engine.models.spec import MlaSpec, ModelSpec

LATENT_EPS = 1e-6  # epsilon of the norms inside attention, which config.json does not have


class MlaAttention(nn.Module):
    def __init__(self, spec: ModelSpec, mla: MlaSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.mla = mla
        self.interleaved = spec.rope.interleaved
        hidden, q_size = spec.hidden_size, spec.num_heads * (mla.nope_dim + mla.rope_dim)
        rank, self.record = mla.q_lora_rank, mla.kv_lora_rank + mla.rope_dim
        self.q_norm = RMSNorm(rank, LATENT_EPS, dtype=dtype, device=device) if rank is not None else None
        self.q_b_proj = Linear(rank, q_size, dtype=dtype, device=device) if rank is not None else None
        # One product computes all projections of x: q (or q_a if there is a query rank), then the latent and its key.
        self.in_size = q_size if rank is None else rank
        self.in_proj = Linear(hidden, self.in_size + self.record, dtype=dtype, device=device)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, LATENT_EPS, dtype=dtype, device=device)
        # kv_b is a bare parameter, since the attention implementation decides what to multiply the weight with.
        self.kv_b = parameter(spec.num_heads, mla.nope_dim + mla.v_dim, mla.kv_lora_rank, dtype=dtype, device=device)
        self.o_proj = Linear(spec.num_heads * mla.v_dim, hidden, dtype=dtype, device=device)

    def project(self, hidden: torch.Tensor, norm: Norm, step: Step[Any], pools: LayerPools) -> Projected:
        m, ops, pool, angles = self.mla, step.ops, pools["latent"], (step.cos, step.sin)
        projected = self.in_proj.of_norm(hidden, norm, ops)
        q, kv = torch.split(projected, [self.in_size, self.record], -1)  # kv [T, rank + rope]
        if self.q_norm is not None and self.q_b_proj is not None:
            q = self.q_b_proj.of_norm(q, self.q_norm.params, ops)
        q = q.view(hidden.shape[0], -1, m.nope_dim + m.rope_dim)  # [T, heads, nope + rope]
        return ops.latent_prepare(q, kv, self.kv_norm.params, angles, step.slots, pool, interleaved=self.interleaved)

    def attend(self, hidden: torch.Tensor, projected: Projected, attention: MlaStep, pools: LayerPools) -> None:
        q, latent = projected
        out = attention.attend(q, latent, self.kv_b, pools, scale=self.mla.softmax_scale)
        self.o_proj.add_to(hidden, out.flatten(1))

    def weights(self, prefix: str) -> Weights:
        q_in = "q_proj" if self.q_b_proj is None else "q_a_proj"
        out: Weights = {
            f"{prefix}kv_a_layernorm.weight": self.kv_norm.weight,
            f"{prefix}kv_b_proj.weight": self.kv_b.view(-1, self.mla.kv_lora_rank),
            **self.in_proj.weights({f"{prefix}{q_in}": self.in_size, f"{prefix}kv_a_proj_with_mqa": self.record}),
            **self.o_proj.weights({f"{prefix}o_proj": self.o_proj.weight.shape[0]}),
        }
        if self.q_norm is not None and self.q_b_proj is not None:
            out[f"{prefix}q_a_layernorm.weight"] = self.q_norm.weight
            out |= self.q_b_proj.weights({f"{prefix}q_b_proj": self.q_b_proj.weight.shape[0]})
        return out

    def pools(self) -> list[PoolSpec]:
        parts = (self.mla.kv_lora_rank, self.mla.rope_dim)
        return [PoolSpec(name="latent", shape=(self.record,), dtype=self.kv_b.dtype, parts=parts)]


class DeepseekModel(DecoderModel[MlaStep]):
    def make_attention(self, index: int) -> Attention[MlaStep]:
        assert self.spec.mla is not None
        return MlaAttention(self.spec, self.spec.mla, dtype=self.dtype, device=self.device)

    def make_mlp(self, index: int) -> Mlp:
        return make_mlp(self.spec, index, dtype=self.dtype, device=self.device)
