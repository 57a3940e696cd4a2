"""Implements the service grpc.reflection.v1alpha with the servicer of the grpc_reflection package. This module decodes the
messages.

So a message that cannot be decoded ends the call with INVALID_ARGUMENT. grpc itself would end the call with UNKNOWN.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc_reflection.v1alpha import reflection, reflection_pb2

from engine.errors import MalformedRequest
from server.rpc.errors import Context, abort, read


class ReflectionServicer:
    """Answers reflection requests about `services`, which are full names of gRPC services."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._answers: Any = reflection.aio.ReflectionServicer(services)  # type: ignore[attr-defined]  # missing in the stubs

    async def ServerReflectionInfo(self, messages: AsyncIterator[bytes], context: Context) -> None:
        try:
            async with aclosing(self._answers.ServerReflectionInfo(_requests(messages), context)) as answers:
                async for answer in answers:
                    await context.write(answer)
        except MalformedRequest as error:
            await abort(context, error)


async def _requests(messages: AsyncIterator[bytes]) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    async for message in messages:
        yield read(reflection_pb2.ServerReflectionRequest, message, closed=False)
