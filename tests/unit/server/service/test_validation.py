"""Tests of requests that are refused before they reach the engine, and of the field names in the errors."""

import msgspec
import pytest

from engine.errors import (
    ContextTooLong,
    InvalidRequest,
    UnknownModel,
)
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings
from tests.unit.server.service.calls import PROMPT, TEXT, counts, outputs_of, request


@pytest.mark.parametrize(
    ("fits", "too_many", "param"),
    [
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 4}, "prompt_logprobs"),
        ({"logprobs": 4, "max_tokens": 5, "n": 4}, {"logprobs": 4, "max_tokens": 6, "n": 4}, "logprobs"),
    ],
)
async def test_log_probabilities_of_one_answer_are_bounded(engine, fits, too_many, param):
    limits = Settings(served_model_name="tiny", max_n=4, max_prompt_logprobs=4 * len(PROMPT), max_logprobs=100)
    service = GenerateService(engine, TEXT, limits, Metrics("tiny", lambda: engine.health))
    await outputs_of(service, request(**fits))
    with pytest.raises(InvalidRequest, match="at most") as caught:
        await outputs_of(service, request(**too_many))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": [1, 512]}, "messages", "^messages has token id 512"),
        ({"max_tokens": 510}, "max_completion_tokens", "the prompt's 3 tokens"),
        ({"prompt": [7] * 600}, "messages", "The prompt is too long: it has 600 tokens"),
        ({"n": 5}, "n", "n is 5"),
    ],
)
async def test_errors_name_fields_as_the_client_does(service, fields, param, message):
    names = {"prompt": "messages", "max_tokens": "max_completion_tokens"}
    with pytest.raises(InvalidRequest, match=message) as caught:
        await outputs_of(service, msgspec.structs.replace(request(**fields), client_names=names))
    assert caught.value.param == param


BAD = {
    "model": (UnknownModel, {"model": "other"}, "model"),
    "no text": (InvalidRequest, {"prompt": ""}, "prompt"),
    "no tokens": (InvalidRequest, {"prompt": []}, "prompt"),
    "surrogate": (InvalidRequest, {"prompt": "a\ud800"}, "prompt"),
    "negative id": (InvalidRequest, {"prompt": [-1]}, "prompt"),
    "unknown id": (InvalidRequest, {"prompt": [512]}, "prompt"),
    "long prompt": (ContextTooLong, {"prompt": [5] * 600}, "prompt"),
    "long together": (ContextTooLong, {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
    "n of 0": (InvalidRequest, {"n": 0}, "n"),
    "n of 5": (InvalidRequest, {"n": 5}, "n"),
    "empty stop": (InvalidRequest, {"stop": ("a", "")}, "stop"),
    "many stops": (InvalidRequest, {"stop": ("a",) * 17}, "stop"),
    "long stop": (InvalidRequest, {"stop": ("a" * 257,)}, "stop"),
    "stop with a surrogate": (InvalidRequest, {"stop": ("\udc00",)}, "stop"),
    "bias": (InvalidRequest, {"logit_bias": {512: 1.0}}, "logit_bias"),
    "stop token": (InvalidRequest, {"stop_token_ids": (512,)}, "stop_token_ids"),
    "deadline": (InvalidRequest, {"deadline_s": 0.0}, "deadline_ms"),
}


@pytest.mark.parametrize(("error", "fields", "param"), BAD.values(), ids=BAD)
async def test_validation_names_the_field(service, engine, error, fields, param):
    with pytest.raises(error) as caught:
        await outputs_of(service, request(**fields))
    assert type(caught.value) is error
    assert caught.value.param == param
    assert not engine.submitted
    assert counts(service) == {"started": 1, "finished": 0, "aborted": 0, "failed": 1, "running": 0}


async def test_a_context_error_has_the_prompts_length_and_max_tokens(service):
    with pytest.raises(ContextTooLong, match=r"500 tokens and max_tokens 13 .* 512"):
        await outputs_of(service, request([5] * 500, max_tokens=13))
