"""On a GPU: bfloat16 logits after 2,000 tokens of decode through the graphs, beside `transformers` on the same GPU and tokens."""

from __future__ import annotations

import json

import pytest
import reference
import torch
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT, OUTPUTS, COMPARED = 48, 2000, 32
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 4096}
DENSE = SIZES | {"head_dim": 64, "num_key_value_heads": 2}
MLA = SIZES | {"num_key_value_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
CASES = {
    "llama-llama3-rope": DENSE,
    "mistral-wide-heads": DENSE,
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": DENSE,
    "smollm3": SIZES | {"num_key_value_heads": 2},
    "qwen3-moe-normalized": DENSE | {"moe_intermediate_size": 256, "num_experts": 16},
    "deepseek-v2-greedy": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16},
    "deepseek-v2-grouped": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16, "q_lora_rank": 128},
    "deepseek-v3": MLA | {"moe_intermediate_size": 256, "n_routed_experts": 16, "q_lora_rank": 128},
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_after_2000_decodes_are_those_of_transformers(name, tmp_path):
    reference.make(name, tmp_path, initializer_range=0.02, **CASES[name])
    # Read back, not converted: the frequencies of the rotary embedding stay float32 that way.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda")
    prompt = torch.randint(3, reference.VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = []
    options = {"cache": {"num_blocks": 64}, "scheduler": {"max_num_seqs": 4}}
    with LLM(tmp_path, device="cuda", dtype="bfloat16", max_model_len=4096, **options) as llm:
        graphs = llm._core._runner._graphs
        run = graphs.run

        def recorded(slices, uniforms, begins):
            decoded = run(slices, uniforms, begins)
            if decoded is not None and slices.ends[0] > PROMPT + OUTPUTS - 1 - COMPARED:
                logits.append(decoded.logits.clone())
            return decoded

        graphs.run = recorded
        params = SamplingParams(max_tokens=OUTPUTS, temperature=1.0, seed=5, ignore_eos=True)
        (completion,) = llm.generate([prompt], params)
    tokens = prompt + completion.token_ids
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens[:-1]], device="cuda")).logits[0, -COMPARED:].float()
    ours = torch.cat(logits)[-COMPARED:].float()
    assert ours.shape == wanted.shape
    errors = (ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    if "num_experts_per_tok" not in json.loads((tmp_path / "config.json").read_text()):
        assert (ours - wanted).norm() / wanted.norm() < 2e-2, errors
    # Where two experts, or groups of them, are nearly as good, either side may choose the other: few tokens, far apart.
    assert errors.quantile(0.9) < 2e-2, errors
