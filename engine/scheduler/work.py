"""Work: what it takes until waiting requests have their first token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.request import Request
from engine.scheduler.limits import pairs


class Work(NamedTuple):
    """An amount of work of some requests, which need not be whole numbers."""

    requests: float
    tokens: float  # to compute
    pairs: float  # of such a token and a token that it attends to

    def plus(self, other: Work, share: float = 1.0) -> Work:
        """Return the sum of this work and a share of `other`."""
        mine, its = self, other
        return Work(mine.requests + share * its.requests, mine.tokens + share * its.tokens, mine.pairs + share * its.pairs)


NO_WORK = Work(0, 0, 0)


def total(works: Iterable[Work]) -> Work:
    """Return the sum of `works`."""
    found = NO_WORK
    for work in works:
        found = found.plus(work)
    return found


def work_of(request: Request) -> Work:
    """Return the work of a waiting request, as far as it was known when the request came into the queue."""
    tokens = request.num_queued - request.num_matched
    return Work(1, tokens, pairs(tokens, request.num_matched))


def rest_of(request: Request) -> Work:
    """Return the work that is left of a prompt that has started."""
    tokens = len(request.tokens) - request.num_computed
    return Work(1, tokens, pairs(tokens, request.num_computed))
