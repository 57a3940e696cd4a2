"""Reports errors to clients, by a table from error class to HTTP status, OpenAI error type and gRPC status name.

The body of every HTTP error is {"error": {"type", "code", "message", "param"}}, of at most about 4 KB. It names the field at
fault by its path, and does not repeat what the client sent. For a bug it says only that there is one; the log has the details.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import orjson
from pydantic import ValidationError
from pydantic_core import core_schema

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
    UnsupportedMediaType,
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
    UnsupportedField: ErrorStatus(400, "invalid_request_error", "UNIMPLEMENTED"),
    ContextTooLong: _INVALID,
    Unauthenticated: ErrorStatus(401, "authentication_error", "UNAUTHENTICATED"),
    UnknownModel: ErrorStatus(404, "not_found_error", "NOT_FOUND"),
    PayloadTooLarge: ErrorStatus(413, "invalid_request_error", "RESOURCE_EXHAUSTED"),
    UnsupportedMediaType: ErrorStatus(415, "invalid_request_error", "INVALID_ARGUMENT"),
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


def code_of(error: BaseException) -> str:
    """Return the code that clients get for `error`. All bugs have one code."""
    return InternalError.code if status_of(error) is _BUG or not isinstance(error, TidegateError) else error.code


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


# What each kind of fault says behind the field's name. Pydantic's own words would speak of Python types and patterns.
_FAULTS = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "has too many digits",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "is required",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_pattern_mismatch": "has characters that are not allowed here",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must not be empty",
    "unknown_field": "is not a field of this request{hint}",
}
_OTHER_FAULT = "has a value that this server does not understand"
TOKEN_ID = r"^(0|[1-9][0-9]{0,9})$"  # one spelling of each token id, so that no object has the same token twice
CLIENT_ID = r"^[A-Za-z0-9._:@/=+-]+$"
_PATTERNS = {
    TOKEN_ID: "is not a token id: write it in decimal digits",
    CLIENT_ID: "may only have letters, digits and . _ : @ / = + -",
}
_KINDS_OF_PYDANTIC = frozenset(get_args(core_schema.ErrorType))


def from_validation(error: ValidationError) -> InvalidRequest:
    """Return an InvalidRequest for the first fault that pydantic found. Its message names the field but not the field's value."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    is_unknown = kind == "unknown_field"
    path = clip(field_path((*first["loc"], context["name"]) if is_unknown else first["loc"]), MAX_PARAM)
    fault = _fault(kind, context, first["msg"])
    more = error.error_count() - 1
    rest = f" (and {more} more fault{'s' if more > 1 else ''})" if more else ""
    message = f"{path or 'the body'} {fault}{rest}"
    return UnsupportedField(message, param=path or None) if is_unknown else InvalidRequest(message, param=path or None)


def _fault(kind: str, context: Mapping[str, Any], message: str) -> str:
    """Return in our words what is wrong with a field. A fault that a schema of ours raises has words of its own in `message`."""
    if kind == "string_pattern_mismatch" and context["pattern"] in _PATTERNS:
        return _PATTERNS[context["pattern"]]
    if kind in _FAULTS:
        return _FAULTS[kind].format(**context)
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    return _OTHER_FAULT if kind in _KINDS_OF_PYDANTIC else message
