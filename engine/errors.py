"""Every error that Tidegate raises on purpose, in one tree.

    TidegateError
    ├── ConfigError            a setting is wrong: start-up stops
    ├── CheckpointError        a checkpoint cannot be loaded: start-up stops
    ├── RequestError           one request ends because of the request itself; all others continue
    │   ├── InvalidRequest         a field is missing, of the wrong type or out of range
    │   │   ├── MalformedRequest       the body could not be parsed
    │   │   ├── UnsupportedField       the field is valid, but this server or model does not support it
    │   │   └── ContextTooLong         prompt (+ max_tokens) is longer than the model's context
    │   ├── Unauthenticated        missing or unknown key
    │   ├── UnknownModel           this server does not serve the named model
    │   ├── PayloadTooLarge        body or headers over the limit
    │   ├── UnsupportedMediaType   the body's content type is not JSON
    │   ├── RequestTimeout         the client was too slow, or the request passed its deadline
    │   ├── Overloaded             the queue is full: try again after `retry_after` seconds
    │   └── Aborted                the client disconnected or called Abort
    ├── NumericalError         the model computed NaN or infinity for one request; all others continue
    ├── EngineUnavailable      no engine is running, or none came back in time
    └── InternalError          a bug in Tidegate; details go to the log, never to the client

`server/errors.py` maps each class to an HTTP and a gRPC status. A test checks that the table covers every class.
"""

from __future__ import annotations

import math

EXIT_BAD_SETTINGS = 2  # exit code of a process that ends by ConfigError or CheckpointError


class TidegateError(Exception):
    """Base class of all Tidegate errors. `message` is written for the person who has to act on it.

    `param` names the request field or setting at fault. `code` is a stable word for programs.
    """

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(TidegateError):
    code = "bad_config"


class CheckpointError(TidegateError):
    code = "bad_checkpoint"


class RequestError(TidegateError):
    code = "request_error"


class InvalidRequest(RequestError):
    code = "invalid_value"


class MalformedRequest(InvalidRequest):
    code = "malformed_request"


class UnsupportedField(InvalidRequest):
    code = "unsupported_field"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthenticated(RequestError):
    code = "invalid_api_key"


class UnknownModel(RequestError):
    code = "model_not_found"


class PayloadTooLarge(RequestError):
    code = "payload_too_large"


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"


class RequestTimeout(RequestError):
    code = "request_timeout"


class Overloaded(RequestError):
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1, param: str | None = None) -> None:
        """`retry_after` is in seconds. It is rounded up to a whole number, and is at least 1."""
        super().__init__(message, param=param)
        self.retry_after = max(1, math.ceil(retry_after))


class Aborted(RequestError):
    code = "aborted"


class NumericalError(TidegateError):
    code = "numerical_error"


class EngineUnavailable(TidegateError):
    code = "engine_unavailable"


class InternalError(TidegateError):
    code = "internal_error"


def error_from_name(name: str, message: str, param: str | None = None, retry_after: int | None = None) -> TidegateError:
    """Return the exception that a RequestFailure describes. A name that is no class of this module gives an InternalError.

    `retry_after` is for Overloaded alone.
    """
    cls = globals().get(name)
    if not (isinstance(cls, type) and issubclass(cls, TidegateError)):
        return InternalError(f"{name}: {message}")
    if retry_after is not None and issubclass(cls, Overloaded):
        return cls(message, retry_after=retry_after, param=param)
    return cls(message, param=param)
