"""What a config.json leaves out means what the architecture's own config class in transformers says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, PretrainedConfig

from engine.models.config_defaults import DEFAULTS, MODEL_TYPES, SPELLINGS
from engine.models.config_keys import HARMLESS
from engine.models.config_text import TEXT_DEFAULTS, TEXT_TYPES, WRAPPERS
from engine.models.families import ARCHITECTURES

COMMON = {field.name for field in dataclasses.fields(PretrainedConfig)}
TYPES = {architecture: model_type for model_type, architecture in MODEL_TYPES.items()}
# The same number of key and query heads is all that latent attention allows, so that the class's own number has no meaning.
LATENT = {"num_key_value_heads"}
# eos_token_id is no number of the model; rope_parameters without a value means rope_theta alone.
ELSEWHERE = {"eos_token_id", "rope_parameters"}


def class_defaults(config: PretrainedConfig) -> dict[str, Any]:
    found = {f.name: f.default for f in dataclasses.fields(config) if f.name not in COMMON}
    return found | {"rope_theta": config.default_theta}


def test_every_architecture_has_its_defaults():
    assert set(DEFAULTS) == set(ARCHITECTURES) == set(TYPES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_those_of_the_config_class(name):
    config = AutoConfig.for_model(TYPES[name])
    theirs = class_defaults(config)
    for spelling, key in SPELLINGS.get(name, {}).items():
        if spelling in theirs:
            theirs.setdefault(key, theirs.pop(spelling))
    ours = dict(DEFAULTS[name])
    if "kv_lora_rank" in ours:
        ours = {k: v for k, v in ours.items() if k not in LATENT}
    if "partial_rotary_factor" in ours:
        assert config.rope_parameters["partial_rotary_factor"] == ours.pop("partial_rotary_factor")
    if "rope_parameters" in ours:
        assert ours.pop("rope_parameters").items() <= config.rope_parameters.items()
    assert {key: theirs.get(key, "absent") for key in ours} == ours
    unread = set(theirs) - set(ours) - set(HARMLESS) - ELSEWHERE - LATENT - {"head_dim"}
    assert not unread, "the class has keys that are neither read nor harmless"


@pytest.mark.parametrize("text_type", TEXT_TYPES)
def test_defaults_of_a_text_model_inside_are_those_of_its_class(text_type):
    config = AutoConfig.for_model(text_type)
    theirs = class_defaults(getattr(config, "text_config", config))
    ours = DEFAULTS[TEXT_TYPES[text_type]] | TEXT_DEFAULTS.get(text_type, {})
    ours = {key: value for key, value in ours.items() if key != "rope_parameters"}
    assert {key: theirs.get(key, ours[key]) for key in ours} == ours


@pytest.mark.parametrize("name", WRAPPERS)
def test_whether_the_head_is_the_embedding_is_the_class_default(name):
    model_type = getattr(transformers, name).config_class.model_type
    assert AutoConfig.for_model(model_type).tie_word_embeddings == WRAPPERS[name]
