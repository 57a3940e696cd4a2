"""Every key of a config.json is computed, refused by its name, reported by its name, or harmless for a reason in a table."""

from __future__ import annotations

import json

import pytest

from engine.errors import CheckpointError
from engine.models.config_defaults import DEFAULTS
from engine.models.config_keys import HARMLESS, HARMLESS_IN
from engine.models.families import ARCHITECTURES, parse_spec, read_spec

BASE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
EXTRA = {"no_rope_layers": [1, 1, 1], "num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
# Keys of other families, each with a value that would change the numbers of the family that has it.
FOREIGN = {
    "logit_scale": 0.0625,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_traditional": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015,
    "logits_scaling": 8.0,
    "query_pre_attn_scalar": 256,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "clip_qkv": 8.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_post_norm": True,
    "qk_layernorm": True,
    "swiglu_limit": 7.0,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "use_parallel_residual": True,
    "alibi": True,
    "lm_head_bias": True,
    "position_embedding_type": "relative_key",
    "attention_sink_size": 4,
    "is_causal": False,
    "use_rope": False,
    "use_bidirectional_attention": "all",
    "sliding_window_pattern": 6,
    "num_kv_shared_layers": 2,
    "router_scaling": 0.0,
}


def config(name: str, **more: object) -> dict[str, object]:
    own = {key: value for key, value in EXTRA.items() if key in DEFAULTS[name]}
    return {"architectures": [name], **BASE, **own, **more}


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_key_of_another_family_is_refused_by_its_name(name, key):
    assert not parse_spec(config(name)).notes
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is ") as error:
        parse_spec(config(name, **{key: FOREIGN[key]}))
    assert error.value.param == key


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"SeedOssForCausalLM"}))
def test_seed_oss_alone_has_a_key_for_the_bias_of_the_output(name):
    with pytest.raises(CheckpointError, match="attention_out_bias is true"):
        parse_spec(config(name, attention_out_bias=True))
    assert parse_spec(config("SeedOssForCausalLM", attention_out_bias=True)).o_bias


@pytest.mark.parametrize(
    ("key", "value"),
    [("logit_scale", 1.0), ("attn_logit_softcapping", None), ("attention_out_bias", False), ("residual_multiplier", 1)],
)
def test_a_setting_that_is_switched_off_is_accepted_and_reported(key, value):
    notes = parse_spec(config("LlamaForCausalLM", **{key: value})).notes
    assert notes == (() if value is None else (f"config.json: these keys have no effect here: {key}",))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_that_nobody_knows_are_reported_by_their_names(name):
    spec = parse_spec(config(name, my_dataset="x", run={"nested": {"logit_scale": 2}}, trained=True, nothing=None))
    assert spec.notes == ("config.json: these keys have no effect here: my_dataset, run, trained",)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_harmless_keys_change_nothing(name):
    """They are not even reported, so the table is the only place that could let a difference pass in silence."""
    plain = parse_spec(config(name))
    for key in HARMLESS | HARMLESS_IN.get(name, {}):
        yarn = name == "Ministral3ForCausalLM" and key == "original_max_position_embeddings"  # its default reads the key
        if key not in ("model_type", "architectures") and not yarn:
            assert parse_spec(config(name, **{key: 3})) == plain, key


