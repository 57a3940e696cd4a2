"""Gives the methods of the gRPC services the record of the call that they answer.

grpc calls a method with the message and a context, to which nothing can be added. It runs each call in a task of its own, so a
context variable belongs to one call.
"""

from __future__ import annotations

from contextvars import ContextVar

from server.service.call_log import CallRecord

REQUEST_ID = "x-request-id"
IGNORED_FIELDS = "x-tidegate-ignored-fields"
CURRENT_CALL: ContextVar[CallRecord] = ContextVar("tidegate_grpc_call")


def metadata_of(call: CallRecord) -> tuple[tuple[str, str], ...]:
    """Return the metadata that every answer to `call` has."""
    named = (REQUEST_ID, call.id)
    return (named, (IGNORED_FIELDS, ", ".join(call.ignored))) if call.ignored else (named,)
