"""Tests the table of errors, and the content and the size of error bodies."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine import errors
from engine.errors import EngineUnavailable, InternalError, InvalidRequest, Overloaded, UnknownModel
from server.errors import STATUS, error_body, error_headers, field_path, from_validation, status_of
from server.http.schemas.generate import GenerateBody


@pytest.mark.parametrize(
    ("name", "http"),
    [
        ("InvalidRequest", 400),
        ("MalformedRequest", 400),
        ("ContextTooLong", 400),
        ("UnsupportedField", 400),
        ("Unauthenticated", 401),
        ("UnknownModel", 404),
        ("RequestTimeout", 408),
        ("PayloadTooLarge", 413),
        ("UnsupportedMediaType", 415),
        ("Overloaded", 429),
        ("Aborted", 499),
        ("InternalError", 500),
        ("EngineUnavailable", 503),
    ],
)
def test_each_error_has_its_documented_status(name, http):
    assert status_of(getattr(errors, name)("why")).http == http


def test_a_class_that_is_not_in_the_table_has_the_status_of_its_base():
    class Special(UnknownModel):
        pass

    assert status_of(Special("x")) == STATUS[UnknownModel]


@pytest.mark.parametrize("error", [KeyError("/etc/secret"), InternalError("/etc/secret"), MemoryError()])
def test_the_answer_to_a_bug_has_no_details(error):
    answer = json.loads(error_body(error))["error"]
    assert status_of(error).http == 500
    assert answer["code"] == "internal_error"
    assert "secret" not in str(answer)


def test_errors_that_pass_with_time_have_retry_after():
    assert error_headers(Overloaded("x", retry_after=7)) == {"retry-after": "7"}
    assert error_headers(Overloaded("x", retry_after=6.01)) == {"retry-after": "7"}
    assert error_headers(Overloaded("x", retry_after=0)) == {"retry-after": "1"}
    assert error_headers(EngineUnavailable("x")) == {"retry-after": "1"}
    assert error_headers(InvalidRequest("x")) == {}


@given(st.text(max_size=20_000), st.none() | st.text(max_size=2000))
def test_the_body_of_an_error_is_small_and_valid_json(message, param):
    body = error_body(InvalidRequest(message * 10, param=param))
    assert len(body) <= 4096
    json.loads(body)


@pytest.mark.parametrize("huge", ["x" * 2_000_000, "\ud800" * 1000, "\U0001f30a" * 100_000, "\x01" * 100_000])
def test_an_error_does_not_repeat_long_values_of_the_client(huge):
    for body in ({"prompt": "x", huge: 1}, {"prompt": "x", "cache": huge}, {"prompt": "x", "seed": huge}):
        with pytest.raises(ValidationError) as caught:
            GenerateBody.model_validate(body)
        assert len(error_body(from_validation(caught.value))) <= 4096


@pytest.mark.parametrize(
    ("loc", "path"),
    [
        (("prompt",), "prompt"),
        (("messages", 0, "content"), "messages[0].content"),
        (("prompt", "#texts", 3), "prompt[3]"),
        (("logit_bias", "a", "[key]"), "logit_bias.a"),
        ((), ""),
    ],
)
def test_the_path_of_a_field(loc, path):
    assert field_path(loc) == path
