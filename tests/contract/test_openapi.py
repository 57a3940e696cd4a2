"""The OpenAPI document's shape. `tests/e2e/test_openapi_fuzz.py` holds made-up requests against it."""

from pathlib import Path

import pytest

from server.http.app import build_app
from server.metrics.registry import Metrics
from server.settings import Settings
from tests.unit.server.http.routes.scripted import ScriptedService

OPERATIONS = {
    "POST /v1/generate",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /tokenize",
    "POST /detokenize",
    "GET /health/live",
    "GET /health/ready",
    "GET /health/startup",
    "GET /metrics",
    "GET /version",
}
GENERATING = ("/v1/generate", "/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def document():
    service = ScriptedService()
    return build_app(Settings(), service, Metrics("tiny", service.health)).openapi()


def test_these_are_the_operations(document):
    found = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert found == OPERATIONS


def test_the_readme_names_them_all():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert not [operation for operation in OPERATIONS if f"{operation.split()[1]}`" not in readme]


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_reference_leads_somewhere(document):
    there = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= there


def test_requests_are_closed_and_every_field_says_what_it_is(document):
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = {ref.rpartition("/")[2] for operation in operations for ref in references(operation.get("requestBody", {}))}
    assert {"GenerateRequest", "TokenizeRequest"} <= names
    silent = {"model", "messages", "prompt", "max_tokens"}
    for name in names:
        schema = document["components"]["schemas"][name]
        assert schema["additionalProperties"] is False
        for field, about in schema["properties"].items():
            assert "description" in about or field in silent or "$ref" in str(about), (name, field)


@pytest.mark.parametrize("path", GENERATING)
def test_generating_routes_document_every_error(document, path):
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "408", "413", "422", "429", "499", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    for status in ("429", "503"):
        assert "Retry-After" in responses[status]["headers"]


@pytest.mark.parametrize("path", GENERATING)
def test_ranges_are_the_engines(document, path):
    from_path = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    temperature = document["components"]["schemas"][from_path.rpartition("/")[2]]["properties"]["temperature"]
    number = next(kind for kind in temperature["anyOf"] if kind["type"] == "number")
    assert (number["minimum"], number["maximum"]) == (0.0, 100.0)
