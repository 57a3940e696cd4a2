"""Compares the bounds of `server.bench.bounds` with figures that were calculated by hand, for hardware of 4.25 TB/s and 780
TFLOP/s."""

import msgspec
import pytest

from engine.models.families import parse_spec
from server.bench.bounds import Costs, Hardware, Length, Step, step_seconds, steps, workload_seconds
from server.bench.workloads import build_workload

H200 = Hardware(bandwidth=4.25e12, rate=780e12)
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "eos_token_id": 1, "torch_dtype": "bfloat16"}
CONFIGS = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
    },
}
SPECS = {name: parse_spec(COMMON | config) for name, config in CONFIGS.items()}


def bound(model, workload):
    """Calculate the bound of a workload. Returns (seconds, output tokens, prompt tokens)."""
    work = build_workload(workload)
    lengths = [Length(len(w.prompt), w.num_outputs) for w in work]
    seconds = workload_seconds(SPECS[model], lengths, H200, number_size=2, max_tokens=8192, max_rows=256)
    return seconds, sum(length.outputs for length in lengths), sum(length.prompt for length in lengths)


@pytest.mark.parametrize(("model", "ms"), [("llama-8b", 3.5), ("qwen3-0.6b", 0.28), ("deepseek-v2-lite", 1.1)])
def test_the_bound_of_one_token_is_the_time_to_read_its_weights(model, ms):
    one = Step(tokens=1, samples=1, decode_pairs=1, chunk_pairs=0, chunk_kv=0, last_pairs=0)
    assert step_seconds(Costs.of(SPECS[model]), one, H200, number_size=2) == pytest.approx(ms / 1000, rel=0.06)


# The calculated bound includes the steps of the prompts. The figure by hand is for decodes alone, so the tolerance is wide.
@pytest.mark.parametrize(("model", "tok_s"), [("llama-8b", 15_500), ("deepseek-v2-lite", 9_000)])
def test_the_bound_of_decode64_is_the_figure_by_hand(model, tok_s):
    seconds, outputs, _ = bound(model, "decode64")
    assert outputs / seconds == pytest.approx(tok_s, rel=0.12)


@pytest.mark.parametrize(("model", "expected"), [("llama-8b", 10.0), ("qwen3-0.6b", 3.6), ("deepseek-v2-lite", 9.0)])
def test_the_bound_of_mixed256_is_the_figure_by_hand(model, expected):
    assert bound(model, "mixed256")[0] == pytest.approx(expected, rel=0.04)


# The figure calculated by hand counts the head and the last layer for every token. For the second model it also counts the
# embedding, which is a sixth of its 2.7 billion weights. So the tolerance is wide.
@pytest.mark.parametrize(("model", "tok_s", "tolerance"), [("llama-8b", 46_000, 0.09), ("deepseek-v2-lite", 116_000, 0.25)])
def test_the_bound_of_prefill_is_the_figure_by_hand(model, tok_s, tolerance):
    seconds, outputs, prompts = bound(model, "prefill")
    assert (outputs + prompts) / seconds == pytest.approx(tok_s, rel=tolerance)


def test_weights_are_as_many_as_the_published_models_have():
    dense = {name: Costs.of(SPECS[name]) for name in ("qwen3-0.6b", "llama-8b")}
    # The head of this model is also its embedding, so the weights count it once.
    assert dense["qwen3-0.6b"].weights + dense["qwen3-0.6b"].head == pytest.approx(596e6, rel=0.001)
    assert dense["llama-8b"].weights + 2 * dense["llama-8b"].head == pytest.approx(8.03e9, rel=0.001)
    c = Costs.of(SPECS["deepseek-v2-lite"])
    assert c.weights + c.moe_layers * c.num_experts * c.expert + 2 * c.head == pytest.approx(15.7e9, rel=0.002)
    assert c.weights + c.moe_layers * c.top_k * c.expert + 2 * c.head == pytest.approx(2.66e9, rel=0.02)


def test_few_tokens_read_few_experts_and_many_read_all():
    c = Costs.of(SPECS["deepseek-v2-lite"])

    def experts(tokens):
        step = Step(tokens, tokens, 0, 0, 0, 0)
        return (c.numbers_read(step) - c.weights - c.head - tokens * c.hidden) / (c.moe_layers * c.expert)

    assert experts(1) == pytest.approx(6)
    assert experts(2) == pytest.approx(12 - 36 / 64)
    assert experts(1000) == pytest.approx(64)


def test_a_step_without_a_sample_reads_no_head_and_only_the_kv_weights_of_the_last_layer():
    c = Costs.of(SPECS["llama-8b"])
    with_one, without = (c.numbers_read(Step(8, samples, 0, 0, 0, 0)) for samples in (1, 0))
    assert with_one - without == c.head + c.spared


def test_the_last_layer_does_not_read_the_kv_of_a_prompt_without_a_sample():
    c = Costs.of(SPECS["llama-8b"])
    cut, ended = (c.numbers_read(Step(8, 0, 0, 36, 8, last_pairs)) for last_pairs in (0, 8))
    assert ended - cut == 8 * c.kv // SPECS["llama-8b"].num_layers


@pytest.mark.parametrize("model", SPECS)
def test_a_token_that_is_not_sampled_needs_only_its_kv_of_the_last_layer(model):
    spec = SPECS[model]
    layers = spec.num_layers - 1
    moe = None if spec.moe is None else msgspec.structs.replace(spec.moe, layers=tuple(range(1, layers)))
    c, shorter = Costs.of(spec), Costs.of(msgspec.structs.replace(spec, num_layers=layers, moe=moe))
    kv = spec.hidden_size * c.kv // spec.num_layers
    spared = c.weights - shorter.weights - kv + (c.moe_layers - shorter.moe_layers) * c.top_k * c.expert
    one, every = Step(100, 1, 0, 5050, 100, last_pairs=100), Step(100, 100, 0, 5050, 100, last_pairs=5050)
    pairs = 4950 * c.chunk_pair // spec.num_layers
    assert c.operations(every) - c.operations(one) == 2 * (99 * (c.head + spared) + pairs)


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(8192, 256), (7, 3), (1, 1), (5, 2)])
def test_the_steps_compute_each_token_once_and_attend_each_pair_once(max_tokens, max_rows):
    lengths = [Length(5, 3), Length(12, 1), Length(1, 9), Length(7, 2), Length(30, 4)]
    found = list(steps(lengths, max_tokens=max_tokens, max_rows=max_rows))
    assert sum(s.samples for s in found) == sum(length.outputs for length in lengths)
    assert sum(s.tokens for s in found) == sum(length.prompt + length.outputs - 1 for length in lengths)
    assert sum(s.chunk_pairs for s in found) == sum(n * (n + 1) // 2 for n, _ in lengths)
    assert sum(s.last_pairs for s in found) == sum(n for n, _ in lengths)
    assert sum(s.decode_pairs for s in found) == sum(n + i for n, outputs in lengths for i in range(1, outputs))
    assert max(s.tokens for s in found) <= max_tokens
    assert max(s.samples for s in found) <= max_rows


def test_the_second_chunk_of_a_prompt_reads_the_kv_of_the_first():
    first, second = steps([Length(10, 1)], max_tokens=6, max_rows=8)
    assert (first.chunk_kv, first.samples, second.chunk_kv, second.samples) == (6, 0, 10, 1)


def test_decodes_get_their_tokens_before_prompts():
    found = list(steps([Length(2, 3), Length(9, 1)], max_tokens=4, max_rows=8))
    assert [s.tokens for s in found] == [4, 4, 4, 1]
    assert [s.samples for s in found] == [1, 1, 1, 1]
