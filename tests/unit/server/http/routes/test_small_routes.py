"""Tests the routes for models, tokens, health, version and metrics, and the answers on paths without a route."""

import pytest

from server.service.service import ModelInfo
from tests.unit.server.http.routes.scripted import ScriptedService
from tests.unit.server.http.routes.serve import client_of, post


class WithModels(ScriptedService):
    def models(self):
        return [ModelInfo(id="org/tiny", created=5, owned_by="tidegate", max_model_len=100, default_sampling_params=DEFAULTS)]


DEFAULTS = {"temperature": 0.6, "top_k": 20}
CARD = {"id": "org/tiny", "object": "model", "created": 5, "owned_by": "tidegate", "root": "org/tiny", "parent": None}
CARD |= {"max_model_len": 100, "default_sampling_params": DEFAULTS}


async def test_models_are_listed_and_described():
    async with client_of(WithModels()) as client:
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [CARD]}
        assert (await client.get("/v1/models/org/tiny")).json() == CARD
        assert (await client.get("/v1/models/org%2Ftiny")).json() == CARD
        missing = await client.get("/v1/models/tiny")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("special", "tokens"), [({}, [0, 104]), ({"add_special_tokens": False}, [104])])
async def test_tokenize_adds_special_tokens_unless_they_are_declined(special, tokens):
    _, answer = await post(ScriptedService(), "/tokenize", {"prompt": "h", **special})
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": 100}


async def test_tokenize_takes_messages_as_chat_completions_does():
    service = ScriptedService()
    messages = [{"role": "user", "content": "h"}]
    body = {"messages": messages, "add_generation_prompt": False, "chat_template_kwargs": {"x": 1}}
    assert (await post(service, "/tokenize", body))[1]["tokens"] == list(range(11))
    assert (await post(service, "/tokenize", {**body, "add_special_tokens": True}))[1]["tokens"] == [0, *range(11)]
    assert service.conversations[0] == service.conversations[1]
    await post(service, "/v1/chat/completions", {"model": "tiny", **body})
    assert service.conversations[2] == service.conversations[0]


async def test_detokenize():
    assert await post(ScriptedService(), "/detokenize", {"tokens": [104, 105]}) == (200, {"prompt": "hi"})


async def test_health_of_a_ready_server():
    async with client_of(ScriptedService()) as client:
        for probe in ("live", "ready", "startup"):
            response = await client.get(f"/health/{probe}")
            assert (response.status_code, response.json()) == (200, {"status": "ok", "reason": None})


async def test_health_while_the_engine_loads():
    async with client_of(ScriptedService(ready=False)) as client:
        assert (await client.get("/health/live")).status_code == 200
        for probe in ("ready", "startup"):
            response = await client.get(f"/health/{probe}")
            assert response.status_code == 503
            assert response.json() == {"status": "unavailable", "reason": "the engine is loading"}


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
async def test_health_answers_head_like_get(ready, status):
    async with client_of(ScriptedService(ready=ready)) as client:
        assert (await client.head("/health/live")).status_code == 200
        for probe in ("ready", "startup"):
            assert (await client.head(f"/health/{probe}")).status_code == status


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 400), ("br, identity", 400), ("identity", 200), ("", 200)])
async def test_a_body_with_a_content_encoding_is_refused(encoding, status):
    async with client_of(ScriptedService()) as client:
        answer = await client.post("/tokenize", json={"prompt": "h"}, headers={"content-encoding": encoding})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["param"] == "content-encoding"


async def test_version_and_metrics():
    async with client_of(ScriptedService()) as client:
        assert (await client.get("/version")).json()["version"]
        metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "tidegate_engine_up 1.0" in metrics.text


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/v1", "/v1/generates/", "//v1/generate", "/v1/generate//"])
async def test_a_path_without_a_route_is_404(path):
    async with client_of(ScriptedService()) as client:
        response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_route"


async def test_a_bug_is_answered_with_500_and_no_details():
    class Broken(ScriptedService):
        def models(self):
            raise KeyError("/etc/secret")

    async with client_of(Broken()) as client:
        response = await client.get("/v1/models")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
