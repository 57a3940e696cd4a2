"""Tests of the latency class and the deadline that the engine gets, and of the settings for callers without a key."""

from types import SimpleNamespace

import msgspec
import pytest

from engine.errors import InvalidRequest, RequestTimeout
from server.metrics.registry import Metrics
from server.service import call
from server.service.service import GenerateService
from server.service.types import Identity
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.unit.server.metrics.test_registry import samples
from tests.unit.server.service.calls import TEXT, outputs_of, request


def named(slo_class, **more):
    return msgspec.structs.replace(request(**more), slo_class=slo_class)


def service_with(engine, **settings):
    settings = Settings(served_model_name="tiny", **settings)
    return GenerateService(engine, TEXT, settings, Metrics("tiny", lambda: engine.health))


@pytest.mark.parametrize(
    ("asked", "of_identity", "slo", "promised"),
    [
        (None, None, "standard", False),
        ("standard", None, "standard", True),
        ("batch", None, "batch", True),
        (None, "interactive", "interactive", True),
        ("batch", "interactive", "batch", True),
    ],
)
async def test_a_class_is_promised_if_the_client_or_the_operator_has_named_it(service, engine, asked, of_identity, slo, promised):
    await outputs_of(service, named(asked, n=2), Identity(slo=of_identity, tenant="harbour"))
    assert [(submit.slo, submit.promised, submit.tenant) for submit in engine.submitted] == [(slo, promised, "harbour")] * 2
    found = samples(service._metrics)
    assert found["tidegate_slo_time_to_first_token_seconds_count", (("slo_class", slo),)] == 1


async def test_callers_without_a_key_have_the_class_and_the_ceiling_of_the_settings(engine):
    service = service_with(engine, slo_class="batch", priority_ceiling=-2)
    await outputs_of(service, request(id="a"))
    await outputs_of(service, msgspec.structs.replace(named("interactive", id="b"), priority=-2))
    with pytest.raises(InvalidRequest, match=r"^priority is -3: it must be at least -2, "):
        await outputs_of(service, msgspec.structs.replace(request(id="c"), priority=-3))
    assert [(submit.slo, submit.promised, submit.priority) for submit in engine.submitted] == [
        ("batch", True, 0),
        ("interactive", True, -2),
    ]


@pytest.fixture
def clock(monkeypatch):
    """A clock of the calls, which the tokenizer turns on by `per_text` seconds for each text."""
    clock = SimpleNamespace(now=50.0, per_text=3.0, monotonic=lambda: clock.now)
    encode = Tokenizer._encode_piece

    def slow(self, piece):
        clock.now += clock.per_text
        return encode(self, piece)

    monkeypatch.setattr(call, "time", clock)
    monkeypatch.setattr(Tokenizer, "_encode_piece", slow)
    return clock


async def test_the_engine_gets_the_deadline_that_tokenising_has_left(service, engine, clock):
    await outputs_of(service, request("Hello", deadline_s=10.0, n=2))
    await outputs_of(service, request("Hello", id="other"))
    assert [submit.deadline_s for submit in engine.submitted] == [7.0, 7.0, None]


async def test_a_request_whose_deadline_has_passed_is_not_sent_to_the_engine(service, engine, clock):
    with pytest.raises(RequestTimeout, match="passed its deadline of 3 s") as caught:
        await outputs_of(service, request("Hello", deadline_s=3.0))
    assert (caught.value.param, engine.submitted) == ("deadline_ms", [])
