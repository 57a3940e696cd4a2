"""WaitingQueue: the requests that do not run, in a lane for each tenant and class. Each lane is in rank order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from operator import attrgetter

from engine.errors import InternalError
from engine.request import Request
from engine.scheduler.shares import Held
from engine.scheduler.work import NO_WORK, Work, total, work_of
from engine.slo import SLO_CLASSES

_RANK = attrgetter("rank")
_CLASS_RANKS = tuple(slo.rank for slo in SLO_CLASSES.values())


class Lane:
    """The waiting requests of one tenant and one class, sorted by rank. A lane of the queue is never empty."""

    __slots__ = ("num_tokens", "requests", "work")

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.work = NO_WORK
        self.num_tokens = 0  # of all its requests, those included that a cache may have

    def before(self, request: Request) -> Work:
        """Return the work of the requests of a better rank than `request`."""
        index = bisect_left(self.requests, request.rank, key=_RANK)
        if index == len(self.requests):
            return self.work
        return total(map(work_of, self.requests[:index]))


class WaitingQueue:
    """Holds the waiting requests. With at most a few thousand of them, a sorted list is the cheapest structure for a lane."""

    __slots__ = ("_lanes", "_size", "num_spilling", "num_tokens")

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, int], Lane] = {}  # (tenant, rank of the class) -> lane
        self._size = 0
        self.num_spilling = 0  # requests that spill
        self.num_tokens = 0  # of all requests in the queue, those included that a cache may have

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
        request.num_queued = len(request.tokens)
        lane.work = lane.work.plus(work_of(request))
        lane.num_tokens += request.num_queued
        self._size += 1
        self.num_spilling += request.spills
        self.num_tokens += request.num_queued

    def remove(self, request: Request) -> None:
        """Remove a request. Raises InternalError if it is not in the queue."""
        key = (request.tenant, request.slo.rank)
        lane = self._lanes.get(key)
        index = bisect_left(lane.requests, request.rank, key=_RANK) if lane else 0
        if lane is None or index == len(lane.requests) or lane.requests[index] is not request:
            raise InternalError(f"{request} is not in the queue")
        del lane.requests[index]
        lane.work = lane.work.plus(work_of(request), share=-1)
        lane.num_tokens -= request.num_queued
        if not lane.requests:
            del self._lanes[key]
        self._size -= 1
        self.num_spilling -= request.spills
        self.num_tokens -= request.num_queued

    def held_by(self, tenant: str) -> Held:
        """Return what waits of one tenant."""
        lanes = [lane for rank in _CLASS_RANKS if (lane := self._lanes.get((tenant, rank)))]
        return Held(sum(len(lane.requests) for lane in lanes), sum(lane.num_tokens for lane in lanes))

    def work(self, worst_class: int = 1 << 30) -> Work:
        """Return the work of the requests in the queue whose class has at most the rank `worst_class`."""
        return total(lane.work for (_, slo), lane in self._lanes.items() if slo <= worst_class)

    def work_before(self, request: Request) -> Work:
        """Return the work that goes before a new request: of higher classes, of its own lane, and of other tenants.

        Tenants are served equally, so others of its class get no more before it than its own tenant does.
        """
        own = self._lanes.get((request.tenant, request.slo.rank))
        before = own.before(request) if own else NO_WORK
        share = before.tokens + len(request.tokens) - request.num_matched
        found = before
        for (tenant, slo), lane in self._lanes.items():
            if slo < request.slo.rank:
                found = found.plus(lane.work)
            elif slo == request.slo.rank and tenant != request.tenant:
                found = found.plus(lane.work, min(1.0, share / max(1, lane.work.tokens)))
        return found

    def check(self) -> None:
        """Raise InternalError if a lane is empty or not sorted, or if the sums are wrong."""
        for (tenant, slo), lane in self._lanes.items():
            ranks = [request.rank for request in lane.requests]
            if not ranks or ranks != sorted(set(ranks)):
                raise InternalError("a lane of the queue is empty or out of order")
            if any((request.tenant, request.slo.rank) != (tenant, slo) for request in lane.requests):
                raise InternalError("a request waits in the lane of another tenant or class")
            if lane.work != total(map(work_of, lane.requests)):
                raise InternalError("the work of a lane is wrong")
        if self._size != sum(len(lane.requests) for lane in self._lanes.values()):
            raise InternalError("the size of the queue is wrong")
        if self.num_spilling != sum(request.spills for request in self):
            raise InternalError("the number of waiting requests that spill is wrong")
        if any(lane.num_tokens != sum(request.num_queued for request in lane.requests) for lane in self.lanes):
            raise InternalError("the number of waiting tokens of a lane is wrong")
        if self.num_tokens != sum(lane.num_tokens for lane in self.lanes):
            raise InternalError("the number of waiting tokens is wrong")
