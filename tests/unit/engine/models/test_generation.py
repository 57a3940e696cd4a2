"""Tests the sampling defaults of generation_config.json."""

import json

import pytest

from engine.errors import CheckpointError
from engine.models.generation import GenerationDefaults, read_generation_defaults


@pytest.fixture
def read(tmp_path):
    def read(**keys):
        (tmp_path / "generation_config.json").write_text(json.dumps(keys))
        return read_generation_defaults(tmp_path)

    return read


def test_a_folder_without_the_file_has_no_defaults(tmp_path):
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


def test_published_defaults_are_read(read):
    found = read(
        bos_token_id=151643,
        pad_token_id=151643,
        do_sample=True,
        eos_token_id=[151645, 151643],
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        min_p=0.0,
        repetition_penalty=1.05,
        max_new_tokens=2048,
        transformers_version="4.51.0",
        _from_model_config=True,
    )
    params = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05, "max_tokens": 2048}
    assert found == GenerationDefaults(params=params)


def test_null_says_nothing(read):
    keys = dict.fromkeys(["temperature", "top_k", "max_new_tokens", "suppress_tokens", "bad_words_ids", "typical_p", "do_sample"])
    assert read(**keys) == GenerationDefaults()


@pytest.mark.parametrize(
    ("keys", "temperature"), [({"do_sample": False, "temperature": 0.7}, 0.0), ({"do_sample": True}, None), ({}, None)]
)
def test_without_sampling_the_default_temperature_is_0(read, keys, temperature):
    assert read(**keys).params.get("temperature") == temperature


def test_forbidden_tokens_are_bad_words(read):
    assert read(suppress_tokens=[7, 9], bad_words_ids=[[1, 2], [7]]).bad_words == ((1, 2), (7,), (9,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("begin_suppress_tokens", [220]),
        ("forced_bos_token_id", 5),
        ("forced_eos_token_id", 5),
        ("num_beams", 4),
        ("guidance_scale", 1.5),
        ("typical_p", 0.9),
        ("epsilon_cutoff", 0.01),
        ("eta_cutoff", 0.01),
        ("penalty_alpha", 0.6),
        ("encoder_repetition_penalty", 1.2),
        ("min_new_tokens", 2),
        ("stop_strings", ["x"]),
        ("sequence_bias", {"5": 1.0}),
        ("exponential_decay_length_penalty", [1, 1.1]),
        ("a_key_of_tomorrow", 1),
    ],
)
def test_what_is_not_honoured_is_reported_by_its_name(read, key, value):
    assert read(**{key: value}).not_honoured == (key,)


def test_a_value_that_asks_for_nothing_is_not_reported(read):
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1.0, "stop_strings": [], "token_healing": False}
    assert read(**neutral, max_length=4096, use_cache=True).not_honoured == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
        ("suppress_tokens", 5),
        ("suppress_tokens", ["a"]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[5] * 65]),  # no request could have it
        ("bad_words_ids", [5]),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(read, key, value):
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is ") as caught:
        read(**{key: value})
    assert caught.value.param == key
