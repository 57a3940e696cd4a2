"""Provides helpers that all routes share: access to the service, small JSON answers, and entries for the OpenAPI document."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.http.schemas.service import ErrorResponse
from server.metrics.registry import Metrics
from server.service.pacing import Pacer
from server.service.service import GenerateService
from server.service.types import Usage
from server.settings import Settings


class Api(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the objects that the routes of an application use. The application keeps it as `app.state.api`."""

    service: GenerateService
    metrics: Metrics
    max_body_bytes: int
    strict_fields: bool = True
    pacer: Pacer = msgspec.field(default_factory=Pacer)

    @classmethod
    def from_settings(cls, settings: Settings, service: GenerateService, metrics: Metrics) -> Api:
        return cls(service=service, metrics=metrics, max_body_bytes=settings.max_body_bytes, strict_fields=settings.strict_fields)


def api_of(request: Request) -> Api:
    api: Api = request.app.state.api
    return api


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Return the current time in whole seconds since 1970."""
    return int(time.time())


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Return the token counts of `usage` in the form of OpenAI's `usage` object, with DeepSeek's fields for the cache."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }


_ERRORS: dict[int | str, str] = {
    400: "The request is malformed, or a field is missing, unknown, unsupported, out of range or in conflict with another field.",
    403: "A browser sent the request for a host name that is not this server's.",
    404: "This server does not have the model.",
    408: "The request passed its deadline, or its body arrived too slowly.",
    413: "The body is larger than this server's limit.",
    415: "The body's content type is not JSON.",
    429: "The queue is full, or the request could not be served in time. Retry-After says after how many seconds to try again.",
    499: "The request was aborted.",
    500: "The server has a bug. Its log has the details.",
    503: "No engine is available. Retry-After says after how many seconds to try again.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` argument of a FastAPI route that may answer with the given HTTP error statuses."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        answers[status] = {"description": _ERRORS[status], "model": ErrorResponse}
        if status in (429, 503):
            answers[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return answers


GENERATION_ERRORS = errors(400, 403, 404, 408, 413, 415, 429, 499, 500, 503)
# OpenAPI 3.1 has no field for the events of a stream: tools read `schema` as that of each event.
_EVENT = {"type": "object", "description": "One event: JSON, and at the end [DONE].", "properties": {"data": {"type": "string"}}}
EVENT_STREAM = {"text/event-stream": {"schema": {**_EVENT, "required": ["data"]}}}


class JsonBody(dict[str, Any]):
    """Describes the body of a route that reads it with `server.http.body.read_json`: the route's `openapi_extra=` argument.

    The object keeps the pydantic model of the body, so that `server.http.openapi` can add the model's schema to the document.
    """

    def __init__(self, model: type[BaseModel], *, required: bool = True) -> None:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        super().__init__(requestBody={"required": required, "content": {"application/json": {"schema": schema}}})
        self.model = model
