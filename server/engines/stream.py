"""EngineStream: one request as an API worker sees it, from its submission to its end, through as many engines as it takes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from engine.errors import Aborted, TidegateError
from engine.messages import Submit, pack_tokens
from engine.request import TokenEvent
from server.engines.base import error_of, size_of


class EngineStream:
    """See `server.engines.base.TokenStream`. Events that queue up while the consumer is busy come out as one."""

    __slots__ = (
        "_ended",
        "_error",
        "_events",
        "_on_abort",
        "_received",
        "_submit",
        "_waiter",
        "answered",
        "deaths",
        "request_id",
        "resumed",
        "sent",
    )

    def __init__(self, submit: Submit, on_abort: Callable[[str], None]) -> None:
        self.request_id = submit.request_id
        self.deaths = 0  # of engines that had this request
        self.sent = False  # to the engine there is now
        self.answered = False  # by it
        self.resumed = False  # an earlier engine had this request
        self._on_abort = on_abort
        self._submit = submit
        self._received: list[int] = []
        self._events: deque[TokenEvent] = deque()
        self._ended = False
        self._error: TidegateError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft() if len(self._events) == 1 else self._drain()

    @property
    def unread(self) -> int:
        return sum(map(size_of, self._events))

    def abort(self) -> None:
        if not self._ended:
            self._on_abort(self.request_id)
            self._events.clear()
            self.end(Aborted("the request was aborted"))

    def put(self, event: TokenEvent) -> None:
        self.answered = True
        error = error_of(event) if event.finish is not None else None
        if error is not None:
            self.end(error)
            return
        if self._received and self.resumed:  # told once already, before the engine died
            event.num_cached = event.queue_s = event.prompt_logprobs = None
        self._received += event.tokens
        self._events.append(event)
        self._ended = event.finish is not None
        self._wake()

    def end(self, error: TidegateError) -> None:
        if not self._ended:
            self._error = error
            self._ended = True
            self._wake()

    @property
    def priority(self) -> int:
        return self._submit.priority

    def lose_engine(self) -> None:
        self.resumed = self.resumed or self.sent
        self.sent = self.answered = False

    def submission(self) -> Submit:
        """What to send: the request as it came or, where an engine had it before, with the tokens that are here already."""
        submit, params = self._submit, self._submit.params
        if not self.resumed:
            return submit
        if self._received:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(submit, outputs=submit.outputs + pack_tokens(self._received), params=params, fork_of=None)

    def _drain(self) -> TokenEvent:
        first, *others = self._events
        self._events.clear()
        for event in others:
            first.tokens += event.tokens
            if event.logprobs is not None:
                first.logprobs = (first.logprobs or []) + event.logprobs
            first.finish, first.stop_token = event.finish, event.stop_token
        return first

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
