"""Config files with the keys that published ones of each family have are accepted, and nothing in them is reported."""

from __future__ import annotations

from typing import Any

import pytest

from engine.models.families import parse_spec

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0",
    "use_cache": True,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "vocab_size": 128256,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN = COMMON | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GLM = COMMON | {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 3,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "attention_bias": True,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "vocab_size": 154880,
}
MINISTRAL_ROPE = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
    "type": "yarn",
}
MISTRAL = COMMON | {
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "vocab_size": 131072,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.1": LLAMA | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 500000.0, "eos_token_id": [5, 6]},
    "Llama with YaRN, fine-tuned": LLAMA
    | {
        "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
        "_name_or_path": "some/model",
        "unsloth_version": "2025.1",
        "unsloth_fixed": True,
        "max_sequence_length": 4096,
        "_flash_attn_2_enabled": True,
        "neftune_noise_alpha": 5,
    },
    "SmolLM2": LLAMA | {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "tie_word_embeddings": True},
    "Mistral": MISTRAL | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1000000.0},
    "Ministral 3": MISTRAL
    | {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "rope_parameters": MINISTRAL_ROPE},
    "Qwen2.5": QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 131072, "use_mrope": None},
    "Qwen3 in FP8": QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "quantization_config": FP8 | {"modules_to_not_convert": ["lm_head"]},
    },
    "Qwen3-MoE": QWEN
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "SmolLM3": LLAMA
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "layer_types": ["full_attention"] * 32,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 8,
        "pretraining_tp": 2,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Seed-OSS": LLAMA
    | {
        "architectures": ["SeedOssForCausalLM"],
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_out_bias": False,
        "head_dim": 128,
        "residual_dropout": 0.1,
        "rope_scaling": {"rope_type": "default"},
    },
    "DeepSeek-V3.1": DEEPSEEK,
    "a model_type of its own": DEEPSEEK | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    "DeepSeek-V2-Lite": {k: v for k, v in DEEPSEEK.items() if k not in ("quantization_config", "num_nextn_predict_layers")}
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "n_group": 1,
        "norm_topk_prob": False,
        "q_lora_rank": None,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "GLM-4.5": GLM
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "head_dim": 128,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
    },
    "GLM-4.7-Flash": GLM
    | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "attention_bias": False,
        "kv_lora_rank": 512,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "partial_rotary_factor": 1.0,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "topk_method": "noaux_tc",
        "v_head_dim": 256,
    },
    "MiniMax-M2": COMMON
    | {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax",
        "attn_type_list": [1] * 62,
        "auto_map": {},
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 196608,
        "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1,
        "num_attention_heads": 48,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 62,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "num_mtp_modules": 3,
        "output_router_logits": False,
        "qk_norm_type": "per_layer",
        "quantization_config": FP8 | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias"]},
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 200064,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_published_files_are_accepted(name):
    own = {"a model_type of its own": "kimi_k2", "MiniMax-M2": "minimax"}
    notes = parse_spec(PUBLISHED[name]).notes
    assert [note for note in notes if f'model_type "{own.get(name)}" is not known; the model is served as' not in note] == []
    assert len(notes) == (name in own)


def test_what_a_published_minimax_says_is_read():
    spec = parse_spec(PUBLISHED["MiniMax-M2"])
    assert (spec.rope.dim, spec.qk_norm_all, spec.num_mtp_layers) == (64, True, 3)
    assert spec.moe is not None
    assert (len(spec.moe.layers), spec.moe.routing.num_experts, spec.moe.shared_size) == (62, 256, 0)
