"""Defines CallGate, which limits the number of open gRPC calls and the time in which each call must send its message.

grpc itself waits without limit for the message of a call. So every method is registered with grpc as one that reads a stream of
messages, which starts its handler before the message is there. The bytes on the wire are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from engine.errors import MalformedRequest, Overloaded, RequestTimeout, TidegateError
from engine.logs import ThrottledWarning
from server.metrics.registry import Metrics
from server.rpc.current_call import CURRENT_CALL, REQUEST_ID
from server.rpc.errors import Context, abort
from server.service.call_log import CallRecord
from server.settings import Settings

log = logging.getLogger("tidegate.grpc")

Messages = AsyncIterator[bytes]
Handler = Callable[[Messages, Context], Awaitable[Any]]


class CallGate:
    """Wraps the methods of all services of one gRPC server, to limit the number of open calls and the wait for a message."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._max_calls = settings.max_grpc_calls
        self._first_s = settings.body_timeout_s
        self._next_s = settings.idle_timeout_s
        self._writes_log = settings.log_requests
        self._metrics = metrics
        self._num_open = 0
        self._warnings = {
            "too_many": ThrottledWarning(log, "gRPC calls are refused: as many are open as max_grpc_calls allows"),
            "no_message": ThrottledWarning(log, "gRPC calls sent no message within body_timeout_s and were ended"),
        }

    def one_message(self, route: str, method: Callable[[bytes, Context], Awaitable[Any]]) -> Handler:
        """Return a gRPC handler that waits for one message and then calls `method` with it. `route` is the method's full name."""

        async def handler(messages: Messages, context: Context) -> Any:
            async with self._open_call(route, context):
                self._check_number()
                message = await self._next(messages, self._first_s)
                if message is None:
                    raise MalformedRequest("the call ended without a message")
                return await method(message, context)

        return handler

    def many_messages(self, route: str, method: Callable[[Messages, Context], Awaitable[Any]]) -> Handler:
        """Return a gRPC handler that calls `method` with a stream of messages. Each message must arrive in time."""

        async def handler(messages: Messages, context: Context) -> Any:
            async with self._open_call(route, context):
                self._check_number()
                return await method(self._timed(messages), context)

        return handler

    @contextlib.asynccontextmanager
    async def _open_call(self, route: str, context: Context) -> AsyncIterator[None]:
        """Count a call as open while the `with` block runs, and then log it. A TidegateError in the block ends the call with that
        error."""
        given = next((value for key, value in context.invocation_metadata() or () if key == REQUEST_ID), None)
        call = CallRecord(given.encode() if isinstance(given, str) else given, route)
        call.status = grpc.StatusCode.OK.name
        CURRENT_CALL.set(call)
        self._num_open += 1
        try:
            yield
        except TidegateError as error:
            await abort(context, error)
        except grpc.aio.AbortError:  # the method has ended the call itself
            call.status = getattr(context.code(), "name", call.status)
            raise
        except asyncio.CancelledError:
            call.status = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            self._num_open -= 1
            if self._writes_log:
                call.write()

    def _check_number(self) -> None:
        if self._num_open > self._max_calls:
            raise self._refusal("too_many")

    async def _timed(self, messages: Messages) -> Messages:
        """Yield the messages of a stream. Raises RequestTimeout if the next message takes too long."""
        seconds = self._first_s
        while (message := await self._next(messages, seconds)) is not None:
            yield message
            seconds = self._next_s

    async def _next(self, messages: Messages, seconds: float) -> bytes | None:
        """Return the next message, or None if the client has ended its side. Raises RequestTimeout after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await anext(aiter(messages), None)
        except TimeoutError:
            raise self._refusal("no_message", seconds) from None

    def _refusal(self, reason: str, seconds: float = 0.0) -> TidegateError:
        """Count and log a refused call. Returns the error for the client of the call."""
        self._metrics.call_refused(reason)
        self._warnings[reason](limit=self._max_calls if reason == "too_many" else seconds)
        if reason == "too_many":
            return Overloaded(f"{self._max_calls} calls are open, which is the most that this server takes: try again later")
        return RequestTimeout(f"the call sent no message within {seconds:g} seconds")
