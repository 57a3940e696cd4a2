"""Keys that say once more what an architecture computes in any case are accepted, and refused if they say otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.models.families import parse_spec

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


def parse(name: str, **more: Any):
    return parse_spec(SIZES | {"architectures": [f"{name}ForCausalLM"]} | more)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Qwen3Moe", EXPERTS | {"use_qk_norm": True, "qkv_bias": False}),  # Qwen3-Coder's
        ("Qwen3", {"use_qk_norm": True}),
        ("Qwen2", {"qkv_bias": True, "attention_bias": True}),
        ("Qwen2", {"attention_bias": False}),
        ("Llama", {"activation": "swiglu", "norm_type": "rmsnorm", "position_embedding_type": "rope"}),  # Falcon 3's
        ("Llama", {"num_layers": 2, "n_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48, "layer_norm_epsilon": 1e-5}),
        ("Llama", {"use_fused_rms_norm": True, "fuse_attention_qkv": True, "fused_mlp": False}),
        ("Mistral", {"max_window_layers": 28, "sliding_window": None}),
    ],
)
def test_a_key_that_says_what_is_computed_is_accepted(name, more):
    plain = parse(name, **{key: value for key, value in more.items() if key in EXPERTS or key == "sliding_window"})
    found = parse(name, **more)
    assert found.notes == () or "fuse" in found.notes[0]
    assert [getattr(found, field) for field in ("qkv_bias", "qk_norm", "rope", "sliding_window")] == [
        getattr(plain, field) for field in ("qkv_bias", "qk_norm", "rope", "sliding_window")
    ]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("Llama", "use_qk_norm", True),
        ("Qwen3", "use_qk_norm", 1),
        ("Llama", "qkv_bias", True),
        ("Qwen2", "attention_bias", 1),
        ("Llama", "activation", "geglu"),
        ("Llama", "norm_type", "layernorm"),
        ("Llama", "position_embedding_type", "alibi"),
        ("Llama", "num_layers", 3),
        ("Llama", "num_kv_heads", 1),
        ("Llama", "layer_norm_epsilon_of_heads", 1e-5),
        ("Llama", "fused_scale", 2.0),
        ("Qwen3", "qk_layernorm", True),
    ],
)
def test_a_key_that_says_otherwise_is_refused(name, key, value):
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is ") as error:
        parse(name, **{key: value})
    assert error.value.param == key


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_the_original_length_is_reported_where_the_scaling_does_not_read_it(kind):
    spec = parse("Llama", rope_scaling={"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 64})
    assert "config.json: this key has no effect here: rope_scaling.original_max_position_embeddings" in spec.notes
    assert spec.rope == parse("Llama", rope_scaling={"rope_type": kind, "factor": 2.0}).rope


def test_a_factor_of_one_scales_nothing():
    assert parse("Llama", rope_scaling={"rope_type": "default", "factor": 1.0}).rope == parse("Llama").rope


def test_two_rope_sections_that_say_the_same_are_accepted():
    old = {"type": "linear", "factor": 2.0}
    both = parse("Llama", rope_scaling=old, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert both == parse("Llama", rope_scaling=old)
    with pytest.raises(CheckpointError, match=r"rope_scaling is .* rope_parameters is given too"):
        parse("Llama", rope_scaling=old, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})


def test_the_chunked_attention_of_very_long_contexts_is_reported():
    """Qwen2.5-1M's. transformers attends to the whole context in any case."""
    spec = parse("Qwen2", dual_chunk_attention_config={"chunk_size": 64, "local_size": 8})
    assert [note.split(" has ")[0] for note in spec.notes] == ["config.json: dual_chunk_attention_config"]


def test_an_end_token_that_the_vocabulary_lacks_is_reported():
    spec = parse("Llama", eos_token_id=[2, 128, -1])
    assert spec.eos_token_ids == (2,)
    assert spec.notes == ("config.json: eos_token_id [128, -1] ends nothing: the vocabulary has 128 tokens",)
    with pytest.raises(CheckpointError, match=r'eos_token_id is "x"'):
        parse("Llama", eos_token_id="x")


def test_keys_of_the_text_that_stand_around_it_too_have_no_effect():
    """Qwen2.5-VL's, as transformers 4.52 wrote it."""
    text = SIZES | {"model_type": "qwen2_5_vl_text", "sliding_window": None, "hidden_act": "silu"}
    nested = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "text_config": text}
    plain, found = parse_spec(nested), parse_spec(SIZES | {"max_position_embeddings": 64, "hidden_act": "silu"} | nested)
    assert found.max_model_len == 128
    note = "config.json: these keys have no effect, since text_config has others: max_position_embeddings"
    assert [n for n in found.notes if n not in plain.notes] == [note]
    with pytest.raises(CheckpointError, match="logit_scale is"):
        parse_spec(nested | {"logit_scale": 2.0})
