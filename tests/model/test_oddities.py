"""Every family with the oddities of published config files: log-probabilities equal transformers', or the key is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import oddities
import pytest
import torch
from oddities import FAMILIES, Config, edited, make, ours, theirs

LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
ORIGINAL = "original_max_position_embeddings"
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
PARTIAL = ("glm4_moe", "minimax_m2")


def rope(section: dict[str, Any], **top: Any) -> Callable[[Config], None]:
    """Replace the rotary settings by `section`, in the form of transformers 4, and set keys at the top level."""

    def edit(config: Config) -> None:
        old = config.pop("rope_parameters")
        kept = {"llama_4_scaling_beta": old["llama_4_scaling_beta"]} if "llama_4_scaling_beta" in old else {}
        kept |= {ORIGINAL: 32} if kept and ORIGINAL not in (section | top) else {}
        config.update({"rope_theta": 1e3, "rope_scaling": section | kept} | top)

    return edit


def both_spellings(config: Config) -> None:
    rope(LINEAR)(config)
    config["rope_parameters"] = config["rope_scaling"] | {"rope_theta": config["rope_theta"]}


def put(**values: Any) -> Callable[[Config], None]:
    return lambda config: config.update(values)


# Edits whose result must equal transformers' in every family.
COMPUTED = {
    "another epsilon": put(rms_norm_eps=0.01),
    "linear": rope(LINEAR),
    "yarn": rope(YARN),
    "yarn, attention_factor and betas": rope(YARN | {"attention_factor": 0.8, "beta_fast": 8, "beta_slow": 2}),
    "yarn, uneven mscale": rope(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn, not truncated, original at the top": rope({"type": "yarn", "factor": 4.0, "truncate": False}, **{ORIGINAL: 32}),
    "yarn, two originals": rope(YARN | {ORIGINAL: 64}, **{ORIGINAL: 16}),
    "llama3": rope(LLAMA3 | {ORIGINAL: 32}),
    "llama3, original at the top": rope(LLAMA3, **{ORIGINAL: 32}),
    "training, records and metadata": put(
        pretraining_tp=2, attention_dropout=0.5, use_cache=False, initializer_range=0.5, our_dataset="x", transformers_version="9"
    ),
    "window of the whole context": put(sliding_window=128, use_sliding_window=True, max_window_layers=1, layer_types=None),
    "linear and dynamic do not read the original length": rope(LINEAR | {ORIGINAL: 32}),
    "yarn, truncate null": rope(YARN | {"beta_fast": 3.0, "truncate": None}),
    "both spellings of rope": both_spellings,
}
# Edits that are refused in every family, by their key.
REFUSED = {
    "logit_scale": put(logit_scale=0.5),
    "attn_logit_softcapping": put(attn_logit_softcapping=30.0),
    "hidden_act": put(hidden_act="gelu"),
    "mlp_bias": put(mlp_bias=True),
    "rope_scaling.rope_type": rope(LONG),
    "rope_scaling.temperature": rope(YARN | {"temperature": 2.0}),
    "layer_types": put(layer_types=["chunked_attention", "full_attention"]),
    "quantization_config.quant_method": put(quantization_config={"quant_method": "awq", "bits": 4}),
    "num_local_experts_per_layer": put(num_local_experts_per_layer=4),
    "max_model_len": put(sliding_window=8, use_sliding_window=True, max_window_layers=0, layer_types=None),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "plain"
    return request.param, make(request.param, folder)


def assert_equal(folder) -> None:
    found, wanted = ours(folder), theirs(folder)
    assert found.error is None, found.error
    assert found.logprobs is not None
    assert wanted is not None, "transformers cannot compute this folder"
    torch.testing.assert_close(found.logprobs, wanted, atol=1e-4, rtol=0.0)


def test_what_config_json_asks_for_is_what_transformers_computes(family, tmp_path):
    name, plain = family
    assert_equal(plain)
    base = ours(plain).logprobs
    for label, edit in COMPUTED.items():
        folder = edited(plain, tmp_path / label, edit)
        try:
            assert_equal(folder)
        except AssertionError as error:
            raise AssertionError(f"{name}: {label}") from error
        same = label.startswith(("training", "window"))
        assert torch.equal(ours(folder).logprobs, base) == same, f"{name}: {label}"


def test_what_is_not_computed_is_refused_by_its_key(family, tmp_path):
    name, plain = family
    for key, edit in REFUSED.items():
        found = ours(edited(plain, tmp_path / key, edit))
        assert found.error is not None, f"{name}: {key} is accepted"
        assert found.error.param == key, f"{name}: {found.error.message}"


def test_a_key_that_is_left_out_has_the_familys_default(family, tmp_path):
    name, plain = family
    compared = 0
    # transformers finds no class without model_type, and SmolLM3's default of pad_token_id is not in this vocabulary.
    for key in set(json.loads((plain / "config.json").read_text())) - {"model_type", "pad_token_id"}:
        folder = edited(plain, tmp_path / key, lambda config, key=key: config.pop(key))
        found = ours(folder)
        if found.error is None:
            compared += 1
            wanted = theirs(folder)
            assert wanted is not None, f"{name}: {key} is left out, and transformers cannot compute it"
            torch.testing.assert_close(found.logprobs, wanted, atol=1e-4, rtol=0.0, msg=f"{name}: {key} is left out")
    assert compared > 12


def test_rope_parameters_of_null_are_the_familys_default(family, tmp_path):
    _, plain = family
    assert_equal(edited(plain, tmp_path / "null", put(rope_parameters=None, rope_theta=1e3)))


def test_dynamic_scaling_changes_nothing_up_to_the_end_of_the_context(family, tmp_path):
    _, plain = family
    assert_equal(edited(plain, tmp_path / "dynamic", rope({"type": "dynamic", "factor": 4.0})))


def test_a_part_of_each_head_is_rotated_or_refused(family, tmp_path):
    name, plain = family

    def edit(config: Config) -> None:
        config.pop("rotary_dim", None)
        config["rope_parameters"]["partial_rotary_factor"] = 0.25

    folder = edited(plain, tmp_path / "partial", edit)
    if name in PARTIAL:
        assert_equal(folder)
        assert not torch.equal(ours(folder).logprobs, ours(plain).logprobs)
    else:
        assert ours(folder).error.param == "rope_parameters.partial_rotary_factor"


def test_a_head_in_the_file_is_used_whatever_the_config_says_about_ties(family, tmp_path, caplog):
    _, plain = family
    other = edited(plain, tmp_path / "other", put(tie_word_embeddings=True))
    with caplog.at_level("WARNING", logger="tidegate.engine"):
        assert_equal(other)
    assert "lm_head.weight differs from it and is used" in caplog.text
    assert torch.equal(ours(other).logprobs, ours(plain).logprobs)


@pytest.mark.parametrize("copied", [True, False])
def test_a_tied_head_may_be_in_the_file_or_not(family, copied, tmp_path, caplog):
    _, plain = family

    def tie(tensors) -> None:
        del tensors["lm_head.weight"]
        if copied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert_equal(edited(plain, tmp_path / "tied", put(tie_word_embeddings=True), tie))
    assert "differs" not in caplog.text


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_matrix_of_embedding_and_head_may_have_the_heads_name(family, prefix, tmp_path):
    """Files that were saved without the head have no prefix, as Qwen3-Embedding's."""
    _, plain = family

    def rename(tensors) -> None:
        kept = "lm_head.weight" if prefix else "model.embed_tokens.weight"
        del tensors["model.embed_tokens.weight" if prefix else "lm_head.weight"]
        found = {name.replace("model.", prefix, 1): tensors.pop(name) for name in list(tensors) if name != kept or not prefix}
        tensors.update(found)

    assert_equal(edited(plain, tmp_path / "renamed", put(tie_word_embeddings=True), rename))


