"""What the service needs of an engine, as Protocols. `EngineClient` implements them; tests use `tests.support.local_engine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from engine import errors
from engine.messages import EngineInfo, EngineStats, Submit
from engine.request import FinishReason, TokenEvent


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine looks from this worker now."""

    ready: bool  # reached, its heartbeat is fresh, and its step counter moves where it has work
    reason: str | None = None  # why not, for people
    started: bool = False  # ready was true once
    restarts: int = 0  # engines seen since this worker began, less one
    stats: EngineStats | None = None  # of the latest heartbeat
    startup: Mapping[str, float] = {}  # seconds of each phase of the latest engine's start


class TokenStream(Protocol):
    """The events of one request, from its first token to the one with `finish`, which is "stop" or "length".

    Every other end is raised by `__anext__`, as an exception of `engine.errors`. After `abort`, which may be called at any
    time and more than once, a waiting `__anext__` wakes and raises Aborted.
    """

    def __aiter__(self) -> TokenStream: ...

    async def __anext__(self) -> TokenEvent: ...

    def abort(self) -> None: ...

    @property
    def unread(self) -> int:
        """`size_of` all events that came and were not taken."""


class EngineClientProtocol(Protocol):
    @property
    def info(self) -> EngineInfo:
        """Of the engine reached last. Raises EngineUnavailable before the first one was."""

    @property
    def health(self) -> EngineHealth: ...

    def submit(self, submit: Submit) -> TokenStream:
        """Send a request off. A refusal is raised here or by the stream's first `__anext__`."""


def size_of(event: TokenEvent) -> int:
    """What an event holds in memory, in units of about 100 bytes. The prompt's log-probabilities have their own limit."""
    logprobs = event.logprobs
    return 2 + len(event.tokens) + (len(logprobs) * (2 + len(logprobs[0].top_ids)) if logprobs else 0)


def error_of(event: TokenEvent) -> errors.TidegateError | None:
    """The exception that an event with finish "abort" or "error" stands for."""
    if event.finish is FinishReason.ABORT:
        return errors.Aborted("the request was aborted")
    if event.finish is not FinishReason.ERROR:
        return None
    failure = event.failure
    if failure is None:
        return errors.InternalError(f"request {event.request_id} failed without a reason")
    return errors.error_from_name(failure.error, failure.message, failure.param)
