"""WaitingQueue: requests that hold no blocks, ordered by priority (smaller first), then by arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.errors import InternalError
from engine.request import Request


def rank(request: Request) -> tuple[int, int]:
    """Return the rank of a request: its sort key. The request of the smallest rank runs first and is preempted last."""
    return request.priority, request.sequence


class WaitingQueue:
    """Holds the waiting requests in a sorted list. With at most a few thousand requests, a list is the cheapest structure."""

    __slots__ = ("_last", "_requests")

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._last = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests in rank order (priority, then arrival). The queue must not change during the iteration."""
        return iter(self._requests)

    def push(self, request: Request) -> None:
        """Insert a request behind the requests of its priority. A preempted request returns to its position by arrival."""
        if request.sequence == 0:
            self._last += 1
            request.sequence = self._last
        insort(self._requests, request, key=rank)

    def remove(self, request: Request) -> None:
        """Remove a request. Raises InternalError if it is not in the queue."""
        index = bisect_left(self._requests, rank(request), key=rank)
        if index == len(self._requests) or self._requests[index] is not request:
            raise InternalError(f"{request} is not in the queue")
        del self._requests[index]

    def check(self) -> None:
        """Raise InternalError if the queue is not sorted."""
        ranks = [rank(request) for request in self._requests]
        if ranks != sorted(set(ranks)):
            raise InternalError("the queue is out of order")
