"""Spreads long work over iterations of the event loop, so that an answer of any size holds no other stream up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from engine.request import TokenLogprobs

SLICE = 1024  # log-probabilities, alternatives counted: writing them takes 1 to 3 ms
Positions = Sequence[TokenLogprobs | None]  # None stands for a prompt's first token, which has no prediction


class Pacer:
    """Runs work slice by slice. All requests of a worker share one pacer, which runs one slice per loop iteration.

    The work is a generator that yields between two slices. A slice should take a few milliseconds at most.
    """

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    async def run(self, slices: Iterator[None]) -> None:
        """Run `slices` to the end. Work of a single slice runs at once, without a pause."""
        for _ in slices:
            async with self._one_at_a_time:
                await asyncio.sleep(0)


class Backlog:
    """Counts small pieces of work, to pause a task that never waits because its next item is always there already.

    if backlog.is_due(work):
        await asyncio.sleep(0)
    """

    __slots__ = ("_done", "_limit")

    def __init__(self, limit: int) -> None:
        """`limit` is how much work one loop iteration may do, in the unit of `is_due`."""
        self._limit = limit
        self._done = 0

    def is_due(self, work: int) -> bool:
        """Whether to pause after `work`, because the limit is reached. Not a coroutine: it is called for every token."""
        self._done += work
        if self._done < self._limit:
            return False
        self._done = 0
        return True


def slices(positions: Positions) -> Iterator[Positions]:
    """`positions` cut after every SLICE log-probabilities or a few more. Usually that is one slice: all of them."""
    begin = size = 0
    for i, position in enumerate(positions, 1):
        size += 1 if position is None else 1 + len(position.top_ids)
        if size >= SLICE:
            yield positions[begin:i]
            begin, size = i, 0
    if begin < len(positions):
        yield positions[begin:]
