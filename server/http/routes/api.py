"""What the routes share: the service they call, how they answer, and what the OpenAPI document says of both."""

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
from server.service.service import GenerateService
from server.service.types import Usage


class Api(msgspec.Struct, frozen=True, kw_only=True):
    """Hangs on `app.state.api`."""

    service: GenerateService
    metrics: Metrics
    max_body_bytes: int


def api_of(request: Request) -> Api:
    api: Api = request.app.state.api
    return api


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def openai_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


_ERRORS: dict[int | str, str] = {
    400: "The request is malformed, or a field is missing, unknown, out of range or at odds with another.",
    404: "No such model here.",
    408: "The request passed its deadline, or was sent too slowly.",
    413: "The body is larger than this server's limit.",
    422: "The field that `param` names is understood, but this server cannot do it.",
    429: "The queue is full: try again after the seconds in Retry-After.",
    499: "The request was aborted.",
    500: "A bug of the server.",
    503: "No engine to run on: try again after the seconds in Retry-After.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that may answer with these statuses."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        answers[status] = {"description": _ERRORS[status], "model": ErrorResponse}
        if status in (429, 503):
            answers[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return answers


GENERATION_ERRORS = errors(400, 404, 408, 413, 422, 429, 499, 500, 503)
EVENT_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


class Takes(dict[str, Any]):
    """A route's `openapi_extra=`. It keeps the model that it describes, so that `server.http.openapi` can add the schema."""

    def __init__(self, model: type[BaseModel]) -> None:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        super().__init__(requestBody={"required": True, "content": {"application/json": {"schema": schema}}})
        self.model = model


def takes(model: type[BaseModel]) -> Takes:
    """`openapi_extra=` of a route that reads its body by `server.http.body.read_json`."""
    return Takes(model)
