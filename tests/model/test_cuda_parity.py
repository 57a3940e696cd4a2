"""Compares, on a GPU, bfloat16 logits after 2,000 decodes in CUDA graphs with those of `transformers` on the same GPU and
tokens."""

from __future__ import annotations

import json

import pytest
import reference
import torch
from cuda_parity import Lengths, check, decode
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = Lengths(prompt=48, outputs=2000, compared=32)
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 4096}
DENSE = SIZES | {"head_dim": 64, "num_key_value_heads": 2}
MLA = SIZES | {"num_key_value_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
CASES = {
    "llama-llama3-rope": DENSE,
    "mistral-wide-heads": DENSE,
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": DENSE,
    "smollm3": SIZES | {"num_key_value_heads": 2},
    "seed-oss": DENSE,
    "ministral3": DENSE | {"rope_parameters": reference.LONG | {"original_max_position_embeddings": 1024}},
    "glm4-moe": DENSE | {"moe_intermediate_size": 256, "n_routed_experts": 16},
    "glm4-moe-normed-yarn": DENSE | {"moe_intermediate_size": 256, "n_routed_experts": 16},
    # Both keys name the same part of a head, since older versions of transformers ignore `rotary_dim`.
    "minimax-m2": DENSE
    | {
        "num_local_experts": 16,
        "rotary_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    },
    "qwen3-moe-normalized": DENSE | {"moe_intermediate_size": 256, "num_experts": 16},
    "deepseek-v2-greedy": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16},
    "deepseek-v2-grouped": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16, "q_lora_rank": 128},
    "glm4-moe-lite": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16, "q_lora_rank": 128},
    "deepseek-v3": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16, "q_lora_rank": 128},
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_after_2000_decodes_are_those_of_transformers(name, tmp_path):
    reference.make(name, tmp_path, initializer_range=0.02, **CASES[name])
    # The model is loaded from the file again. Converting it to bfloat16 would also convert the float32 rotary frequencies.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda")
    decodes = decode(tmp_path, reference.VOCAB, LENGTHS)
    check(decodes, model, experts="num_experts_per_tok" in json.loads((tmp_path / "config.json").read_text()))
