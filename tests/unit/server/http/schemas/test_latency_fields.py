"""Tests of the fields that name a latency class: slo_class on every generating route, and service_tier as OpenAI has it."""

import re

import pytest

from engine.slo import INTERACTIVE, STANDARD
from server.http.schemas.generate import GenerateBody
from server.http.schemas.openai import ChatBody, CompletionBody
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import events_of, post

PLAIN = {
    "/v1/generate": {"prompt": "x"},
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}
OPENAI = ("/v1/completions", "/v1/chat/completions")


async def class_of(path, more):
    service = ScriptedService(*letters("x"))
    status, answer = await post(service, path, PLAIN[path] | more)
    assert status == 200, answer
    return service.requests[0].slo_class, answer


async def refusal_of(path, more):
    status, answer = await post(ScriptedService(*letters("x")), path, PLAIN[path] | more)
    assert status == 400, answer
    return answer["error"]


@pytest.mark.parametrize("path", PLAIN)
async def test_a_class_reaches_the_service(path):
    for name in ("interactive", "standard", "batch"):
        assert (await class_of(path, {"slo_class": name}))[0] == name
    for more in ({}, {"slo_class": None}, {"slo_class": "default"}):
        assert (await class_of(path, more))[0] is None


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("value", ["gold", "Batch", "", 1, ["batch"]])
async def test_another_class_is_refused_with_the_names_of_the_classes(path, value):
    error = await refusal_of(path, {"slo_class": value})
    assert (error["code"], error["param"]) == ("invalid_value", "slo_class")
    assert error["message"] == "slo_class must be 'interactive', 'standard', 'batch' or 'default'"


@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize(
    ("tier", "slo", "answered"),
    [("flex", "batch", "flex"), ("priority", "interactive", "priority"), ("auto", None, "default"), ("default", None, "default")],
)
async def test_a_service_tier_names_a_class_and_the_answer_says_which_tier_it_had(path, tier, slo, answered):
    found, answer = await class_of(path, {"service_tier": tier})
    assert (found, answer["service_tier"]) == (slo, answered)
    *events, _ = await events_of(ScriptedService(*letters("xyz")), path, PLAIN[path] | {"service_tier": tier})
    assert {event["service_tier"] for event in events} == {answered}
    assert "service_tier" not in (await class_of(path, {}))[1]
    if slo is None:
        assert (await class_of(path, {"service_tier": tier, "slo_class": "batch"}))[0] == "batch"
    for same in (slo, "default"):
        assert (await class_of(path, {"service_tier": tier, "slo_class": same}))[0] == slo


@pytest.mark.parametrize("path", OPENAI)
async def test_a_refusal_names_the_field_that_named_the_class(path):
    for field, value in (("service_tier", "priority"), ("slo_class", "interactive")):
        service = ScriptedService(*letters("x"))
        await post(service, path, PLAIN[path] | {field: value})
        names = service.requests[0].client_names
        assert names.get("slo_class", "slo_class") == field
        assert names.get("prompt") == ("messages" if "chat" in path else None)


@pytest.mark.parametrize("path", OPENAI)
async def test_other_tiers_and_tiers_that_contradict_the_class_are_refused(path):
    error = await refusal_of(path, {"service_tier": "scale"})
    assert (error["param"], error["message"]) == ("service_tier", "service_tier must be 'auto', 'default', 'flex' or 'priority'")
    error = await refusal_of(path, {"service_tier": "flex", "slo_class": "interactive"})
    assert error["param"] == "service_tier"
    assert "stands for slo_class batch, and slo_class is interactive" in error["message"]


async def test_our_own_route_refuses_a_tier_and_says_what_to_send():
    error = await refusal_of("/v1/generate", {"service_tier": "flex"})
    assert (error["code"], error["param"]) == ("unsupported_field", "service_tier")
    assert error["message"].endswith("send slo_class")


@pytest.mark.parametrize("body", [GenerateBody, CompletionBody, ChatBody])
def test_the_description_states_the_targets_of_the_classes(body):
    text = body.model_fields["slo_class"].description
    for slo in (INTERACTIVE, STANDARD):
        ttft = f"{slo.ttft:g} s" if slo.ttft >= 1 else f"{slo.ttft * 1000:g} ms"
        itl = f"{slo.itl * 1000:g} ms"
        assert re.search(rf"{slo.name}: [^;]*{ttft}[^;]*{itl}", text), (slo, text)
