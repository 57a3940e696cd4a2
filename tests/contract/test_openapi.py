"""Tests the OpenAPI documents of the HTTP port and the admin port: routes, schemas and errors.

`tests/e2e/test_openapi_fuzz.py` sends generated requests and compares the answers with the document.
"""

from pathlib import Path

import pytest

from server.http.admin import ADMIN_ROUTERS, build_admin_app
from server.http.app import ROUTERS, build_app
from server.http.schemas.common import SamplingFields
from server.metrics.registry import Metrics
from server.rpc.pb.tidegate.v1 import inference_pb2
from server.settings import Settings
from tests.unit.server.http.routes.scripted import ScriptedService

ON_BOTH_PORTS = {
    "GET /health",
    "GET /health/live",
    "GET /health/ready",
    "GET /health/startup",
    "GET /ping",
    "GET /metrics",
    "GET /version",
}
OPERATIONS = {
    "POST /v1/generate",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /tokenize",
    "POST /detokenize",
    *ON_BOTH_PORTS,
}
ADMIN_OPERATIONS = {*ON_BOTH_PORTS, "POST /cache/reset"}
ROUTERS_OF = {build_app: ROUTERS, build_admin_app: ADMIN_ROUTERS}
GENERATING = ("/v1/generate", "/v1/completions", "/v1/chat/completions")


def application(build):
    service = ScriptedService()
    return build(Settings(), service, Metrics("tiny", service.health))


def operations(document):
    return {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}


@pytest.fixture(scope="module")
def document():
    return application(build_app).openapi()


@pytest.fixture(scope="module")
def admin_document():
    return application(build_admin_app).openapi()


def test_the_http_port_has_these_operations(document):
    assert operations(document) == OPERATIONS


def test_the_admin_port_has_these_operations(admin_document):
    assert operations(admin_document) == ADMIN_OPERATIONS


def test_the_admin_routes_are_not_on_the_http_port_apart_from_the_listed_ones(document, admin_document):
    assert operations(document) & operations(admin_document) == ON_BOTH_PORTS


@pytest.mark.parametrize("build", [build_app, build_admin_app])
async def test_no_route_is_missing_from_its_document(build):
    """Only a HEAD route beside a listed GET route may be kept out of the OpenAPI document, by `include_in_schema=False`."""
    app = application(build)
    listed = operations(app.openapi())
    routes = [route for router in ROUTERS_OF[build] for route in router.routes]
    assert len(routes) > len(ADMIN_OPERATIONS)
    for route in routes:
        hidden = {f"{method} {route.path.replace(':path', '')}" for method in route.methods} - listed
        assert all(name.startswith("HEAD ") and name.replace("HEAD", "GET") in listed for name in hidden), hidden


def test_the_readme_names_all_operations():
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


def test_every_reference_leads_to_a_schema(document, admin_document):
    for each in (document, admin_document):
        schemas = {f"#/components/schemas/{name}" for name in each["components"]["schemas"]}
        assert set(references(each)) <= schemas


def test_request_bodies_refuse_unknown_fields_and_describe_every_field(document):
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = {ref.rpartition("/")[2] for operation in operations for ref in references(operation.get("requestBody", {}))}
    assert {"GenerateBody", "TokenizeBody"} <= names
    for name in names:
        schema = document["components"]["schemas"][name]
        assert schema["additionalProperties"] is False
        for field, about in schema["properties"].items():
            assert "description" in about or "$ref" in str(about), (name, field)


@pytest.mark.parametrize("path", GENERATING)
def test_generating_routes_document_every_error(document, path):
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "403", "404", "408", "413", "415", "429", "499", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    for status in ("429", "503"):
        assert "Retry-After" in responses[status]["headers"]


@pytest.mark.parametrize("path", GENERATING)
def test_documented_ranges_are_those_of_the_engine(document, path):
    from_path = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    temperature = document["components"]["schemas"][from_path.rpartition("/")[2]]["properties"]["temperature"]
    number = next(kind for kind in temperature["anyOf"] if kind["type"] == "number")
    assert (number["minimum"], number["maximum"]) == (0.0, 100.0)


def test_every_generating_route_and_grpc_have_every_field_of_stopping_and_sampling(document):
    schemas = document["components"]["schemas"]
    common = set(SamplingFields.model_fields)
    assert {"bad_words", "allowed_token_ids", "skip_special_tokens", "truncate_prompt_tokens", "return_token_ids"} <= common
    for path in GENERATING:
        from_path = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert common <= set(schemas[from_path.rpartition("/")[2]]["properties"])
    assert common - {"stream"} <= set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
