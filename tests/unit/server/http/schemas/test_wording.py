"""Tests that errors speak of the client's field in our words: no wording of pydantic, no Python types, no regular expression."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.errors import InvalidRequest
from server.errors import from_validation
from server.http.schemas.generate import GenerateBody
from server.http.schemas.openai import ChatBody, CompletionBody
from server.http.schemas.service import DetokenizeBody, TokenizeBody

MESSAGES = [{"role": "user", "content": "x"}]
BODIES = [
    (GenerateBody, {"prompt": "x"}),
    (CompletionBody, {"prompt": "x", "stream": True}),
    (ChatBody, {"messages": MESSAGES}),
    (TokenizeBody, {"prompt": "x"}),
    (DetokenizeBody, {"tokens": [1]}),
]
LIBRARY = re.compile(
    r"input|should|valid (str|int|bool|dict|list|num)|integer|boolean|dictionary|instance|pydantic|validat|pattern|match"
    r"|extra|tuple|none\b|parse|[\^$\\]|\[key\]|#\w|schema|python|discriminat|union|tag\b|Body\b",
    re.IGNORECASE,
)
WRONG = st.one_of(
    st.booleans(),
    st.sampled_from([-1, 10**6, 2**70, 10**400, 1.5, 1e300, float("inf"), float("nan"), "", "q", "q" * 70_000, [], [[]], {}]),
    st.sampled_from([["q"], [""], [-1], [1.5], [{}], [None], ["q"] * 1100, [1] * 300, [[1], ["q"]], [{"role": "q"}]]),
    st.sampled_from([{"q": 1}, {"01": 1}, {"1": "q"}, {"1": 1e9}, {str(i): 1 for i in range(1100)}, {"type": "q"}]),
    st.sampled_from([[{"role": "user", "content": c}] for c in (5, None, [], [5], [{}], [{"type": "text", "text": 5}], {})]),
)


def refusal(model, value):
    """Return the error for `value`, or None if it is valid."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        return from_validation(error)
    except InvalidRequest as error:
        return error
    return None


@pytest.mark.parametrize(("model", "plain"), BODIES)
@given(data=st.data())
def test_no_refusal_has_the_words_of_a_library(model, plain, data):
    name = data.draw(st.sampled_from(sorted(model.model_fields)))
    error = refusal(model, {**plain, name: data.draw(WRONG)})
    if error is not None:
        assert error.param
        assert error.param.split("[")[0].split(".")[0] in {*model.model_fields}
        words = error.message.replace(error.param, "")
        assert not LIBRARY.search(words), error.message


@pytest.mark.parametrize(
    ("model", "value", "message"),
    [
        (GenerateBody, {"temperature": "hot"}, "temperature must be a number"),
        (GenerateBody, {"temperature": -1}, "temperature must be at least 0.0"),
        (GenerateBody, {"n": 1.5}, "n must be a whole number"),
        (GenerateBody, {"n": True}, "n must be a whole number"),
        (GenerateBody, {"stream": "yes"}, "stream must be true or false"),
        (GenerateBody, {"stop": ["a", ""]}, "stop[1] must not be empty"),
        (GenerateBody, {"stop": 5}, "stop must be a string or a list of strings"),
        (GenerateBody, {"logit_bias": {"-1": 1}}, "logit_bias.-1 is not a token id: write it in decimal digits"),
        (GenerateBody, {"logit_bias": [1]}, "logit_bias must be an object"),
        (GenerateBody, {"logit_bias": dict.fromkeys(map(str, range(2000)), 1)}, "logit_bias must have at most 1024 entries"),
        (GenerateBody, {"request_id": "a b"}, "request_id may only have letters, digits and . _ : @ / = + -"),
        (GenerateBody, {"request_id": "a" * 129}, "request_id must have at most 128 characters"),
        (GenerateBody, {"cache": "on"}, "cache must be 'auto' or 'off'"),
        (
            CompletionBody,
            {"prompt": {}},
            "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
        ),
        (CompletionBody, {"prompt": [1.0]}, "prompt[0] must be a whole number"),
        (CompletionBody, {"stream": True, "stream_options": 5}, "stream_options must be an object"),
        (CompletionBody, {"metadata": {"a": 5}}, "metadata.a must be a string"),
        (DetokenizeBody, {"tokens": []}, "tokens must not be empty"),
        (DetokenizeBody, {}, "tokens is required"),
    ],
)
def test_the_words_of_refusals(model, value, message):
    plain = dict(BODIES)[model]
    error = refusal(model, {**plain, **value} if value else {})
    assert error.message == message
