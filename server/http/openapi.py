"""/openapi.json: FastAPI's document, completed by the request schemas, which it does not see since we read bodies ourselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from server.http.routes.api import Takes


def openapi_document(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    """Of `app`, which includes `routers`: asked for by themselves, as how an application keeps them is FastAPI's own affair."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    extras = [route.openapi_extra for router in routers for route in router.routes if isinstance(route, APIRoute)]
    models = dict.fromkeys(extra.model for extra in extras if isinstance(extra, Takes))
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= schemas["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of error, which no route here answers with
        document["components"]["schemas"].pop(name, None)
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        content = operation["responses"].get("422", {}).get("content", {})
        if content.get("application/json", {}).get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
            del operation["responses"]["422"]
    return document
