"""WaitingQueue: requests that hold nothing, smaller priority first, then in order of arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.errors import InternalError
from engine.request import Request


def rank(request: Request) -> tuple[int, int]:
    """What goes first, and what is preempted last: the smaller."""
    return request.priority, request.sequence


class WaitingQueue:
    """A sorted list: at the few thousand entries that are let in, moving its tail costs less than any cleverer structure."""

    __slots__ = ("_last", "_requests")

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._last = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In order. The queue must not be changed meanwhile."""
        return iter(self._requests)

    def push(self, request: Request) -> None:
        """A new request goes behind its equals; one that was here before returns to its old place."""
        if request.sequence == 0:
            self._last += 1
            request.sequence = self._last
        insort(self._requests, request, key=rank)

    def remove(self, request: Request) -> None:
        index = bisect_left(self._requests, rank(request), key=rank)
        if index == len(self._requests) or self._requests[index] is not request:
            raise InternalError(f"{request} is not in the queue")
        del self._requests[index]

    def check(self) -> None:
        ranks = [rank(request) for request in self._requests]
        if ranks != sorted(set(ranks)):
            raise InternalError("the queue is out of order")
