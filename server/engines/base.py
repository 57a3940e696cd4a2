"""Protocols of the engine client and of its token streams, as the service uses them.

`server.engines.client.EngineClient` implements them over ZeroMQ, and `tests.support.local_engine.LocalEngine` in one process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import msgspec

from engine.errors import Aborted, InternalError, TidegateError, error_from_name
from engine.messages import EngineInfo, EngineStats, Submit, TierName
from engine.request import FinishReason, TokenEvent


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the engines as one API worker sees it."""

    ready: bool  # an engine is connected, its heartbeat is fresh, and its step counter moves while it has work
    reason: str | None = None  # why `ready` is False, for people
    started: bool = False  # an engine has been connected at least once
    restarts: int = 0  # engines that took the place of an earlier one since this worker started
    stats: EngineStats | None = None  # statistics from the latest heartbeat; summed if there are several engines
    startup: Mapping[str, float] = {}  # seconds of each start-up phase of the engine that connected last


class TokenStream(Protocol):
    """Iterates over the events of one request, from its first token to the event with `finish`, which is "stop" or "length".

    If the request ends in any other way, `__anext__` raises an exception of `engine.errors`. `abort` may be called at any time
    and more than once; a task that waits in `__anext__` then wakes up and raises Aborted.
    """

    def __aiter__(self) -> TokenStream: ...

    async def __anext__(self) -> TokenEvent: ...

    def abort(self) -> None: ...

    @property
    def unread(self) -> int:
        """The memory held by events that were received and not read yet, in units of about 100 bytes (`size_of`)."""


class EngineClientProtocol(Protocol):
    """Submits requests to engines. Every request gets a TokenStream of its own."""

    @property
    def info(self) -> EngineInfo:
        """The engine's model and limits. Raises EngineUnavailable before the first engine has connected."""

    @property
    def health(self) -> EngineHealth: ...

    def submit(self, submit: Submit) -> TokenStream:
        """Submit a request. A refusal is raised here or by the first `__anext__` of the stream."""

    async def reset_cache(self, tiers: Collection[TierName]) -> dict[TierName, int]:
        """Make all engines forget the blocks that `tiers` have of prefixes. Returns how many blocks each tier had in all engines.

        Raises EngineUnavailable, naming the engine, if one is not ready, in which case no engine is asked, or if one is lost or
        does not answer in time.
        """


def size_of(event: TokenEvent) -> int:
    """Return the memory that an event holds, in units of about 100 bytes.

    Log-probabilities of the prompt are not counted: the service limits them separately.
    """
    logprobs = event.logprobs
    return 2 + len(event.tokens) + (len(logprobs) * (2 + len(logprobs[0].top_ids)) if logprobs else 0)


def error_of(event: TokenEvent) -> TidegateError | None:
    """Return the exception for an event whose `finish` is "abort" or "error", and None for every other event."""
    if event.finish is FinishReason.ABORT:
        return Aborted("the request was aborted")
    if event.finish is not FinishReason.ERROR:
        return None
    if event.failure is None:
        return InternalError(f"request {event.request_id} failed without a reason")
    failure = event.failure
    return error_from_name(failure.error, failure.message, failure.param, failure.retry_after)
