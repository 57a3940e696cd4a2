"""Defines the shapes of Tidepool and of its draft model, as in their `config.json`.

The shapes follow from the sizes that the checkpoints may have: 26 MB in all for Tidepool (FP8 matrices, bfloat16 embedding) and 4
MB for its draft model. Matrix inputs are multiples of 128 wide, as kernels for FP8 blocks require.
"""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 8192
BEGIN, END = 0, 1  # token ids of <|begin|> and <|end|>; see train/tokenizer.py
CONTEXT = 4096

TIDEPOOL: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 9,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,  # equal to a query head's width, as fused attention kernels require
    "attention_bias": False,
    "intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}

DRAFT: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "attention_bias": False,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
