"""Policy: which waiting request starts next, and which running request gives up its place.

A request has a `rank`: its level, then the time at which its first token is due, then its arrival. The level is that of its
class, less one for each AGEING_SECONDS that it has waited when it is admitted. Victims are chosen by rank alone, so the running
request of the best rank always goes on. The order of the waiting requests also depends on the moment:

    level    A lane whose first request waits for long moves up one level for each AGEING_SECONDS.
    tenant   Within a level, the tenant that was served least goes first.
    due      Within a level and a tenant, the earliest due time goes first.

Service is counted as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): a counter for each tenant grows
with the tokens that were computed for it. The counter of a tenant that comes back from a pause rises to the smallest counter of
those that have requests, so a pause earns no credit. No tenant is held back while rows and tokens are free.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Protocol

from engine.request import Request
from engine.scheduler.queue import Lane

AGEING_SECONDS = 30.0
PRIORITY_SECONDS = 10.0  # a request of priority p is due as if it had arrived p times this much later; nobody starves by it

# Tokens that one token counts for. A prompt token is the unit; an output token takes about twice the device's time, and a cached
# token little.
CACHED_WEIGHT = 0.1
OUTPUT_WEIGHT = 2.0


class Policy(Protocol):
    """Orders requests. The scheduler tells it of every request that arrives, is admitted and ends."""

    def arrived(self, request: Request) -> None:
        """Take note of a new request, and set its `rank`."""
        ...

    def order(self, lanes: Iterable[Lane], now: float) -> Iterator[Request]:
        """Yield the waiting requests, the one to start first. The scheduler may admit each before it asks for the next."""
        ...

    def level(self, request: Request, now: float) -> int:
        """Return the level of a request at this moment. The order of the waiting requests goes by it first."""
        ...

    def victim(self, running: Iterable[Request]) -> Request:
        """Return the running request to preempt. `running` must not be empty."""
        ...

    def admitted(self, request: Request, now: float) -> None:
        """Take note of an admission, when the request's `cached` is known. It may give the request a better rank."""
        ...

    def ended(self, request: Request) -> None: ...


class FairPolicy:
    """Earliest due time first within a class, classes in order with ageing, and equal service for tenants. Implements Policy."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}  # tenant -> weighted tokens
        self._unfinished: dict[str, int] = {}  # tenant -> requests; only tenants that have some
        self._running: dict[Request, int] = {}  # request -> its outputs that are counted in `_served`

    def arrived(self, request: Request) -> None:
        request.rank = rank_of(request)
        tenant = request.tenant
        if tenant not in self._unfinished:
            floor = min((self._served[other] for other in self._unfinished), default=0.0)
            self._forget_paused(floor)
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self._unfinished[tenant] = self._unfinished.get(tenant, 0) + 1

    def order(self, lanes: Iterable[Lane], now: float) -> Iterator[Request]:
        waiting = [lane.requests.copy() for lane in lanes]
        if len(waiting) == 1:
            yield from waiting[0]
            return
        self._count_outputs()
        entries = [(self._key(requests[0], now), 0, requests) for requests in waiting]
        heapq.heapify(entries)
        while entries:
            _, index, requests = entries[0]
            yield requests[index]
            if index + 1 < len(requests):
                heapq.heapreplace(entries, (self._key(requests[index + 1], now), index + 1, requests))
            else:
                heapq.heappop(entries)

    def level(self, request: Request, now: float) -> int:
        waited = max(0.0, now - request.arrival)
        return min(request.rank[0], max(0, request.slo.rank - int(waited / AGEING_SECONDS)))

    def victim(self, running: Iterable[Request]) -> Request:
        return max(running, key=_rank)

    def admitted(self, request: Request, now: float) -> None:
        request.rank = (self.level(request, now), *request.rank[1:])
        if request in self._running:
            return  # it was preempted, and computes its tokens again: that is no service
        computed = request.num_prompt - request.cached.total
        self._served[request.tenant] += computed + CACHED_WEIGHT * request.cached.total
        self._running[request] = 0

    def ended(self, request: Request) -> None:
        tenant = request.tenant
        counted = self._running.pop(request, None)
        if counted is not None:
            self._served[tenant] += OUTPUT_WEIGHT * (request.num_outputs - counted)
        self._unfinished[tenant] -= 1
        if not self._unfinished[tenant]:
            del self._unfinished[tenant]

    def _key(self, request: Request, now: float) -> tuple[int, float, float, int]:
        """Return the sort key of the first request of a lane."""
        _, due, sequence = request.rank
        return self.level(request, now), self._served[request.tenant], due, sequence

    def _count_outputs(self) -> None:
        """Count the outputs that running requests have got so far. It is done only when it can matter: several lanes wait."""
        for request, counted in self._running.items():
            num = request.num_outputs
            if num != counted:
                self._served[request.tenant] += OUTPUT_WEIGHT * (num - counted)
                self._running[request] = num

    def _forget_paused(self, floor: float) -> None:
        """Drop the counters of tenants without requests whose counter would rise to `floor` anyway, or of all if none has any."""
        for tenant in [t for t in self._served if t not in self._unfinished]:
            if not self._unfinished or self._served[tenant] <= floor:
                del self._served[tenant]


def rank_of(request: Request) -> tuple[int, float, int]:
    """Return the rank of a new request: (level, due time, number by arrival). The smallest rank is the best."""
    due = request.arrival + request.slo.patience
    if request.deadline is not None:
        due = min(due, request.deadline)
    return request.slo.rank, due + request.priority * PRIORITY_SECONDS, request.sequence


def _rank(request: Request) -> tuple[int, float, int]:
    return request.rank
