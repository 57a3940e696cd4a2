"""Finds the kernels of a model's steps for an H200, and then plans random steps: `python plan_kernels.py MODEL SEED`.

Prints the kernels that a random step launches and that are not in the set, and then "planned". test_kernel_set.py runs this.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch

from engine.config import EngineConfig, resolve
from engine.device.kernel_set import Planner
from engine.kernels.ahead import recording
from engine.kernels.hardware import GPUS
from engine.models.families import read_spec
from engine.request import SamplingParams

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": "greedy",
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MODELS = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE, "deepseek": DEEPSEEK}
NUM_STEPS = 60
OPTIONS = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, seed=3),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 1.0}, min_tokens=3, logprobs=5),
    SamplingParams(prompt_logprobs=2),
)


def random_slices(rng: random.Random) -> tuple[list[tuple[int, int]], int]:
    """Draw decodes and chunks, as (first position, tokens), that one step of a server may have, and the number of decodes."""
    left = rng.choice((8, 64, 256, 2048, 8192))
    decodes = rng.choice((0, 0, 1, rng.randint(1, min(200, left - 1))))
    slices = [(rng.randint(1, 30000), 1) for _ in range(decodes)]
    left -= decodes
    while left > 0 and len(slices) < 256 and (len(slices) == decodes or rng.random() < 0.7):
        num = min(left, rng.choice((1, rng.randint(1, 40), rng.randint(1, 1500), rng.randint(1000, 8192))))
        slices.append((rng.choice((0, 0, rng.randint(1, 1000), rng.randint(1000, 30000))), num))
        left -= num
    return slices, decodes


def main() -> None:
    config, seed = dict(MODELS[sys.argv[1]]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        spec = read_spec(folder)
        settings = resolve(EngineConfig(model=folder, device="cuda"), spec.limits(), has_cuda=True)
    with recording(GPUS["h200"]) as variants, torch.inference_mode():
        planner = Planner(spec, settings)
        planner.run_all()
        found, rng = len(variants), random.Random(seed)
        for _ in range(NUM_STEPS):
            slices, decodes = random_slices(rng)
            planner.run(planner.plan(slices, decodes=decodes, params=rng.choice(OPTIONS)))
            for variant in variants[found:]:
                print(variant.kernel.__name__, "in a step of", slices[:5], "and more" if len(slices) > 5 else "", flush=True)
            found = len(variants)
    print("planned")


if __name__ == "__main__":
    main()