def test_each_harmless_key_has_a_reason():
    tables = [HARMLESS, *HARMLESS_IN.values()]
    assert all(len(reason.split()) > 3 for table in tables for reason in table.values())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        (YARN | {"temperature": 2.0}, "temperature"),
        (YARN | {"low_freq_factor": 1.0}, "low_freq_factor"),
        (YARN | {"type": "linear"}, "type"),
        (YARN | {"attn_factor": 0.9, "attention_factor": 0.9}, "attn_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}, "rope_type"),
        ({"type": "su", "short_factor": [1.0], "long_factor": [1.0]}, "type"),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_a_rope_section_asks_for_and_is_not_computed_is_refused_by_its_key(place, section, key):
    with pytest.raises(CheckpointError, match=rf"config\.json: {place}\.{key} is "):
        parse_spec(config("LlamaForCausalLM", **{place: section}))


def test_keys_of_a_rope_section_that_change_nothing_for_a_text_are_accepted():
    section = {"rope_type": "default", "mrope_section": [2, 1, 1], "finetuned": True, "factor": None}
    assert parse_spec(config("LlamaForCausalLM", rope_scaling=section)) == parse_spec(config("LlamaForCausalLM"))


def test_two_rope_sections_must_agree():
    with pytest.raises(CheckpointError, match=r"rope_scaling is .* rope_parameters is given too"):
        parse_spec(config("LlamaForCausalLM", rope_scaling=YARN, rope_parameters=YARN | {"factor": 2.0}))
    both = parse_spec(config("LlamaForCausalLM", rope_scaling=YARN, rope_parameters=YARN))
    assert both == parse_spec(config("LlamaForCausalLM", rope_scaling=YARN))


def test_of_two_thetas_the_one_that_has_no_effect_is_reported():
    spec = parse_spec(config("LlamaForCausalLM", rope_theta=1e6, rope_parameters={"rope_theta": 5e5}))
    assert spec.rope.theta == 5e5
    assert spec.notes == ("config.json: rope_theta 1e+06 has no effect: rope_parameters.rope_theta is 500000",)


def test_dynamic_scaling_begins_where_the_context_ends():
    scaled = parse_spec(config("LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=128))
    assert (scaled.max_model_len, scaled.rope.scaling) == (128, "default")
    assert "begins past 128 tokens" in scaled.notes[0]


@pytest.mark.parametrize("factors", [{"attn_factor": 0.8782488562869419}, {"attention_factor": 1.0}])
def test_the_factor_of_attention_under_yarn_is_read(factors):
    """DeepSeek-R1-0528-Qwen3-8B undoes by attn_factor what YaRN would do to attention."""
    section = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | factors
    spec = parse_spec(config("Qwen3ForCausalLM", rope_scaling=section, max_position_embeddings=131072))
    assert spec.rope.magnitude == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_the_original_context_may_be_at_the_top_level(kind):
    key, section = "original_max_position_embeddings", {"rope_type": kind, "factor": 8.0}
    section |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    outer = parse_spec(config("LlamaForCausalLM", rope_scaling=section, **{key: 32}))
    assert outer == parse_spec(config("LlamaForCausalLM", rope_scaling=section | {key: 32}))
    both = parse_spec(config("LlamaForCausalLM", rope_scaling=section | {key: 64}, **{key: 32}))
    assert both.rope.original_max_len == 32
    assert "original_max_position_embeddings is 32" in both.notes[0]


def test_two_spellings_of_a_key_must_agree():
    with pytest.raises(CheckpointError, match="num_local_experts is 16: n_routed_experts is 8"):
        parse_spec(config("DeepseekV3ForCausalLM", num_local_experts=16))
    name = "Qwen3MoeForCausalLM"
    found = parse_spec(config(name, num_local_experts=16)), parse_spec(config(name, num_local_experts=16, num_experts=16))
    assert found[0] == found[1] == parse_spec(config(name, num_experts=16))
    with pytest.raises(CheckpointError, match=r"num_local_experts is 1: it must be|num_experts_per_tok is 2"):
        parse_spec(config(name, num_local_experts=1))


QUANTIZED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "modelopt": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
    "mxfp4": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_format(name):
    with pytest.raises(CheckpointError, match=rf"quantization_config\.quant_method .*in the format {name}"):
        parse_spec(config("LlamaForCausalLM", quantization_config=QUANTIZED[name]))


def test_mlx_weights_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"config\.json: quantization is .*in the format MLX"):
        parse_spec(config("LlamaForCausalLM", quantization={"group_size": 64, "bits": 4}))


def test_an_fp8_section_may_say_which_tensors_are_not_fp8_and_nothing_unknown():
    fp8 = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate"]}
    assert parse_spec(config("MiniMaxM2ForCausalLM", quantization_config=fp8)).fp8 is not None
    with pytest.raises(CheckpointError, match=r"quantization_config\.zero_point is "):
        parse_spec(config("MiniMaxM2ForCausalLM", quantization_config=fp8 | {"zero_point": 3}))


def folder(tmp_path, files, **more):
    (tmp_path / "config.json").write_text(json.dumps(config("LlamaForCausalLM", **more)))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("algo", ["FP8", "NVFP4"])
def test_a_modelopt_folder_is_refused_by_the_name_of_its_format(tmp_path, algo):
    files = {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algo}}}
    with pytest.raises(CheckpointError, match=rf"hf_quant_config\.json: quantization\.quant_algo is .*ModelOpt {algo}"):
        read_spec(folder(tmp_path, files))


