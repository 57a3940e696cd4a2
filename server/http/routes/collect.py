"""Collects the chunks of a generation into whole outputs, and merges the streams of several prompts into one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from engine.errors import InternalError
from engine.request import CachedTokens
from server.http.routes.logprobs import WriteLogprobs, Written
from server.service.pacing import Backlog, Pacer
from server.service.types import Chunk, Ending, Usage

_BACKLOG_CHUNKS = 64  # chunks handled per event loop iteration: a few milliseconds of work, including that of the service


@dataclass(slots=True)
class CollectedOutput:
    """Holds the text, tokens and log-probabilities that have arrived so far for one output of a request."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    written: Written = field(default_factory=dict)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, chunk: Chunk) -> None:
        """Append the text and tokens of `chunk`. Its log-probabilities are added to `written` separately, slice by slice."""
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        if chunk.prompt_token_ids is not None:
            self.prompt_token_ids = chunk.prompt_token_ids
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason


class Collector:
    """Collects streams of chunks into whole outputs.

    Log-probabilities are written as JSON when their chunk arrives, because writing all of them at the end can take seconds.
    """

    def __init__(self, n: int, write: WriteLogprobs, pacer: Pacer) -> None:
        """`n` is the number of outputs of each prompt. `write` writes log-probabilities in the form of the route."""
        self._n = n
        self._write = write
        self._pacer = pacer

    async def collect(
        self, stream: AsyncGenerator[Chunk | Ending, None], *, first_index: int = 0
    ) -> tuple[list[CollectedOutput], Ending]:
        """Collect the outputs of one prompt, numbered from `first_index`. Raises InternalError if the stream has no Ending."""
        outputs = [CollectedOutput(first_index + i) for i in range(self._n)]
        backlog = Backlog(_BACKLOG_CHUNKS)
        ending = None
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, Ending):
                    ending = item
                    continue
                output = outputs[item.index]
                output.add(item)
                if item.logprobs is not None or item.prompt_logprobs is not None:
                    await self._pacer.run(self._write(renumbered(item, first_index), output.written))
                if backlog.is_due(1):
                    await asyncio.sleep(0)
        if ending is None:
            raise InternalError("a generation ended without its Ending")
        return outputs, ending

    async def collect_all(
        self, streams: list[AsyncGenerator[Chunk | Ending, None]]
    ) -> tuple[list[CollectedOutput], list[Ending]]:
        """Collect the outputs of all prompts, numbered in one sequence. If one prompt fails, all of them end with its error."""
        if len(streams) == 1:
            outputs, ending = await self.collect(streams[0])
            return outputs, [ending]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.collect(stream, first_index=i * self._n)) for i, stream in enumerate(streams)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        results = [task.result() for task in tasks]
        return [output for outputs, _ in results for output in outputs], [ending for _, ending in results]


def renumbered(chunk: Chunk, first_index: int) -> Chunk:
    """Return `chunk` with `first_index` added to the index of its output. The original chunk does not change."""
    return msgspec.structs.replace(chunk, index=chunk.index + first_index) if first_index else chunk


async def merge(streams: list[AsyncGenerator[Chunk | Ending, None]], n: int) -> AsyncGenerator[Chunk | Ending, None]:
    """Merge the streams of several prompts, in order of arrival. Outputs are numbered in one sequence.

    The merged stream has one Ending for each prompt. An error of one prompt ends the merged stream and closes all the streams.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    # The queue is short on purpose: chunks that do not fit wait in the service's streams, where their size is limited.
    queue: asyncio.Queue[Chunk | Ending | BaseException | None] = asyncio.Queue(len(streams))
    tasks = [asyncio.create_task(_feed(queue, stream, i * n)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    queue: asyncio.Queue[Chunk | Ending | BaseException | None], stream: AsyncIterator[Chunk | Ending], first_index: int
) -> None:
    """Put the items of `stream` into `queue`, followed by None. If the stream raises an error, put the error instead of None."""
    try:
        async with aclosing(stream):  # type: ignore[type-var]
            async for item in stream:
                await queue.put(renumbered(item, first_index) if isinstance(item, Chunk) else item)
    except Exception as error:  # noqa: BLE001 - raised again in the task that reads the queue
        await queue.put(error)
    else:
        await queue.put(None)


def total_usage(endings: list[Ending]) -> Usage:
    return Usage(
        prompt_tokens=sum(e.usage.prompt_tokens for e in endings),
        cached=sum((e.usage.cached for e in endings), CachedTokens()),
        completion_tokens=sum(e.usage.completion_tokens for e in endings),
    )
