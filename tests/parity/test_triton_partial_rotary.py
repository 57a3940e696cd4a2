"""Tests attention that rotates a part of each head, or norms q and k over all heads: with `CudaOps` against `PlainOps`."""

from __future__ import annotations

import pytest
import torch

from engine.batch import LayerPools
from engine.layers.ops import Ops, PlainOps
from engine.layers.ops_cuda import CudaOps
from engine.layers.rotary import Rotary
from engine.models.base import Step
from engine.models.dense import GqaAttention
from engine.models.families import parse_spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIONS = torch.tensor([0, 1, 5, 9, 2, 301], device=DEVICE)
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.3}
CONFIGS = {
    "all heads normed, half rotated": {"architectures": ["MiniMaxM2ForCausalLM"], "rotary_dim": 8},
    "each head normed, a quarter rotated": {
        "architectures": ["Glm4MoeForCausalLM"],
        "partial_rotary_factor": 0.25,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "half rotated": {"architectures": ["Glm4MoeForCausalLM"]},
    "queries grow": {"architectures": ["Ministral3ForCausalLM"], "rope_parameters": ROPE},
}


def project(attention: GqaAttention, rotary: Rotary, ops: Ops, pools: LayerPools) -> list[torch.Tensor]:
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    slots = torch.tensor([7, 0, 3, 11, 5, 2], device=DEVICE)
    step = Step(None, *rotary.plain(POSITIONS), slots, ops, rotary.query_scale(POSITIONS))
    with torch.inference_mode():
        projected = attention.project(hidden, (torch.ones(32, device=DEVICE), 1e-6), step, pools)
    return [*projected, *pools.values()]


@pytest.mark.parametrize("name", CONFIGS)
def test_projections_equal_their_plain_twin(name):
    spec = parse_spec(SIZES | CONFIGS[name])
    attention = GqaAttention(spec, dtype=torch.float32, device=DEVICE)
    for i, parameter in enumerate(attention.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    rotary = Rotary(spec.rope, device=DEVICE)
    plain = {name: torch.zeros(3, 4, 2, 16, device=DEVICE) for name in ("k", "v")}
    pools = {name: pool.clone() for name, pool in plain.items()}
    expected = project(attention, rotary, PlainOps(), plain)
    for a, b in zip(project(attention, rotary, CudaOps(), pools), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