def test_a_modelopt_folder_with_a_quantised_kv_cache_alone_is_served(tmp_path):
    files = {"hf_quant_config.json": {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}}
    assert "kv_cache_quant_algo FP8 has no effect" in read_spec(folder(tmp_path, files)).notes[0]


@pytest.mark.parametrize(
    ("file", "content", "tool"),
    [("quantize_config.json", {"bits": 4}, "GPTQ"), ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "AWQ")],
)
def test_a_tools_own_file_names_the_format(tmp_path, file, content, tool):
    with pytest.raises(CheckpointError, match=rf"{file}: .*in the format {tool}"):
        read_spec(folder(tmp_path, {file: content}))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model-Q4_K_M.gguf", "GGUF is not supported"),
        ("adapter_config.json", "merge it into its base model"),
        ("params.json", "Mistral's own format"),
        ("pytorch_model.bin", "pickled files are never read; load it with transformers and save it"),
    ],
)
def test_a_folder_of_another_format_is_named(tmp_path, file, words):
    (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=rf"no config\.json, but {file}: .*{words}"):
        read_spec(tmp_path)


TEXT = {"model_type": "mistral", **BASE, "sliding_window": None}
WRAPPED = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "dtype": "bfloat16",
    "text_config": TEXT,
    "vision_config": {"hidden_size": 7, "logit_scale": 3},
    "image_token_index": 10,
    "multimodal_projector_bias": True,
    "spatial_merge_size": 2,
}


def test_the_text_model_inside_another_is_read():
    spec = parse_spec(WRAPPED)
    inner = parse_spec({"architectures": ["MistralForCausalLM"], **TEXT})
    assert spec.notes == ("config.json: only the text model of Mistral3ForConditionalGeneration is served; images are not",)
    assert (spec.architecture, spec.rope, spec.dtype) == (inner.architecture, inner.rope, "bfloat16")
    assert spec.tie_embeddings  # by default; a head in the file is used all the same


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"text_config": TEXT | {"logit_scale": 2.0}}, "text_config.logit_scale"),
        ({"text_config": TEXT | {"num_key_value_heads": 3}}, "text_config.num_key_value_heads"),
        ({"text_config": TEXT | {"model_type": "gemma3_text"}}, "text_config.model_type"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "architectures"),
    ],
)
def test_keys_inside_and_around_the_text_model_are_judged(change, key):
    with pytest.raises(CheckpointError) as error:
        parse_spec(WRAPPED | change)
    assert error.value.param == key


def test_older_files_have_the_texts_keys_at_the_top_level():
    flat = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **BASE, "vision_config": {}}
    spec = parse_spec(flat | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}})
    assert (spec.architecture, spec.qkv_bias, spec.rope.theta) == ("Qwen2ForCausalLM", True, 1e6)


def test_a_file_without_architectures_is_judged_by_its_model_type():
    assert parse_spec({"model_type": "seed_oss", **BASE}).architecture == "SeedOssForCausalLM"
