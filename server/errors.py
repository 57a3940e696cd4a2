"""Reports errors to clients, by a table from error class to HTTP status, OpenAI error type and gRPC status name.

The body of every HTTP error is {"error": {"type", "code", "message", "param"}}, of at most about 4 KB. It names the field at
fault by its path, and does not repeat what the client sent. For a bug it says only that there is one; the log has the details.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson
from pydantic import ValidationError

from engine.errors import (
    Aborted,
    CheckpointError,
    ConfigError,
    ContextTooLong,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    MalformedRequest,
    NumericalError,
    Overloaded,
    PayloadTooLarge,
    RequestError,
    RequestTimeout,
    TidegateError,
    Unauthenticated,
    UnknownModel,
    UnsupportedField,
)


class ErrorStatus(NamedTuple):
    http: int
    type: str  # OpenAI's error type
    grpc: str  # name of a grpc.StatusCode


_INVALID = ErrorStatus(400, "invalid_request_error", "INVALID_ARGUMENT")
_BUG = ErrorStatus(500, "server_error", "INTERNAL")

STATUS: dict[type[TidegateError], ErrorStatus] = {
    TidegateError: _BUG,
    ConfigError: _BUG,
    CheckpointError: _BUG,
    RequestError: _INVALID,
    InvalidRequest: _INVALID,
    MalformedRequest: _INVALID,
    UnsupportedField: ErrorStatus(422, "invalid_request_error", "UNIMPLEMENTED"),
    ContextTooLong: _INVALID,
    Unauthenticated: ErrorStatus(401, "authentication_error", "UNAUTHENTICATED"),
    UnknownModel: ErrorStatus(404, "not_found_error", "NOT_FOUND"),
    PayloadTooLarge: ErrorStatus(413, "invalid_request_error", "RESOURCE_EXHAUSTED"),
    RequestTimeout: ErrorStatus(408, "timeout_error", "DEADLINE_EXCEEDED"),
    Overloaded: ErrorStatus(429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
    Aborted: ErrorStatus(499, "aborted", "CANCELLED"),
    EngineUnavailable: ErrorStatus(503, "service_unavailable_error", "UNAVAILABLE"),
    NumericalError: _BUG,
    InternalError: _BUG,
}

MAX_MESSAGE = 384  # characters. With MAX_PARAM, a body stays under 4 KB even if each character takes six bytes, as \u0001 does
MAX_PARAM = 256  # largest number of characters in the name of a field
ENGINE_RETRY_SECONDS = 1  # Retry-After in the answer for EngineUnavailable
_BUG_MESSAGE = "The server failed on this request because of a bug. The server's log has the details."


def status_of(error: BaseException) -> ErrorStatus:
    """Return the row of STATUS for the error's class, or for its nearest base class. An exception without a row is a bug: 500."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return _BUG


def error_object(type_: str, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an HTTP error. `message` and `param` are cut to MAX_MESSAGE and MAX_PARAM characters."""
    return {
        "error": {
            "type": type_,
            "code": code,
            "message": clip(message, MAX_MESSAGE),
            "param": None if param is None else clip(param, MAX_PARAM),
        }
    }


def error_body(error: BaseException) -> bytes:
    """Return the JSON body of the HTTP answer that reports `error`. The message of a bug is replaced by a general one."""
    status = status_of(error)
    if status is _BUG or not isinstance(error, TidegateError):
        return orjson.dumps(error_object(status.type, InternalError.code, _BUG_MESSAGE))
    return orjson.dumps(error_object(status.type, error.code, error.message, error.param))


def error_headers(error: BaseException) -> dict[str, str]:
    """Return the additional headers of an HTTP answer that reports `error`: retry-after, www-authenticate or none."""
    if isinstance(error, Overloaded):
        return {"retry-after": str(max(1, error.retry_after))}
    if isinstance(error, EngineUnavailable):
        return {"retry-after": str(ENGINE_RETRY_SECONDS)}
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    return {}


def clip(text: str, limit: int) -> str:
    """Return the first `limit` characters of `text`. Lone surrogates become question marks, so that the result can be encoded."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.encode("utf-8", "replace").decode("utf-8")


def field_path(loc: tuple[int | str, ...]) -> str:
    """Return the path of a field from pydantic's location: ("messages", 0, "content") -> "messages[0].content".

    The path leaves out pydantic's marker "[key]" and the tags of the schemas' unions, which begin with "#".
    """
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]" and not part.startswith("#"):
            path += f".{part}" if path else part
    return path


_SENTENCES = {
    "missing": "{path} is required",
    "extra_forbidden": "{path} is not a field of this request",
    "finite_number": "{path} must be a finite number",
}


def from_validation(error: ValidationError) -> InvalidRequest:
    """Return an InvalidRequest for the first fault that pydantic found. Its message names the field but not the field's value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = clip(field_path(first["loc"]), MAX_PARAM)
    fault = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").removeprefix("Input ")
    more = error.error_count() - 1
    template = _SENTENCES.get(first["type"])
    if template is not None:
        message = template.format(path=path or "the body")
    elif path:
        message = f"{path}{' ' if fault.startswith(('should', 'must')) else ': '}{fault[:1].lower() + fault[1:]}"
    else:
        message = fault
    if more:
        message += f" (and {more} more fault{'s' if more > 1 else ''})"
    return InvalidRequest(message, param=path or None)
