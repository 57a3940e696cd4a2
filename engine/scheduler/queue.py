"""WaitingQueue: the requests that hold no blocks, in a lane for each tenant and class. Each lane is in rank order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from operator import attrgetter

from engine.errors import InternalError
from engine.request import Request

_RANK = attrgetter("rank")


class Lane:
    """The waiting requests of one tenant and one class, sorted by rank. A lane of the queue is never empty."""

    __slots__ = ("requests",)

    def __init__(self) -> None:
        self.requests: list[Request] = []


class WaitingQueue:
    """Holds the waiting requests. With at most a few thousand of them, a sorted list is the cheapest structure for a lane."""

    __slots__ = ("_lanes", "_size", "num_prompt_tokens")

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, int], Lane] = {}  # (tenant, rank of the class) -> lane
        self._size = 0
        self.num_prompt_tokens = 0  # of all requests in the queue

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests, lane by lane. The queue must not change during the iteration."""
        for lane in self._lanes.values():
            yield from lane.requests

    @property
    def lanes(self) -> Collection[Lane]:
        return self._lanes.values()

    @property
    def best_class(self) -> int:
        """The smallest rank of a class of which a request waits. The queue must not be empty."""
        return min(slo for _, slo in self._lanes)

    def push(self, request: Request) -> None:
        """Insert a request, whose `rank` is set, into its lane. A preempted request returns to its position by rank."""
        lane = self._lanes.setdefault((request.tenant, request.slo.rank), Lane())
        insort(lane.requests, request, key=_RANK)
        self._size += 1
        self.num_prompt_tokens += request.num_prompt

    def remove(self, request: Request) -> None:
        """Remove a request. Raises InternalError if it is not in the queue."""
        key = (request.tenant, request.slo.rank)
        lane = self._lanes.get(key)
        index = bisect_left(lane.requests, request.rank, key=_RANK) if lane else 0
        if lane is None or index == len(lane.requests) or lane.requests[index] is not request:
            raise InternalError(f"{request} is not in the queue")
        del lane.requests[index]
        if not lane.requests:
            del self._lanes[key]
        self._size -= 1
        self.num_prompt_tokens -= request.num_prompt

    def check(self) -> None:
        """Raise InternalError if a lane is empty or not sorted, or if the sums are wrong."""
        for (tenant, slo), lane in self._lanes.items():
            ranks = [request.rank for request in lane.requests]
            if not ranks or ranks != sorted(set(ranks)):
                raise InternalError("a lane of the queue is empty or out of order")
            if any((request.tenant, request.slo.rank) != (tenant, slo) for request in lane.requests):
                raise InternalError("a request waits in the lane of another tenant or class")
        if self._size != sum(len(lane.requests) for lane in self._lanes.values()):
            raise InternalError("the size of the queue is wrong")
        if self.num_prompt_tokens != sum(request.num_prompt for request in self):
            raise InternalError("the number of waiting prompt tokens is wrong")
