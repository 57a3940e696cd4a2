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
from server.errors import code_of, error_body, error_headers, status_of
from server.http.schemas.fields import MAX_REPORTED
from server.rpc.current_call import CURRENT_CALL, metadata_of
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

    grpc itself would answer a message that cannot be decoded with UNKNOWN, and log a traceback. If `closed` is true, fields that
    this server does not know are refused, or reported if the servicer's `strict_fields` is false.
    """

    def decorate(method: Method[S, Q]) -> Method[S, bytes]:
        @functools.wraps(method)
        async def answering(self: S, message: bytes, context: Context) -> Any:
            try:
                request = read(kind, message, closed=closed and getattr(self, "strict_fields", True))
                answer = await method(self, request, context)
                if answer is not None:  # a method that streams sends its metadata itself
                    await context.send_initial_metadata(metadata_of(CURRENT_CALL.get()))
                return answer
            except grpc.aio.AbortError:  # grpc raised it because the method has already ended the call
                raise
            except Exception as error:
                is_bug = status_of(error).grpc == grpc.StatusCode.INTERNAL.name
                if is_bug and not isinstance(error, grpc.aio.InternalError):  # grpc raises InternalError if the client has left
                    log.exception("a %s call failed", method.__name__, extra={"id": CURRENT_CALL.get().id})
                await abort(context, error)

        return answering

    return decorate


def read(kind: type[Q], message: bytes, *, closed: bool) -> Q:
    """Decode `message` as a `kind`. Raises MalformedRequest. If `closed` is true, an unknown field raises UnsupportedField;
    otherwise the call's record gets the numbers of unknown fields."""
    try:
        request = kind.FromString(message)
    except DecodeError:
        why = "it is cut short, is not protobuf, or has text that is not UTF-8"
        raise MalformedRequest(f"the message cannot be read as a {kind.DESCRIPTOR.full_name}: {why}") from None
    unknown = UnknownFieldSet(request)
    if len(unknown):
        numbers = [unknown[i].field_number for i in range(min(len(unknown), MAX_REPORTED))]
        if closed:
            raise UnsupportedField(f"{request.DESCRIPTOR.name} has field number {numbers[0]}, which this server does not know")
        CURRENT_CALL.get().ignored = tuple(f"field {number}" for number in dict.fromkeys(numbers))
    return request


async def abort(context: Context, error: Exception) -> None:
    """End the call with `error`. This function raises grpc's AbortError, and returns only if the client has left."""
    body = orjson.loads(error_body(error))["error"]
    detail = pb.ErrorDetail(type=body["type"], code=body["code"], param=body["param"])
    wait = error_headers(error).get("retry-after")
    if wait is not None:
        detail.retry_after = int(wait)
    details = body["message"].encode()[:MAX_DETAILS_BYTES].decode(errors="ignore")
    call = CURRENT_CALL.get()
    call.status, call.code = status_of(error).grpc, code_of(error)
    trailers: tuple[tuple[str, str | bytes], ...] = ((DETAIL_KEY, detail.SerializeToString()), *metadata_of(call))
    try:
        await context.abort(grpc.StatusCode[status_of(error).grpc], details, trailers)
    except grpc.aio.InternalError:
        log.debug("a client left before its error could be sent: %s", details)
