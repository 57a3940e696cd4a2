"""An error's way out of a gRPC call: status code, message for people, and an ErrorDetail in the trailing metadata.

The codes are those of the one table in `server.errors`. Nothing of a bug's traceback leaves the server.
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
MAX_DETAILS_BYTES = 1024  # percent-encoding makes three of each, and clients refuse trailers of more than 8 KB

log = logging.getLogger(__name__)
S = TypeVar("S")
R = TypeVar("R")
Q = TypeVar("Q", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[S, R, Context], Awaitable[Any]]


def answers_errors(kind: type[Q], *, closed: bool = True) -> Callable[[Method[S, Q]], Method[S, bytes]]:
    """Hand the servicer's method a `kind` read from the call's bytes, and make what it raises the status of the call.

    The bytes are read here, since grpc's own answer to a message that is none is UNKNOWN, and a traceback in the log. With
    `closed`, fields that this server does not know are refused.
    """

    def decorate(method: Method[S, Q]) -> Method[S, bytes]:
        @functools.wraps(method)
        async def answering(self: S, message: bytes, context: Context) -> Any:
            try:
                return await method(self, read(kind, message, closed=closed), context)
            except grpc.aio.AbortError:  # the method has given its status itself
                raise
            except Exception as error:
                is_bug = status_of(error).grpc == grpc.StatusCode.INTERNAL.name
                if is_bug and not isinstance(error, grpc.aio.InternalError):  # a write to a client that is just leaving
                    log.exception("a %s call failed", method.__name__)
                await abort(context, error)

        return answering

    return decorate


def read(kind: type[Q], message: bytes, *, closed: bool) -> Q:
    """Raises MalformedRequest, or UnsupportedField where `closed`."""
    try:
        request = kind.FromString(message)
    except DecodeError:
        why = "it is cut short, is no protobuf, or has text that is not UTF-8"
        raise MalformedRequest(f"the message cannot be read as a {kind.DESCRIPTOR.full_name}: {why}") from None
    if closed:
        refuse_unknown_fields(request)
    return request


async def abort(context: Context, error: Exception) -> None:
    """End the call with `error`, by an exception of grpc's own; returns only where the client has gone meanwhile."""
    said = orjson.loads(error_body(error))["error"]
    detail = pb.ErrorDetail(type=said["type"], code=said["code"], param=said["param"])
    wait = error_headers(error).get("retry-after")
    if wait is not None:
        detail.retry_after = int(wait)
    details = said["message"].encode()[:MAX_DETAILS_BYTES].decode(errors="ignore")
    trailers = ((DETAIL_KEY, detail.SerializeToString()),)
    try:
        await context.abort(grpc.StatusCode[status_of(error).grpc], details, trailers)
    except grpc.aio.InternalError:
        log.debug("a client left before its error could be sent: %s", details)


def refuse_unknown_fields(request: Message) -> None:
    """protobuf keeps silent about fields of a newer client; dropping one of them would change what was asked."""
    unknown = UnknownFieldSet(request)
    if len(unknown):
        raise UnsupportedField(f"this server knows no field number {unknown[0].field_number} of {request.DESCRIPTOR.name}")
