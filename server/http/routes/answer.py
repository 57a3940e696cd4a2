"""How a generating route answers: it runs its generations, and has the answer written whole or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from server.http.disconnect import while_connected
from server.http.routes.api import api_of
from server.http.routes.collect import CollectedOutput, Collector, merge
from server.http.routes.logprobs import Written
from server.http.sse import EventStream
from server.service.types import Chunk, Ending, GenerationRequest


class Answer(Protocol):
    """The form of a route's answer."""

    def write_logprobs(self, chunk: Chunk, written: Written) -> Iterator[None]:
        """See `server.http.routes.logprobs.WriteLogprobs`."""

    def whole(self, outputs: list[CollectedOutput], endings: list[Ending]) -> Response:
        """One JSON object. There is an Ending for each generation."""

    def events(self, stream: AsyncGenerator[Chunk | Ending, None]) -> AsyncGenerator[bytes, None]:
        """The items of an `EventStream`. Closing the generator closes `stream`, which aborts the generations."""


async def respond(request: Request, answer: Answer, generations: list[GenerationRequest], *, stream: bool) -> Response:
    """Run `generations` side by side. They differ in their prompt only; their outputs are numbered in one sequence."""
    api = api_of(request)
    n = generations[0].n
    streams = [api.service.generate(generation) for generation in generations]
    if stream:
        return EventStream(answer.events(merge(streams, n)))
    collector = Collector(n, answer.write_logprobs, api.pacer)
    return answer.whole(*await while_connected(request.receive, collector.collect_all(streams)))
