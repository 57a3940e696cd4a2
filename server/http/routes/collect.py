"""Chunks of several outputs brought together: into whole outputs, or several prompts' streams into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from engine.errors import InternalError
from engine.request import TokenLogprobs
from server.service.types import Chunk, Ending, Usage


@dataclass(slots=True)
class Output:
    """One whole output."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            self.logprobs = (self.logprobs or []) + chunk.logprobs
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason


async def collect(stream: AsyncGenerator[Chunk | Ending, None], n: int) -> tuple[list[Output], Ending]:
    """All `n` outputs of one prompt."""
    outputs = [Output(index) for index in range(n)]
    ending = None
    async with aclosing(stream):
        async for item in stream:
            if isinstance(item, Chunk):
                outputs[item.index].add(item)
            else:
                ending = item
    if ending is None:
        raise InternalError("a generation ended without its Ending")
    return outputs, ending


async def collect_all(streams: list[AsyncGenerator[Chunk | Ending, None]], n: int) -> tuple[list[Output], list[Ending]]:
    """The outputs of several prompts at once, numbered through. One that fails ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(stream, n)) for stream in streams]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    outputs, endings = [], []
    for i, task in enumerate(tasks):
        some, ending = task.result()
        for output in some:
            output.index += i * n
        outputs += some
        endings.append(ending)
    return outputs, endings


async def merge(streams: list[AsyncGenerator[Chunk | Ending, None]], n: int) -> AsyncGenerator[Chunk | Ending, None]:
    """Several prompts' streams as one, in order of arrival, with outputs numbered through; each prompt has its Ending."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[Chunk | Ending | BaseException | None] = asyncio.Queue(
        len(streams)
    )  # the rest waits where `Call` counts it
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
    try:
        async with aclosing(stream):  # type: ignore[type-var]
            async for item in stream:
                if isinstance(item, Chunk):
                    item.index += first_index
                await queue.put(item)
    except Exception as error:  # noqa: BLE001 - it goes on in the task that reads the queue
        await queue.put(error)
    else:
        await queue.put(None)


def total_usage(endings: list[Ending]) -> Usage:
    return Usage(
        prompt_tokens=sum(e.usage.prompt_tokens for e in endings),
        cached_tokens=sum(e.usage.cached_tokens for e in endings),
        completion_tokens=sum(e.usage.completion_tokens for e in endings),
    )
