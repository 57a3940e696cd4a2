"""EngineStream: one request of an API worker, from submission to its last event. Several engines may run it in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from engine.errors import Aborted, ContextTooLong, TidegateError
from engine.messages import Submit, pack_tokens
from engine.request import FinishReason, TokenEvent
from server.engines.base import error_of, size_of

# Number of events with tokens after which an engine has proved that it survives the request. One event is not enough: the engine
# sends the first event while it already runs the next step, and may die in that step.
PROGRESS_EVENTS = 2
_NO_TIME_S = 1e-3  # deadline of a request whose own has passed: the call that owns the stream is about to end it


class EngineStream:
    """Implements `server.engines.base.TokenStream` for one request.

    The stream keeps the request and all tokens received, so that the request can be submitted again after an engine's death.
    Events that arrive faster than the consumer reads them are merged into one.
    """

    __slots__ = (
        "_context_len",
        "_deadline",
        "_error",
        "_events",
        "_num_events",
        "_on_abort",
        "_received",
        "_waiter",
        "deaths",
        "deaths_since",
        "ended",
        "request",
        "request_id",
        "resumed",
    )

    def __init__(self, request: Submit, on_abort: Callable[[EngineStream], None], now: float) -> None:
        """`now` is the time of the submission, by the clock of which `resumption` gets a later time."""
        self.request = request
        self.request_id = request.request_id
        self.deaths = 0  # engines in a row that died with this request and made no progress with it; see `Suspects`
        self.deaths_since = 0  # number of the first of these deaths; see `Suspects`
        self.ended = False
        self.resumed = False  # whether an earlier engine had this request
        self._num_events = 0  # events with tokens from the present engine
        self._context_len: int | None = None  # the present engine's context, if it cannot hold prompt and max_tokens
        self._deadline = None if request.deadline_s is None else now + request.deadline_s
        self._on_abort = on_abort
        self._received: list[int] = []
        self._events: deque[TokenEvent] = deque()
        self._error: TidegateError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft() if len(self._events) == 1 else self._merge_events()

    @property
    def unread(self) -> int:
        return sum(map(size_of, self._events))

    @property
    def has_begun(self) -> bool:
        """Return whether the present engine has sent tokens of this request."""
        return self._num_events > 0

    @property
    def has_progressed(self) -> bool:
        """Return whether the present engine has survived a step of this request."""
        return self._num_events >= PROGRESS_EVENTS

    def abort(self) -> None:
        if not self.ended:
            self._on_abort(self)
            self._events.clear()
            self.end(Aborted("the request was aborted"))

    def put(self, event: TokenEvent) -> None:
        """Pass an event of the present engine on to the stream's consumer."""
        error = None if event.finish is None else self._final_error(event)
        if error is not None:
            event.finish = None
        if error is None or event.tokens:
            self._add(event)
        if error is not None:
            self.end(error)

    def end(self, error: TidegateError) -> None:
        """Raise `error` at the consumer once it has read the events received so far."""
        if not self.ended:
            self._error = error
            self.ended = True
            self._wake()

    def lose_engine(self) -> None:
        """Record that the present engine has died or has been disconnected."""
        self.resumed = True
        self._num_events = 0

    def resumption(self, max_model_len: int, now: float) -> Submit:
        """Return the message that submits this request to an engine with a context of `max_model_len` tokens.

        The message has the deadline that is left. If an engine already had the request, the message holds the tokens received so
        far, and says that no prediction may refuse it: part of the answer may be at the client. If the new engine's context
        cannot hold prompt and max_tokens, the request may run as far as that context goes, and then ends with ContextTooLong.
        Raises ContextTooLong if the context cannot hold even the next token.
        """
        submit, params = self.request, self.request.params
        capacity = max_model_len - submit.num_prompt  # tokens of output that fit into the context
        self._context_len = max_model_len if params.max_tokens > capacity else None
        if len(self._received) >= capacity:
            raise self._context_error(max_model_len)
        if self._context_len is not None:
            params = msgspec.structs.replace(params, max_tokens=capacity, min_tokens=min(params.min_tokens, capacity))
        if self._received:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(
            submit,
            outputs=submit.outputs + pack_tokens(self._received),
            params=params,
            fork_of=None if self.resumed else submit.fork_of,
            promised=submit.promised and not self.resumed,
            deadline_s=None if self._deadline is None else max(self._deadline - now, _NO_TIME_S),
            resumed=self.resumed,
        )

    def _final_error(self, event: TokenEvent) -> TidegateError | None:
        """Return the exception that the last event of the request leads to, or None if the request ends well."""
        if event.finish is FinishReason.LENGTH and self._context_len is not None:
            return self._context_error(self._context_len)
        return error_of(event)

    def _context_error(self, max_model_len: int) -> ContextTooLong:
        return ContextTooLong(
            f"the engine was replaced by one with a context of {max_model_len} tokens while this request was under way, and the "
            f"request needs {self.request.num_prompt + self.request.params.max_tokens} "
            f"(prompt {self.request.num_prompt}, max_tokens {self.request.params.max_tokens})",
            param="max_tokens" if self.request.num_prompt < max_model_len else "prompt",
        )

    def _add(self, event: TokenEvent) -> None:
        self._num_events += 1
        if self._num_events == PROGRESS_EVENTS:
            self.deaths = 0
        if self._received and self.resumed:  # the consumer got these values before the engine died
            event.cached = event.queue_s = event.prompt_logprobs = None
        self._received += event.tokens
        self._events.append(event)
        self.ended = event.finish is not None
        self._wake()

    def _merge_events(self) -> TokenEvent:
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
