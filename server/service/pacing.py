"""Spreads long work over many iterations of the event loop, so that a large answer does not delay other streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from engine.request import TokenLogprobs

SLICE = 1024  # log-probabilities, alternatives counted: writing them takes 1 to 3 ms
Positions = Sequence[TokenLogprobs | None]  # None stands for a prompt's first token, which has no prediction


class Pacer:
    """Runs long work slice by slice, one slice per iteration of the event loop. All HTTP requests of a worker share one pacer.

    The work is a generator that yields between two slices. A slice should take a few milliseconds at most.
    """

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    async def run(self, slices: Iterator[None]) -> None:
        """Run the generator `slices` to its end. The first slice runs at once; other tasks run before each further slice."""
        for _ in slices:
            async with self._one_at_a_time:
                await asyncio.sleep(0)


class Backlog:
    """Counts small pieces of work, and says when a task should pause for other tasks. A task whose next item is always available
    never waits by itself, so it pauses like this:

    if backlog.is_due(work):
        await asyncio.sleep(0)
    """

    __slots__ = ("_done", "_limit")

    def __init__(self, limit: int) -> None:
        """`limit` is how much work to do between two pauses, in the unit of the caller."""
        self._limit = limit
        self._done = 0

    def is_due(self, work: int) -> bool:
        """Add `work` to the count, and return True if a pause is due. This is no coroutine: it is called for every token."""
        self._done += work
        if self._done < self._limit:
            return False
        self._done = 0
        return True


def slices(positions: Positions) -> Iterator[Positions]:
    """Cut `positions` into slices of SLICE log-probabilities or a few more. Usually one slice has all positions."""
    begin = size = 0
    for i, position in enumerate(positions, 1):
        size += 1 if position is None else 1 + len(position.top_ids)
        if size >= SLICE:
            yield positions[begin:i]
            begin, size = i, 0
    if begin < len(positions):
        yield positions[begin:]
