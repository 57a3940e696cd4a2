"""Tests on a GPU that the KV cache takes only memory that steps leave free, so that no later step runs out of memory, and that
too large a cache is refused."""

from __future__ import annotations

import json
import random

import pytest
import torch
from msgspec.structs import replace

from engine import LLM, SamplingParams
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.device.build import build
from engine.device.trial_steps import ALL_OPTIONS, PROMPT_LOGPROBS
from engine.errors import ConfigError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GIB = 1 << 30
FREE = 14 * GIB  # bytes that the fixture `ballast` leaves free on the device
COMMON = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "head_dim": 128},
    "deepseek_v2": COMMON
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 2,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.fixture(params=sorted(CONFIGS))
def folder(request, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return tmp_path


@pytest.fixture
def ballast():
    """Hold all of the device's memory except FREE bytes while a test runs."""
    torch.cuda.empty_cache()
    held = torch.cuda.mem_get_info()[0] - FREE
    if held < 0:
        pytest.skip(f"needs {FREE / GIB:.0f} GiB of free device memory")
    yield torch.empty(held, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()


def prompts(num: int, length: int) -> list[list[int]]:
    rng = random.Random(length)
    return [[rng.randrange(2, 128256) for _ in range(length)] for _ in range(num)]


def test_no_step_runs_out_of_memory_once_the_cache_has_its_size(folder, ballast):
    scheduler = {"max_num_seqs": 256, "max_step_tokens": 8192}
    options = {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy", "cache": {"memory_fraction": 0.97}}
    with LLM(folder, scheduler=scheduler, **options) as llm:
        core = llm._core
        context = core.info().limits.max_model_len
        while core.prepare():  # capture all graphs, and warm up a prompt of each kind
            pass
        every_option = [replace(ALL_OPTIONS, max_tokens=4, ignore_eos=True, seed=i) for i in range(256)]
        loads = [
            (prompts(256, 32), every_option),
            (prompts(7, 1025), [replace(PROMPT_LOGPROBS, max_tokens=2)] * 7),
            (prompts(1, 8191), [replace(PROMPT_LOGPROBS, max_tokens=2)]),
            (prompts(1, min(context, 65536) - 2), [SamplingParams(max_tokens=2)]),
            (prompts(3, min(context, 20000) - 2), [SamplingParams(max_tokens=2)] * 3),
        ]
        for many, params in loads:
            assert all(c.token_ids for c in llm.generate(many, params))


@pytest.mark.parametrize("num_blocks", [10**7, 10**9, 10**15])
def test_more_blocks_than_the_device_holds_are_refused_by_name(folder, num_blocks):
    config = EngineConfig(model=str(folder), device="cuda", load_format="dummy", cache=CacheConfig(num_blocks=num_blocks))
    with pytest.raises(ConfigError, match=rf"^cache\.num_blocks is too large: a KV cache of {num_blocks} blocks") as refused:
        build(config)
    assert refused.value.param == "cache.num_blocks"


def test_a_step_that_does_not_fit_beside_the_model_is_refused_by_name(folder, ballast):
    scheduler = SchedulerConfig(max_num_seqs=256, max_step_tokens=1_000_000)
    config = EngineConfig(model=str(folder), device="cuda", load_format="dummy", scheduler=scheduler)
    with pytest.raises(
        ConfigError,
        match=r"(scheduler\.max_step_tokens is 1000000, and the largest step does not fit|leaves 0 bytes for the KV cache)",
    ) as refused:
        build(config)
    assert "scheduler.max_step_tokens" in refused.value.message  # a step that barely fits leaves no memory for the cache
