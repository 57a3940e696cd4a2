"""Compares, on a GPU, DeepSeek-V3 at its real widths from an FP8 checkpoint with `transformers` on the dequantised weights."""

from __future__ import annotations

import pytest
import reference
import torch
from cuda_parity import Lengths, check, decode
from fp8_checkpoint import write_random
from transformers import AutoConfig, DeepseekV3ForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
NEEDED = 40e9  # bytes: transformers takes 16 GB, the engine 8 GB, and all weights exist twice while they are made
# With 32 experts in 8 groups and 7,168 bfloat16 numbers in a hidden state, one token in ten to fifteen gets other experts than in
# the reference (measured on a CPU). So more tokens are compared than the 32 of small models, and a fifth may differ a lot.
LENGTHS = Lengths(prompt=48, outputs=300, compared=256)
MOST = 0.8
WIDTHS = {
    "vocab_size": reference.VOCAB,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,  # the real model has 256
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}


def test_logits_of_deepseek_v3_are_those_of_transformers_on_the_dequantised_weights(tmp_path):
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info()[0]) < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of free device memory, and there are {free / 1e9:.0f}")
    config = AutoConfig.for_model("deepseek_v3", architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16", **WIDTHS)
    weights = write_random(tmp_path, config, torch.device(DEVICE))
    # transformers takes the weights from memory, so no second checkpoint is needed. It fuses their experts as it does for files.
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    del weights
    decodes = decode(tmp_path, reference.VOCAB, LENGTHS)
    (tmp_path / "model.safetensors").unlink()  # pytest keeps the folders of three runs, and this file has 4 GB
    # The reference computes in float32. In bfloat16, its own rounding would make 1.5 times as many choices of experts differ, and
    # would make errors 1.4 times as large.
    model.set_experts_implementation("eager")  # other implementations of experts may need bfloat16
    check(decodes, model.to(DEVICE).float(), experts=True, most=MOST)
