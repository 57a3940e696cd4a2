"""Tests the request schemas: ranges, refusals by name, and the cost of bodies with many faults."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.errors import InvalidRequest, UnsupportedField
from engine.models.generation import GenerationDefaults
from engine.request import BOUNDS, SamplingParams
from server.errors import from_validation
from server.http.schemas.generate import GenerateBody
from server.http.schemas.openai import ChatBody, CompletionBody
from server.http.schemas.service import DetokenizeBody

MESSAGES = [{"role": "user", "content": "x"}]
PLAIN = [
    (GenerateBody, {"prompt": "x"}),
    (CompletionBody, {"model": "m", "prompt": "x"}),
    (ChatBody, {"model": "m", "messages": MESSAGES}),
]
NUMBERS = sorted(set(BOUNDS) - {"logit_bias", "logprobs"})


def read(model, value):
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(("model", "plain"), PLAIN)
def test_both_ends_of_a_range_are_accepted_and_values_beyond_are_refused(model, plain, name):
    low, high, _ = BOUNDS[name]
    for value in (low, high):
        assert getattr(read(model, {**plain, name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(InvalidRequest) as caught:
            read(model, {**plain, name: value})
        assert caught.value.param == name


def test_every_sampling_parameter_is_a_field_of_generate():
    assert set(SamplingParams.__struct_fields__) - {"end_token_ids"} <= set(GenerateBody.model_fields)


@pytest.mark.parametrize(
    ("model", "field", "without_effect"),
    [(m, f, v) for m in (CompletionBody, ChatBody) for f, values in m.UNSUPPORTED.items() for v in (None, *values)],
)
def test_an_unsupported_field_is_accepted_with_a_value_that_has_no_effect(model, field, without_effect):
    plain = dict(PLAIN)[model]
    assert read(model, {**plain, field: without_effect}) == read(model, plain)


@pytest.mark.parametrize(("model", "field"), [(m, f) for m in (CompletionBody, ChatBody) for f in m.UNSUPPORTED])
@pytest.mark.parametrize("value", ["something", 7, {"type": "x"}, [1], 1e300])
def test_an_unsupported_field_is_refused_by_name(model, field, value):
    with pytest.raises(UnsupportedField) as caught:
        read(model, {**dict(PLAIN)[model], field: value})
    assert caught.value.param == field


def test_the_value_true_is_not_taken_for_the_number_one():
    with pytest.raises(UnsupportedField):
        read(CompletionBody, {"model": "m", "prompt": "x", "best_of": True})


def test_no_field_is_both_supported_and_unsupported():
    for model in (CompletionBody, ChatBody):
        assert not model.UNSUPPORTED.keys() & model.model_fields.keys()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize(("model", "plain"), PLAIN)
@given(data=st.data())
def test_generated_bodies_are_read_or_refused_as_invalid(model, plain, data):
    names = st.sampled_from(sorted({*model.model_fields, *model.UNSUPPORTED}))
    value = {**plain, **data.draw(st.dictionaries(names, json_values, max_size=3))}
    if model is ChatBody and data.draw(st.booleans()):
        keys = st.sampled_from(["role", "content", "name", "type", "tool_calls"])
        value["messages"] = data.draw(st.lists(st.dictionaries(keys, json_values) | json_values, max_size=3))
    with contextlib.suppress(InvalidRequest):  # any other exception fails the test
        read(model, value).sampling(GenerationDefaults(), max_tokens=4, logprobs=None)


def faults(model, value):
    """Return the number of faults that pydantic finds in `value`. Pydantic spends time on each fault."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return caught.value.error_count()


MANY = 50_000
LONG_LISTS = [
    (GenerateBody, {"prompt_token_ids": [-1] * MANY}),
    (GenerateBody, {"prompt": "x", "stop": [1] * MANY}),
    (CompletionBody, {"model": "m", "prompt": [-1] * MANY}),
    (CompletionBody, {"model": "m", "prompt": [[-1] * MANY] * 3}),
    (CompletionBody, {"model": "m", "prompt": ["", *[1] * MANY]}),
    (ChatBody, {"model": "m", "messages": [1] * MANY}),
    (ChatBody, {"model": "m", "messages": [1] * 4000}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": [1] * MANY}] * 3}),
    (DetokenizeBody, {"tokens": [-1] * MANY}),
]


@pytest.mark.parametrize(("model", "value"), LONG_LISTS)
def test_a_long_list_is_refused_at_its_first_fault(model, value):
    assert faults(model, value) == 1


KEYS = {f"k{i}": 1 for i in range(MANY)}
LARGE_OBJECTS = [
    (GenerateBody, {"prompt": "x", **KEYS}, "k0"),
    (GenerateBody, {"prompt": "x", "logit_bias": KEYS}, "logit_bias"),
    (ChatBody, {"model": "m", "messages": MESSAGES, "metadata": KEYS}, "metadata"),
    (ChatBody, {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": KEYS}, "stream_options.k0"),
    (ChatBody, {"model": "m", "messages": [{**MESSAGES[0], **KEYS}]}, "messages[0].k0"),
]


@pytest.mark.parametrize(("model", "value", "param"), LARGE_OBJECTS)
def test_an_object_with_many_unknown_keys_is_refused_for_one_of_them(model, value, param):
    assert faults(model, value) == 1
    with pytest.raises(InvalidRequest) as caught:
        read(model, value)
    assert caught.value.param == param


@pytest.mark.parametrize("key", ["01", "00", "+1", "-1", "1 ", "1_0", "٣", "1.0", ""])
def test_a_token_id_in_logit_bias_has_a_single_spelling(key):
    with pytest.raises(InvalidRequest) as caught:
        read(GenerateBody, {"prompt": "x", "logit_bias": {key: 1, "1": 2}})
    assert caught.value.param.startswith("logit_bias")
    assert read(GenerateBody, {"prompt": "x", "logit_bias": {"0": 1, "10": 2}}).logit_bias == {"0": 1, "10": 2}


@pytest.mark.parametrize("at", [0, 16_383, 16_384, 40_000, 49_999])
@pytest.mark.parametrize("wrong", [-1, 2**31, True, 1.0, "1", None])
def test_a_fault_in_a_long_list_of_token_ids_is_found_at_its_place(at, wrong):
    ids = [5] * 50_000
    assert read(DetokenizeBody, {"tokens": ids}).tokens == ids
    ids[at] = wrong
    with pytest.raises(InvalidRequest) as caught:
        read(DetokenizeBody, {"tokens": ids})
    assert caught.value.param == f"tokens[{at}]"
