"""/openapi.json: FastAPI's document, completed by the request schemas, which it does not see since we read bodies ourselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.schemas.generate import GenerateRequest
from server.schemas.openai import ChatRequest, CompletionRequest
from server.schemas.service import DetokenizeRequest, TokenizeRequest

REQUESTS: tuple[type[BaseModel], ...] = (GenerateRequest, CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def openapi_document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    _, schemas = models_json_schema([(model, "validation") for model in REQUESTS], ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= schemas["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of error, which no route here answers with
        document["components"]["schemas"].pop(name, None)
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        content = operation["responses"].get("422", {}).get("content", {})
        if content.get("application/json", {}).get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
            del operation["responses"]["422"]
    return document
