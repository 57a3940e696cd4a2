"""Ends gRPC calls with an error: a status code, a message for people, and an ErrorDetail in the trailing metadata.

The status codes come from the table in `server.errors`. A traceback is logged and never sent to a client.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import orjson
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from engine.errors import MalformedRequest, UnsupportedField
from server.errors import error_body, error_headers, status_of
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb

DETAIL_KEY = "tidegate-error-bin"
MAX_DETAILS_BYTES = 1024  # percent-encoding can triple the size, and clients refuse trailers of more than 8 KB

log = logging.getLogger(__name__)
S = TypeVar("S")
R = TypeVar("R")
Q = TypeVar("Q", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[S, R, Context], Awaitable[Any]]


def answers_errors(kind: type[Q], *, closed: bool = True) -> Callable[[Method[S, Q]], Method[S, bytes]]:
    """Return a decorator for a servicer's method. It decodes the call's message as a `kind`, calls the method, and ends the call
    with the matching status if the method raises an exception.

    grpc itself would answer a message that cannot be decoded with UNKNOWN, and log a traceback. If `closed` is true, a message
    with fields that this server does not know is refused.
    """

    def decorate(method: Method[S, Q]) -> Method[S, bytes]:
        @functools.wraps(method)
        async def answering(self: S, message: bytes, context: Context) -> Any:
            try:
                return await method(self, read(kind, message, closed=closed), context)
            except grpc.aio.AbortError:  # grpc raised it because the method has already ended the call
                raise
            except Exception as error:
                is_bug = status_of(error).grpc == grpc.StatusCode.INTERNAL.name
                if is_bug and not isinstance(error, grpc.aio.InternalError):  # grpc raises InternalError if the client has left
                    log.exception("a %s call failed", method.__name__)
                await abort(context, error)

        return answering

    return decorate


def read(kind: type[Q], message: bytes, *, closed: bool) -> Q:
    """Decode `message` as a `kind`. Raises MalformedRequest. If `closed` is true, an unknown field raises UnsupportedField."""
    try:
        request = kind.FromString(message)
    except DecodeError:
        why = "it is cut short, is not protobuf, or has text that is not UTF-8"
        raise MalformedRequest(f"the message cannot be read as a {kind.DESCRIPTOR.full_name}: {why}") from None
    if closed:
        refuse_unknown_fields(request)
    return request


async def abort(context: Context, error: Exception) -> None:
    """End the call with `error`. This function raises grpc's AbortError, and returns only if the client has left."""
    body = orjson.loads(error_body(error))["error"]
    detail = pb.ErrorDetail(type=body["type"], code=body["code"], param=body["param"])
    wait = error_headers(error).get("retry-after")
    if wait is not None:
        detail.retry_after = int(wait)
    details = body["message"].encode()[:MAX_DETAILS_BYTES].decode(errors="ignore")
    trailers = ((DETAIL_KEY, detail.SerializeToString()),)
    try:
        await context.abort(grpc.StatusCode[status_of(error).grpc], details, trailers)
    except grpc.aio.InternalError:
        log.debug("a client left before its error could be sent: %s", details)


def refuse_unknown_fields(request: Message) -> None:
    """Raise UnsupportedField if `request` has a field that this server does not know, as a newer client may send. protobuf would
    ignore the field, which would silently change the request."""
    unknown = UnknownFieldSet(request)
    if len(unknown):
        raise UnsupportedField(
            f"{request.DESCRIPTOR.name} has field number {unknown[0].field_number}, which this server does not know"
        )
