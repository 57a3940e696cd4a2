"""Tests of the validation of requests, of the packing of token ids, and of errors that cross processes."""

import pytest

from engine.config import ModelLimits
from engine.errors import ContextTooLong, InvalidRequest, Overloaded, error_from_name
from engine.messages import (
    StepEvents,
    Submit,
    check_ids,
    check_submit,
    decode_engine_message,
    decode_worker_message,
    encode,
    pack_tokens,
    unpack_tokens,
)
from engine.request import FinishReason, RequestFailure, SamplingParams, TokenEvent

LIMITS = ModelLimits(max_model_len=20, vocab_size=100, eos_token_ids=(1,), dtype="float32")


def make_submit(**changes) -> Submit:
    packed = {name: pack_tokens(value) if name in ("prompt", "outputs") else value for name, value in changes.items()}
    return Submit(
        **{"request_id": "a", "prompt": pack_tokens([5, 6]), "params": SamplingParams(max_tokens=4), "seed": 0} | packed
    )


def test_requests_that_just_fit_are_valid():
    check_submit(make_submit(), LIMITS)
    check_submit(make_submit(prompt=[0, 99], params=SamplingParams(max_tokens=18)), LIMITS)
    check_submit(make_submit(outputs=[1, 2, 3]), LIMITS)


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"prompt": []}, InvalidRequest, "prompt"),
        ({"prompt": [1, 100]}, InvalidRequest, "prompt"),
        ({"prompt": [1, -1]}, InvalidRequest, "prompt"),
        ({"prompt": [1] * 20}, ContextTooLong, "prompt"),
        ({"prompt": [1] * 17}, ContextTooLong, "max_tokens"),
        ({"outputs": [100]}, InvalidRequest, "outputs"),
        ({"outputs": [1, 2, 3, 4]}, InvalidRequest, "outputs"),
        ({"params": SamplingParams(stop_token_ids=(100,))}, InvalidRequest, "stop_token_ids"),
        ({"params": SamplingParams(logit_bias={100: 1.0})}, InvalidRequest, "logit_bias"),
        ({"seed": -1}, InvalidRequest, "seed"),
        ({"seed": 2**64}, InvalidRequest, "seed"),
        ({"params": SamplingParams(allowed_token_ids=(1, 100))}, InvalidRequest, "allowed_token_ids"),
        ({"params": SamplingParams(bad_words=((1,), (2, 100)))}, InvalidRequest, "bad_words"),
        ({"priority": 1001}, InvalidRequest, "priority"),
        ({"deadline_s": 0.0}, InvalidRequest, "deadline_ms"),
        ({"deadline_s": float("nan")}, InvalidRequest, "deadline_ms"),
    ],
)
def test_requests_that_cannot_run_are_refused_and_the_field_is_named(changes, error, param):
    with pytest.raises(InvalidRequest) as caught:
        check_submit(make_submit(**changes), LIMITS)
    assert (type(caught.value), caught.value.param) == (error, param)


def test_an_encoded_submit_is_decoded_to_the_same_value():
    submit = make_submit(outputs=[3], fork_of="b", salt="s", priority=-2, slo="batch", promised=True, deadline_s=1.5, tenant="t")
    assert decode_worker_message(encode(submit)) == submit


@pytest.mark.parametrize("ids", [[], [0], [2**31 - 1, 0, 5], list(range(70000))])
def test_token_ids_are_packed_as_int32_little_endian_and_back(ids):
    packed = pack_tokens(ids)
    assert packed == b"".join(id.to_bytes(4, "little") for id in ids)
    assert list(unpack_tokens(packed)) == ids


@pytest.mark.parametrize("id", [2**31, -(2**31) - 1, 10**30])
def test_an_id_that_is_no_int32_is_refused_before_it_is_sent(id):
    with pytest.raises(InvalidRequest, match="stop_ids has a token id outside") as caught:
        pack_tokens([5, id], "stop_ids")
    assert caught.value.param == "stop_ids"


@pytest.mark.parametrize("field", ["prompt", "outputs"])
def test_bytes_that_are_no_whole_number_of_ids_are_refused(field):
    submit = Submit(**{"request_id": "a", "prompt": pack_tokens([5]), "params": SamplingParams(), "seed": 0, field: b"abcde"})
    with pytest.raises(InvalidRequest, match="multiple of 4") as caught:
        check_submit(submit, LIMITS)
    assert caught.value.param == field


@pytest.mark.parametrize("ids", [[100], [-1], [5, 100, 7], [10**30]])
def test_check_ids_names_an_id_outside_the_vocabulary(ids):
    check_ids([], 100, "tokens")
    check_ids([0, 99], 100, "tokens")
    with pytest.raises(InvalidRequest, match=r"tokens has token id (100|-1|10{30}): it must lie between 0 and 99"):
        check_ids(ids, 100, "tokens")


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (Overloaded("full", retry_after=6.2), 7),
        (Overloaded("full", param="deadline_ms"), 1),
        (InvalidRequest("n", param="n"), None),
    ],
)
def test_an_error_crosses_processes_with_its_words_its_field_and_its_retry_after(error, retry_after):
    event = TokenEvent("a", [], FinishReason.ERROR, failure=RequestFailure.of(error))
    received = decode_engine_message(encode(StepEvents([event]))).events[0].failure
    made = error_from_name(received.error, received.message, received.param, received.retry_after)
    assert (type(made), made.message, made.param) == (type(error), error.message, error.param)
    assert getattr(made, "retry_after", None) == retry_after
