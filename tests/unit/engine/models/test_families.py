"""A ModelSpec is read from a config.json in its old or new form. An error names the key that cannot be served."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from engine.config import EngineConfig, resolve
from engine.errors import CheckpointError, ConfigError
from engine.layers.rotary import inverse_frequencies
from engine.models.families import ARCHITECTURES, parse_spec, read_spec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 9}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
V2 = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
V3 = V2 | {"architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 24, "routed_scaling_factor": 2.5}
GLM_LITE = V3 | {"architectures": ["Glm4MoeLiteForCausalLM"], "first_k_dense_replace": 1}
GLM = LLAMA | {"architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
MINIMAX = LLAMA | {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "rotary_dim": 8,
}
MINISTRAL3 = LLAMA | {"architectures": ["Ministral3ForCausalLM"], "head_dim": 16}
SEED = LLAMA | {"architectures": ["SeedOssForCausalLM"], "head_dim": 16}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_reading_a_config_needs_no_torch():
    code = "import engine.models, engine.models.families, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_old_and_the_new_form_of_a_config_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}, "torch_dtype": "bfloat16"}
    new = LLAMA | {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert parse_spec(old) == parse_spec(new)
    assert parse_spec(old).rope.theta == 5e5
    assert parse_spec(old).dtype == "bfloat16"


def test_limits_come_from_the_config():
    limits = parse_spec(LLAMA | {"eos_token_id": 7, "dtype": "float16"}).limits()
    assert (limits.max_model_len, limits.vocab_size, limits.eos_token_ids, limits.dtype) == (256, 256, (7,), "float16")


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [(None, None, ()), (2, None, (2,)), ([2, 3], None, (2, 3)), (2, [2, 5], (2, 5)), (None, 5, (5,))],
)
def test_end_of_sequence_ids_come_from_both_files(tmp_path, config, generation, found):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_spec(tmp_path).eos_token_ids == found


def test_yarn_lengthens_the_context_and_sharpens_latent_attention():
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}
    spec = parse_spec(V2 | {"rope_scaling": yarn})
    assert spec.max_model_len == 40 * 64
    assert spec.rope.magnitude == 1.0
    assert spec.mla is not None
    assert spec.mla.softmax_scale == pytest.approx(24**-0.5 * (0.0707 * 3.6888794541139363 + 1) ** 2)


def test_which_layers_have_experts():
    def layers(config):
        moe = parse_spec(config).moe
        return () if moe is None else moe.layers

    assert layers(LLAMA) == ()
    assert layers(QWEN3_MOE) == (0, 1, 2, 3)
    assert layers(QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}) == (1,)
    assert layers(V2) == (1, 2, 3)
    assert layers(V2 | {"moe_layer_freq": 2}) == (2,)
    assert layers(V2 | {"n_routed_experts": None}) == ()


def test_routing_of_each_deepseek_version():
    v2, v3 = parse_spec(V2 | {"topk_method": "group_limited_greedy"}), parse_spec(V3)
    assert v2.moe is not None
    assert v3.moe is not None
    assert (v2.moe.routing.method, v2.moe.routing.n_group, v2.moe.routing.normalize) == ("group_limited_greedy", 4, False)
    assert (v3.moe.routing.method, v3.moe.routing.scale, v3.moe.routing.normalize) == ("noaux_tc", 2.5, True)
    assert v3.moe.shared_size == 64


def test_smollm3_has_layers_without_rotary_embedding_and_defaults_of_its_own():
    spec = parse_spec(SMOLLM3)
    assert spec.nope_layers == (3, 7)
    assert spec.rope.theta == 2e6
    assert spec.tie_embeddings  # the default, since the published checkpoints lack the key
    changed = parse_spec(SMOLLM3 | {"no_rope_layers": [0, *[1] * 8], "rope_theta": 5e6, "tie_word_embeddings": False})
    assert (changed.nope_layers, changed.rope.theta, changed.tie_embeddings) == ((0,), 5e6, False)
    assert parse_spec(LLAMA).nope_layers == ()


def test_the_block_of_an_fp8_checkpoint_is_read():
    spec = parse_spec(V3 | {"quantization_config": FP8})
    assert spec.fp8 is not None
    assert spec.fp8.block == (128, 128)


@pytest.mark.parametrize(
    ("config", "key"), [(V2, "num_experts_per_tok"), (V2 | {"topk_method": "group_limited_greedy"}, "n_group")]
)
def test_a_missing_key_without_a_default_is_named(config, key):
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is missing: it must be an integer"):
        parse_spec({k: v for k, v in config.items() if k != key})


def test_a_value_that_is_refused_may_be_the_familys_default():
    with pytest.raises(
        CheckpointError, match=r"config\.json: n_group is 8 by default: it must divide the number of experts \(12\)"
    ):
        parse_spec({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 12})


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (LLAMA, "architectures", ["GPT2LMHeadModel"]),
        (LLAMA, "architectures", []),
        (LLAMA, "hidden_size", "64"),
        (LLAMA, "hidden_size", 0),
        (LLAMA, "num_hidden_layers", True),
        (LLAMA, "num_hidden_layers", 10**9),
        (LLAMA, "vocab_size", 10**12),
        (LLAMA, "intermediate_size", 10**6),
        (LLAMA, "max_position_embeddings", 10**12),
        (LLAMA, "rms_norm_eps", 10**400),
        (LLAMA, "layer_types", 3),
        (LLAMA, "rope_theta", 1),
        (LLAMA, "rope_scaling", {"type": "yarn", "factor": 1e14}),
        (LLAMA, "num_attention_heads", 5),
        (LLAMA, "num_key_value_heads", 3),
        (LLAMA, "rms_norm_eps", -1.0),
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "mlp_bias", True),
        (LLAMA, "rope_interleave", True),
        (QWEN3_MOE, "rope_interleave", True),
        (LLAMA, "tie_word_embeddings", "yes"),
        (LLAMA, "dtype", "float64"),
        (LLAMA, "eos_token_id", ["</s>"]),
        (LLAMA, "partial_rotary_factor", 0.5),
        (LLAMA, "layer_types", ["full_attention", "sliding_attention"]),
        (LLAMA, "rope_theta", 0),
        (LLAMA, "rope_scaling", "yarn"),
        (LLAMA, "rope_scaling", {"rope_type": "dynamic"}),
        (LLAMA, "rope_scaling", {"type": "longrope", "factor": 2.0}),
        (LLAMA, "rope_scaling", {"type": "linear"}),
        (LLAMA, "rope_scaling", {"type": "llama3", "factor": 8.0}),
        (LLAMA, "rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        (LLAMA, "quantization_config", {"quant_method": "compressed-tensors"}),
        (LLAMA, "quantization_config", FP8 | {"weight_block_size": None}),
        (LLAMA, "quantization_config", FP8 | {"activation_scheme": "static"}),
        (MISTRAL, "attention_bias", True),
        (SMOLLM3, "no_rope_layers", [1] * 8),
        (SMOLLM3, "no_rope_layers", [2] * 9),
        (SMOLLM3, "no_rope_layers", 1),
        (QWEN3_MOE, "num_experts_per_tok", 9),
        (V2, "attention_bias", True),
        (V2, "norm_topk_prob", True),
        (V2, "topk_method", "noaux_tc"),
        (V2, "scoring_func", "sigmoid"),
        (V2, "rope_scaling", {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}),
        (V3, "scoring_func", "softmax"),
        (V3, "topk_method", "greedy"),
        (V3, "n_group", 3),
        (V3, "topk_group", 5),
        (V3, "num_experts_per_tok", 5),
        (V3, "qk_rope_head_dim", 7),
        (V3, "num_key_value_heads", 2),
        (V3, "qk_head_dim", 25),
        (GLM_LITE, "first_k_dense_replace", 2),
        (GLM_LITE, "mlp_layer_types", ["dense", "sparse"]),
        (GLM_LITE, "mlp_layer_types", ["dense", "other", "sparse", "sparse"]),
        (GLM_LITE, "head_dim", 16),
        (GLM_LITE, "partial_rotary_factor", 0.5),
        (GLM, "partial_rotary_factor", 0.45),
        (GLM, "scoring_func", "softmax"),
        (MINIMAX, "rotary_dim", 18),
        (MINIMAX, "rotary_dim", 7),
        (MINIMAX, "qk_norm_type", "per_head"),
        (MINIMAX, "use_qk_norm", False),
        (MINIMAX, "use_routing_bias", False),
        (MINIMAX, "shared_intermediate_size", 8),
        (MINIMAX, "attn_type_list", [1, 0, 1, 1]),
        (MINIMAX, "layernorm_mlp_beta", 2.0),
        (MINISTRAL3, "llama_4_scaling_beta", 0.1),
        (SEED, "mlp_bias", True),
        (LLAMA, "model_type", "mistral"),
    ],
    ids=lambda v: str(v)[:30] if not isinstance(v, dict) else "",
)
def test_a_config_that_cannot_be_served_is_refused_by_its_key(config, key, value):
    named = {"num_attention_heads": "head_dim|num_key_value_heads"}.get(key, key)
    with pytest.raises(CheckpointError, match=rf"config\.json: ({named})\b"):
        parse_spec(config | {key: value})


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL, 4096),
        (MISTRAL | {"sliding_window": None}, None),
        (MISTRAL | {"sliding_window": 64}, 64),
        (MINISTRAL3 | {"sliding_window": 64}, 64),
        (LLAMA | {"sliding_window": 64}, 64),
        (QWEN2 | {"sliding_window": 64}, None),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True}, None),  # from layer 28 on, of 4
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, 64),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        (QWEN3 | {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, 64),
        (QWEN3_MOE | {"sliding_window": 64, "use_sliding_window": True}, 64),
        (SMOLLM3 | {"sliding_window": 64, "use_sliding_window": True}, 64),
    ],
)
def test_a_sliding_window_limits_the_context_to_itself(config, window):
    limits = parse_spec(config).limits()
    assert limits.sliding_window == window
    resolve(EngineConfig(model="", max_model_len=64), limits, has_cuda=False)
    if window == 64:
        with pytest.raises(ConfigError, match=r"sliding_window.*set max_model_len to at most 64"):
            resolve(EngineConfig(model="", max_model_len=65), limits, has_cuda=False)
        with pytest.raises(ConfigError, match="set max_model_len to at most 64"):
            resolve(EngineConfig(model=""), limits, has_cuda=False)


def test_layers_that_slide_without_a_window_are_refused():
    for extra in ({}, {"use_sliding_window": True, "sliding_window": None}):
        with pytest.raises(CheckpointError, match="layer_types"):
            parse_spec(QWEN3 | {"layer_types": ["sliding_attention"] * 4} | extra)


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("content", [None, "{", "[]", NESTED, "[" * 100_000], ids=["absent", "cut", "list", "nested", "lists"])
def test_an_unreadable_config_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(tmp_path)


def test_an_unreadable_generation_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(NESTED)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read as JSON: it is nested too deeply"):
        read_spec(tmp_path)


ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**400,
    1.5,
    1e-320,
    1e300,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    [[]],
    [{}],
    ["x"],
    {},
    {"a": 1},
]
ROPE = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
ROPE |= {"beta_fast": 32, "beta_slow": 1, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "attention_factor": 1.0}
FAMILIES = (LLAMA, MISTRAL, MINISTRAL3, QWEN2, QWEN3, SMOLLM3, SEED, QWEN3_MOE, GLM, MINIMAX, V2, V3, GLM_LITE)
BY_NAME = {c["architectures"][0]: c for c in FAMILIES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_value_of_any_key_gives_a_spec_or_a_checkpoint_error(name):
    latent = name in (V2["architectures"][0], V3["architectures"][0], GLM_LITE["architectures"][0])
    config = BY_NAME.get(name, LLAMA | {"architectures": [name]})
    config = config | {"sliding_window": 4096, "layer_types": [], "rope_theta": 1e4, "eos_token_id": 2}
    config |= {"quantization_config": FP8} | ({} if latent else {"head_dim": 16})
    config |= {"mlp_only_layers": [0], "decoder_sparse_step": 1} if name == QWEN3_MOE["architectures"][0] else {}
    config |= {"no_rope_layers": [1] * 9} if name == SMOLLM3["architectures"][0] else {}
    parse_spec(config)
    changed = [config | {key: value} for key in config for value in ODD]
    changed += [
        config | {"rope_scaling": ROPE | {"type": kind, key: value}}
        for kind in ("yarn", "llama3")
        for key in ROPE
        for value in ODD
    ]
    messages = []
    for each in changed:
        try:
            spec = parse_spec(each)
        except CheckpointError as error:
            messages.append(error.message)
        else:
            assert inverse_frequencies(spec.rope).isfinite().all()
    assert len(messages) > len(changed) / 4
    assert max(map(len, messages)) < 700


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_spec(tmp_path / "nowhere")
