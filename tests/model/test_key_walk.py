"""Changes every key of every family's config.json: no change may pass in silence.

A change must alter the log-probabilities or the limits, be reported by the key's name, or be refused. Only keys whose table says
why they are harmless may change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oddities import FAMILIES, Config, Ours, make, ours

from engine.models.config_defaults import DEFAULTS, SPELLINGS
from engine.models.config_keys import HARMLESS, HARMLESS_IN, HARMLESS_INSIDE

# Keys that no config of `oddities` has, with the value that is like their absence.
OPTIONAL: Config = {
    "scoring_func": None,
    "topk_method": None,
    "moe_layer_freq": 1,
    "qk_head_dim": None,
    "num_nextn_predict_layers": 1,
    "use_routing_bias": True,
    "qk_norm_type": "per_layer",
    "attn_type_list": [1, 1],
    "layernorm_mlp_beta": 1.0,
    "shared_intermediate_size": 0,
    "num_mtp_modules": 1,
    "mtp_transformer_layers": 1,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "torch_dtype": None,
    "dtype": "float32",
}
# Keys that change which tensors may be left out, and thus nothing in a file that has none of them.
LEAVE_OUT = {"num_nextn_predict_layers", "num_mtp_modules", "mtp_transformer_layers"}
ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 1.0} | ORIGINAL
SECTIONS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
    "yarn": YARN | {"truncate": True, "mscale": 1.0, "mscale_all_dim": 0.5, "attn_factor": 0.9},
    "yarn with its factor": YARN | {"attention_factor": 0.9},
}


ROPE_KEYS = ("rotary_dim", "rope_parameters", "rope_theta", "partial_rotary_factor")


def changes(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value + 0.37, value * 4 + 3]
    if isinstance(value, list):
        return [[*value, *value], [1 - v for v in value] if all(type(v) is int for v in value) else ["other"] * len(value)]
    return ["other"] if isinstance(value, str) else [3]


def is_told(key: str, value: Any, plain: Ours, ask: Callable[[Any], Ours]) -> bool:
    """Whether a change of `key` from `value` shows: as an error, in the limits, in the log, or in the numbers.

    A number that is rounded may show in the larger change only.
    """

    def shows(found: Ours) -> bool:
        if found.error is not None:
            return True
        assert found.logprobs is not None
        return found.limits != plain.limits or key in found.notes or not torch.equal(found.logprobs, plain.logprobs)

    return any(shows(ask(changed)) for changed in changes(value))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = make(request.param, tmp_path_factory.mktemp(request.param) / "plain")
    architecture = FAMILIES[request.param][0]
    written = json.loads((folder / "config.json").read_text())
    # Another spelling of a key that is there too would only be refused for differing from it.
    config = DEFAULTS[architecture] | {SPELLINGS.get(architecture, {}).get(key, key): value for key, value in written.items()}
    if "use_sliding_window" in config:  # a window that only this key keeps from being one
        config |= {"layer_types": None, "sliding_window": 8, "max_window_layers": 1}
    return architecture, folder, config


def test_no_key_changes_in_silence(family):
    architecture, folder, config = family
    plain = ours(folder, config)
    assert plain.error is None, plain.error
    harmless = HARMLESS | HARMLESS_IN.get(architecture, {})
    silent = {
        key
        for key, value in (OPTIONAL | config).items()
        if key not in harmless and key not in LEAVE_OUT and not isinstance(value, dict)
        if not is_told(key, value, plain, lambda changed, key=key: ours(folder, config | {key: changed}))
    }
    assert not silent


@pytest.mark.parametrize("kind", SECTIONS)
def test_no_key_of_a_rope_section_changes_in_silence(family, kind):
    architecture, folder, config = family
    if kind == "llama3" and architecture == "Ministral3ForCausalLM":
        pytest.skip("its queries are scaled by the same original context")
    section = SECTIONS[kind] | {"rope_theta": 10.0, "partial_rotary_factor": 0.5 if "Glm4MoeFor" in architecture else 1.0}
    config = {k: v for k, v in config.items() if k not in ROPE_KEYS}
    plain = ours(folder, config | {"rope_scaling": section})
    silent = {
        key
        for key, value in section.items()
        if not is_told(
            key, value, plain, lambda changed, key=key: ours(folder, config | {"rope_scaling": section | {key: changed}})
        )
    }
    assert plain.error is None, plain.error
    assert not silent


def test_settings_of_each_family_show_in_its_numbers(family):
    """The walk above would pass with a model that refuses everything."""
    _, folder, config = family
    plain = ours(folder, config)
    wanted = {"rms_norm_eps", "num_experts_per_tok", "routed_scaling_factor", "topk_group"} & set(config)
    for key in wanted:
        found = [ours(folder, config | {key: changed}).logprobs for changed in changes(config[key])]
        assert any(logprobs is not None and not torch.equal(logprobs, plain.logprobs) for logprobs in found), key


def test_the_harmless_keys_of_an_object_have_reasons():
    assert all(len(reason.split()) > 3 for table in HARMLESS_INSIDE.values() for reason in table.values())
    assert set(HARMLESS_INSIDE) == {"rope", "quantization_config"}
