"""Builds /openapi.json: FastAPI's OpenAPI document, with the schemas of request bodies added.

FastAPI does not know the schemas of request bodies, because `server.http.body` reads the bodies and not FastAPI.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from server.http.routes.api import JsonBody


def openapi_document(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    """Return the OpenAPI document of `app`. `routers` must be those that `app` includes; FastAPI has no documented way to list
    them."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    extras = [route.openapi_extra for router in routers for route in router.routes if isinstance(route, APIRoute)]
    models = dict.fromkeys(extra.model for extra in extras if isinstance(extra, JsonBody))
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= schemas.get("$defs", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's error schemas, which no route uses
        document["components"]["schemas"].pop(name, None)
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        content = operation["responses"].get("422", {}).get("content", {})
        if content.get("application/json", {}).get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
            del operation["responses"]["422"]
    return document
