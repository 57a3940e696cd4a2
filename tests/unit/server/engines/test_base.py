"""Tests of the exception that a failed request's event leads to, and of the memory that `size_of` counts for an event."""

import pytest

from engine import errors
from engine.request import FinishReason, RequestFailure, TokenEvent, TokenLogprobs
from server.engines.base import error_of, size_of

ERRORS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.TidegateError)]


def failed(failure):
    return TokenEvent("r", [], FinishReason.ERROR, failure=failure)


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_class_crosses_processes_by_its_name(cls):
    error = error_of(failed(RequestFailure(cls.__name__, "the reason", "the field")))
    assert (type(error), error.message, error.param) == (cls, "the reason", "the field")


@pytest.mark.parametrize("name", ["NoSuchError", "", "annotations", "error_from_name", "__builtins__", "ValueError"])
def test_any_other_name_gives_an_internal_error_that_quotes_it(name):
    error = error_of(failed(RequestFailure(name, "the reason")))
    assert (type(error), error.message) == (errors.InternalError, f"{name}: the reason")


def test_a_failure_without_a_reason_is_an_internal_error():
    assert isinstance(error_of(failed(None)), errors.InternalError)


def test_an_abort_is_an_error_and_a_normal_end_is_none():
    assert isinstance(error_of(TokenEvent("r", [], FinishReason.ABORT)), errors.Aborted)
    for finish in (None, FinishReason.STOP, FinishReason.LENGTH):
        assert error_of(TokenEvent("r", [1], finish)) is None


def test_size_grows_with_tokens_and_with_their_log_probabilities():
    logprobs = [TokenLogprobs(1, -0.5, 1, [1, 2, 3], [-0.5, -1.0, -2.0])] * 2
    assert size_of(TokenEvent("r", [1, 2])) == 4
    assert size_of(TokenEvent("r", [1, 2], logprobs=logprobs)) == 4 + 2 * 5
