import pytest

from engine.config import ModelLimits
from engine.errors import ContextTooLong, InvalidRequest
from engine.messages import Submit, check_submit, decode_worker_message, encode, pack_tokens
from engine.request import SamplingParams

LIMITS = ModelLimits(max_model_len=20, vocab_size=100, eos_token_ids=(1,), dtype="float32")


def make_submit(**changes) -> Submit:
    packed = {name: pack_tokens(value) if name in ("prompt", "outputs") else value for name, value in changes.items()}
    return Submit(
        **{"request_id": "a", "prompt": pack_tokens([5, 6]), "params": SamplingParams(max_tokens=4), "seed": 0} | packed
    )


def test_what_fits_exactly_passes():
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
        ({"seed": 2**63}, InvalidRequest, "seed"),
        ({"priority": 1001}, InvalidRequest, "priority"),
    ],
)
def test_what_cannot_run_is_refused_by_name(changes, error, param):
    with pytest.raises(InvalidRequest) as caught:
        check_submit(make_submit(**changes), LIMITS)
    assert (type(caught.value), caught.value.param) == (error, param)


def test_a_submit_survives_the_wire():
    submit = make_submit(outputs=[3], fork_of="b", salt="s", priority=-2)
    assert decode_worker_message(encode(submit)) == submit
