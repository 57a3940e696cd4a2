"""DeepSeek-V2 and V3: multi-head latent attention, and from some layer on a mixture of routed and shared experts.

    x --q_a, norm, q_b (or q)------------> q [heads, nope | rope]
    x --kv_a--> latent [rank] --norm--+--> cached: [rank | rope], one record for all heads
            \\-> key   [rope] --turn--/
    kv_b expands a latent to each head's key (nope) and value: where and when is up to the attention backend.

The layers past num_hidden_layers that V3 checkpoints carry (multi-token prediction) are `deepseek_mtp.py`'s and skipped here.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.batch import LayerPools, PoolSpec
from engine.layers.linear import Linear, Weights, parameter
from engine.layers.mlp import GatedMlp
from engine.layers.moe import MoeMlp
from engine.layers.norm import RMSNorm
from engine.layers.rotary import deinterleave, rotate
from engine.models.base import Attention, DecoderModel, Mlp, Step
from engine.models.spec import MlaSpec, ModelSpec

LATENT_EPS = 1e-6  # of the norms inside attention; not in config.json


class MlaAttention(nn.Module):
    def __init__(self, spec: ModelSpec, mla: MlaSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.mla = mla
        self.interleaved = spec.rope.interleaved
        hidden, q_size = spec.hidden_size, spec.num_heads * (mla.nope_dim + mla.rope_dim)
        rank = mla.q_lora_rank
        self.q_a_proj = Linear(hidden, rank, dtype=dtype, device=device) if rank is not None else None
        self.q_a_norm = RMSNorm(rank, LATENT_EPS, dtype=dtype, device=device) if rank is not None else None
        self.q_proj = Linear(hidden if rank is None else rank, q_size, dtype=dtype, device=device)
        self.kv_a_proj = Linear(hidden, mla.kv_lora_rank + mla.rope_dim, dtype=dtype, device=device)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, LATENT_EPS, dtype=dtype, device=device)
        # Not a Linear: the attention backend decides what to multiply it with.
        self.kv_b = parameter(spec.num_heads, mla.nope_dim + mla.v_dim, mla.kv_lora_rank, dtype=dtype, device=device)
        self.o_proj = Linear(spec.num_heads * mla.v_dim, hidden, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, step: Step, pools: LayerPools) -> torch.Tensor:
        m = self.mla
        q_in = x if self.q_a_proj is None or self.q_a_norm is None else self.q_a_norm(self.q_a_proj(x))
        q: torch.Tensor = self.q_proj(q_in).view(x.shape[0], -1, m.nope_dim + m.rope_dim)  # [T, heads, nope + rope]
        q = torch.cat((q[..., : m.nope_dim], self._turn(q[..., m.nope_dim :], step)), -1)
        kv = self.kv_a_proj(x)  # [T, rank + rope]
        key = self._turn(kv[:, None, m.kv_lora_rank :], step)[:, 0]  # [T, rope]
        latent = torch.cat((self.kv_a_norm(kv[:, : m.kv_lora_rank]), key), -1)
        out = step.attention.attend_latent(q, latent, self.kv_b, pools, scale=m.softmax_scale)
        projected: torch.Tensor = self.o_proj(out.flatten(1))
        return projected

    def _turn(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        return rotate(deinterleave(x) if self.interleaved else x, step.cos, step.sin)

    def weights(self, prefix: str) -> Weights:
        out: Weights = {
            f"{prefix}kv_a_layernorm.weight": self.kv_a_norm.weight,
            f"{prefix}kv_b_proj.weight": self.kv_b.view(-1, self.mla.kv_lora_rank),
        }
        linears = {"kv_a_proj_with_mqa": self.kv_a_proj, "o_proj": self.o_proj}
        if self.q_a_proj is not None and self.q_a_norm is not None:
            out[f"{prefix}q_a_layernorm.weight"] = self.q_a_norm.weight
            linears |= {"q_a_proj": self.q_a_proj, "q_b_proj": self.q_proj}
        else:
            linears["q_proj"] = self.q_proj
        for name, linear in linears.items():
            out |= linear.weights({prefix + name: linear.weight.shape[0]})
        return out

    def pools(self) -> list[PoolSpec]:
        shape = (self.mla.kv_lora_rank + self.mla.rope_dim,)
        return [PoolSpec(name="latent", shape=shape, dtype=self.kv_b.dtype)]


class DeepseekModel(DecoderModel):
    def make_attention(self, index: int) -> Attention:
        assert self.spec.mla is not None
        return MlaAttention(self.spec, self.spec.mla, dtype=self.dtype, device=self.device)

    def make_mlp(self, index: int) -> Mlp:
        """A layer past the last is one of multi-token prediction, which has experts where the model has any."""
        spec, moe = self.spec, self.spec.moe
        if moe is None or (index < spec.num_layers and index not in moe.layers):
            return GatedMlp(spec.hidden_size, spec.intermediate_size, dtype=self.dtype, device=self.device)
        return MoeMlp(
            moe.routing,
            spec.hidden_size,
            moe.intermediate_size,
            shared_size=moe.shared_size,
            router_dtype=torch.float32,  # as the family's own code does: neighbouring scores differ by little
            dtype=self.dtype,
            device=self.device,
        )

    def skipped(self) -> list[str]:
        extra = "|".join(str(self.spec.num_layers + i) for i in range(self.spec.num_mtp_layers))
        return [rf"model\.layers\.(?:{extra})\..*"] if extra else []
