"""Makes tiny random transformers models, one for each family and feature. Each model is saved as a checkpoint and is the
reference for the engine's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCAB = 256
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # larger than usual: logits are a few units, so a tolerance of 1e-4 is strict
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MLA = DENSE | {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
V3 = MLA | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
QWEN3 = DENSE | {"head_dim": 24}
SEED = DENSE | {"head_dim": 24, "pad_token_id": None, "attention_out_bias": True}
LONG = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
LONG |= {"mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
MINISTRAL3 = DENSE | {"head_dim": 16, "pad_token_id": None, "rope_parameters": LONG}
GLM_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5}
GLM = DENSE | GLM_EXPERTS | {"n_group": 2, "topk_group": 1, "head_dim": 16}
GLM_LITE = V3 | {"routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1}
MINIMAX = DENSE | {"head_dim": 16, "rotary_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "bos_token_id": None}
MOE = QWEN3 | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}

# Name of a test case -> (transformers model type, config).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DENSE),
    "llama-one-kv-head": ("llama", DENSE | {"num_key_value_heads": 1}),
    "llama-all-kv-heads": ("llama", DENSE | {"num_key_value_heads": 4}),
    "llama-llama3-rope": ("llama", DENSE | {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", DENSE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 3.0}}),
    "llama-yarn": ("llama", DENSE | {"rope_parameters": YARN}),
    "llama-tied": ("llama", DENSE | {"tie_word_embeddings": True}),
    "llama-attention-bias": ("llama", DENSE | {"attention_bias": True}),
    "mistral-wide-heads": ("mistral", DENSE | {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-yarn-tied": ("qwen2", DENSE | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", QWEN3),
    "qwen3-tied-yarn": ("qwen3", QWEN3 | {"tie_word_embeddings": True, "rope_parameters": YARN | {"truncate": False}}),
    "qwen3-bias": ("qwen3", QWEN3 | {"attention_bias": True}),
    "qwen3-moe": ("qwen3_moe", MOE),
    "qwen3-moe-normalized": ("qwen3_moe", MOE | {"norm_topk_prob": True}),
    "qwen3-moe-some-dense": ("qwen3_moe", MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "smollm3": ("smollm3", DENSE | {"no_rope_layers": [1, 0, 1], "pad_token_id": None, "bos_token_id": None}),
    "seed-oss": ("seed_oss", SEED),
    "seed-oss-no-bias": ("seed_oss", SEED | {"attention_bias": False, "attention_out_bias": False}),
    "ministral3": ("ministral3", MINISTRAL3),
    "ministral3-default-rope": (
        "ministral3",
        MINISTRAL3
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    "glm4-moe": ("glm4_moe", GLM),
    "glm4-moe-normed-yarn": (
        "glm4_moe",
        GLM | {"use_qk_norm": True, "attention_bias": True, "rope_parameters": YARN | {"partial_rotary_factor": 0.25}},
    ),
    "glm4-moe-lite": ("glm4_moe_lite", GLM_LITE),
    "glm4-moe-lite-types": (
        "glm4_moe_lite",
        {k: v for k, v in GLM_LITE.items() if k != "first_k_dense_replace"} | {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "minimax-m2": ("minimax_m2", MINIMAX),
    "minimax-m2-whole-heads": ("minimax_m2", {k: v for k, v in MINIMAX.items() if k != "rotary_dim"}),
    "deepseek-v2-greedy": ("deepseek_v2", MLA),
    "deepseek-v2-grouped": (
        "deepseek_v2",
        MLA
        | {
            "q_lora_rank": 20,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek-v2-yarn": ("deepseek_v2", MLA | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek-v2-yarn-uneven": ("deepseek_v2", MLA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "deepseek-v3": ("deepseek_v3", V3),
    "deepseek-v3-no-q-lora": ("deepseek_v3", V3 | {"q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek-v3-halves": ("deepseek_v3", V3 | {"rope_interleave": False}),
    "deepseek-v3-yarn": ("deepseek_v3", V3 | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
}


def make(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build the model of the case `name` with random weights and save it to `folder`. Returns the model."""
    kind, config = CASES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(config | changes))).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Transformers starts norms at one and biases at zero. With equal values, tests would not notice two exchanged
            # tensors.
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                tensor.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model


def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
