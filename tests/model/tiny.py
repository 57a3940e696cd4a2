"""Writes tiny float32 checkpoints whose weights are large enough that greedy choices are far apart. Transformers is not
needed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.models import registry
from engine.models.families import read_spec

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}
LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
DEEPSEEK_V3 = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 2,
    "topk_group": 1,
}
CONFIGS = {"llama": LLAMA, "deepseek_v3": DEEPSEEK_V3}


def write(folder: Path, config: dict[str, object], *, seed: int = 0, std: float = 0.3) -> Path:
    """Write a checkpoint of `config` to `folder`. Norm weights are 1. All other weights are normally distributed with standard
    deviation `std`."""
    (folder / "config.json").write_text(json.dumps(config))
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(target.shape) if name.endswith("norm.weight") else torch.randn(target.shape, generator=generator) * std
        for name, target in model.weights().targets.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