def test_double_precision_and_heads_of_training_are_no_obstacle(family, tmp_path):
    _, plain = family

    def edit(tensors) -> None:
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})
        tensors["v_head.summary.weight"] = torch.ones(1, 32)

    assert_equal(edited(plain, tmp_path / "double", None, edit))


def test_scales_of_a_quantised_cache_and_old_buffers_are_left_out_and_reported(family, tmp_path, caplog):
    _, plain = family

    def add(tensors) -> None:
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.k_scale"] = torch.tensor(0.5)
            tensors[f"model.layers.{i}.self_attn.v_proj.v_scale"] = torch.tensor([0.5])
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    with caplog.at_level("INFO", logger="tidegate.engine"):
        folder = edited(plain, tmp_path / "scales", None, add)
        assert torch.equal(ours(folder).logprobs, ours(plain).logprobs)
    for name in ("self_attn.k_scale", "self_attn.v_proj.v_scale", "self_attn.rotary_emb.inv_freq"):
        assert f"model.layers.*.{name}" in caplog.text
    assert "4 tensors are not used: model.layers.*.self_attn.k_scale" in caplog.text


def test_vectors_that_are_not_finite_are_refused_by_their_names(family, tmp_path):
    _, plain = family
    for name, tensor in oddities.load_file(plain / "model.safetensors").items():
        if tensor.dim() == 1:

            def spoil(tensors, name=name) -> None:
                tensors[name][1] = torch.nan

            found = ours(edited(plain, tmp_path / name, None, spoil))
            assert f"tensor {name} holds NaN or infinity" in found.error.message
