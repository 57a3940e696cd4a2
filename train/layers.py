"""Defines the trainable layers. Parameters are float32 and are cast to the activations' type where they are used.

Modules and parameters have the checkpoint's names, so a state dict is a checkpoint except for the stacked experts (see
`train/export.py`). The engine's layers cannot be trained: they are written for inference on a paged cache and change their
inputs in place. Routing and rotary embedding must agree in both, so they are the engine's own functions.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from engine.layers.kinds import RoutingSpec
from engine.layers.moe import route
from engine.layers.rotary import deinterleave, rotate
from engine.models.spec import MlaSpec, ModelSpec

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of `engine.layers.rotary.Rotary`, each [T, 1, dim] float32."""


class Linear(nn.Module):
    """Computes y = x W^T. The initial standard deviation of W is `scale` / sqrt(number of inputs)."""

    def __init__(self, in_size: int, out_size: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_size, in_size) * (scale / math.sqrt(in_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LatentAttention(nn.Module):
    """Computes multi-head latent attention. It expands the latent to the keys and values of every head, which is the faster way
    for many tokens at once."""

    def __init__(self, spec: ModelSpec, mla: MlaSpec, *, out_scale: float) -> None:
        super().__init__()
        assert mla.q_lora_rank is not None
        self.mla, self.interleaved = mla, spec.rope.interleaved
        self.q_a_proj = Linear(spec.hidden_size, mla.q_lora_rank)
        self.q_a_layernorm = RMSNorm(mla.q_lora_rank, spec.norm_eps)
        self.q_b_proj = Linear(mla.q_lora_rank, spec.num_heads * (mla.nope_dim + mla.rope_dim))
        self.kv_a_proj_with_mqa = Linear(spec.hidden_size, mla.kv_lora_rank + mla.rope_dim)
        self.kv_a_layernorm = RMSNorm(mla.kv_lora_rank, spec.norm_eps)
        self.kv_b_proj = Linear(mla.kv_lora_rank, spec.num_heads * (mla.nope_dim + mla.v_dim))
        self.o_proj = Linear(spec.num_heads * mla.v_dim, spec.hidden_size, scale=out_scale)

    def forward(self, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        m, (rows, length, _) = self.mla, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(rows, length, -1, m.nope_dim + m.rope_dim)
        q_nope, q_rope = q.split((m.nope_dim, m.rope_dim), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((m.kv_lora_rank, m.rope_dim), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(rows, length, -1, m.nope_dim + m.v_dim)
        k_nope, v = kv.split((m.nope_dim, m.v_dim), -1)
        k_rope = self._rotate(k_rope.unsqueeze(2), angles).expand(-1, -1, k_nope.shape[2], -1)  # all heads share one rotary key
        q = torch.cat((q_nope, self._rotate(q_rope, angles)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=m.softmax_scale
        )
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _rotate(self, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        return rotate(deinterleave(x) if self.interleaved else x, *angles)


class GroupedAttention(nn.Module):
    """Computes grouped-query attention with normed queries and keys, as in Qwen3."""

    def __init__(self, spec: ModelSpec, *, out_scale: float) -> None:
        super().__init__()
        self.heads = (-1, spec.head_dim)
        self.q_proj = Linear(spec.hidden_size, spec.num_heads * spec.head_dim)
        self.k_proj = Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim)
        self.v_proj = Linear(spec.hidden_size, spec.num_kv_heads * spec.head_dim)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, spec.hidden_size, scale=out_scale)

    def forward(self, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        q, k, v = (project(x).unflatten(-1, self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *angles), rotate(self.k_norm(k), *angles)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class GatedMlp(nn.Module):
    def __init__(self, hidden: int, size: int, *, out_scale: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, size)
        self.up_proj = Linear(hidden, size)
        self.down_proj = Linear(size, hidden, scale=out_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    e_score_correction_bias: torch.Tensor

    def __init__(self, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))


class Experts(nn.Module):
    """Holds the weights of all routed experts of a layer, stacked as [E, out, in], and applies them."""

    def __init__(self, num: int, hidden: int, size: int, *, out_scale: float) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.randn(num, size, hidden) / math.sqrt(hidden))
        self.up_proj = nn.Parameter(torch.randn(num, size, hidden) / math.sqrt(hidden))
        self.down_proj = nn.Parameter(torch.randn(num, hidden, size) * (out_scale / math.sqrt(size)))

    def forward(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Apply the experts to x [N, H] with weights shares [N, E], 0 for experts that a token was not sent to -> [N, H].

        Every expert computes every token, and weight 0 removes the unwanted results. Sorting tokens by expert would need a
        quarter of the arithmetic, but fifteen small kernels instead of three large products. For experts this small, the large
        products are faster.
        """
        num, hidden, size = self.down_proj.shape
        gate = F.linear(x, self.gate_proj.to(x.dtype).view(-1, hidden)).view(-1, num, size)
        up = F.linear(x, self.up_proj.to(x.dtype).view(-1, hidden)).view(-1, num, size)
        weighted = (F.silu(gate) * up * shares.unsqueeze(-1)).flatten(1)
        return weighted @ self.down_proj.to(x.dtype).transpose(1, 2).reshape(num * size, hidden)


class MoeMlp(nn.Module):
    def __init__(self, spec: ModelSpec, routing: RoutingSpec, size: int, shared_size: int, *, out_scale: float) -> None:
        super().__init__()
        self.routing = routing
        self.gate = Router(spec.hidden_size, routing.num_experts)
        self.experts = Experts(routing.num_experts, spec.hidden_size, size, out_scale=out_scale)
        self.shared_experts = GatedMlp(spec.hidden_size, shared_size, out_scale=out_scale)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer on x [B, T, H] -> out [B, T, H], and the number of tokens that each expert got, [E]."""
        flat = x.flatten(0, 1)
        scores = F.linear(flat.float(), self.gate.weight)
        weights, ids = route(scores, self.routing, self.gate.e_score_correction_bias)
        shares = torch.zeros_like(scores).scatter(1, ids, weights)  # [N, E]
        load = torch.zeros_like(scores).scatter(1, ids, 1.0).sum(0)
        return self.experts(flat, shares.to(x.dtype)).view_as(x) + self.shared_experts(x), load


class Block(nn.Module):
    """A decoder layer: attention, then a dense MLP or experts.

    The forward of a Block returns the residual stream [B, T, H] and the number of tokens of each expert [E] (None if the layer is
    dense).
    """

    def __init__(self, spec: ModelSpec, mlp: GatedMlp | MoeMlp, *, out_scale: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = (
            GroupedAttention(spec, out_scale=out_scale)
            if spec.mla is None
            else LatentAttention(spec, spec.mla, out_scale=out_scale)
        )
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoeMlp):
            out, load = self.mlp(normed)
            return x + out, load
        return x + self.mlp(normed), None
