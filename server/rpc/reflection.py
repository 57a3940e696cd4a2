"""grpc.reflection.v1alpha: the package's own servicer, but for the reading of messages: those that are none are answered for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc_reflection.v1alpha import reflection, reflection_pb2

from engine.errors import MalformedRequest
from server.rpc.errors import Context, abort, read


class ReflectionServicer:
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
