"""Runs the generations of a request, and answers it with one JSON object or with server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.http.disconnect import while_connected
from server.http.front import call_of
from server.http.routes.api import api_of
from server.http.routes.collect import CollectedOutput, Collector, merge
from server.http.routes.logprobs import Written
from server.http.sse import EventStream
from server.service.types import Chunk, Ending, GenerationRequest


class Answer(Protocol):
    """Writes the answer to one request, in the form that the request's route has."""

    def write_logprobs(self, chunk: Chunk, written: Written) -> Iterator[None]:
        """Append the log-probabilities of `chunk` to the fields of `written`. Yields between two slices of work."""

    def whole(self, outputs: list[CollectedOutput], endings: list[Ending]) -> Response:
        """Return the whole answer as one JSON object. `endings` has one entry for each generation."""

    def events(self, stream: AsyncGenerator[Chunk | Ending, None]) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events, for an `EventStream`. Closing this generator closes `stream`, which aborts the
        generations."""


async def respond(request: Request, answer: Answer, generations: list[GenerationRequest], *, stream: bool) -> Response:
    """Run `generations` side by side and answer `request` with their outputs, numbered in one sequence.

    The generations may differ only in their ids and prompts. `stream` selects server-sent events.
    """
    api = api_of(request)
    n = generations[0].n
    call = call_of(request.scope)
    measured = [msgspec.structs.replace(generation, progress=call.new_progress()) for generation in generations]
    streams = [api.service.generate(generation, api.service.anonymous) for generation in measured]
    if stream:
        return EventStream(answer.events(merge(streams, n)))
    collector = Collector(n, answer.write_logprobs, api.pacer)
    return answer.whole(*await while_connected(request.receive, collector.collect_all(streams)))
