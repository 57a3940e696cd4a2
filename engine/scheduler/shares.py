"""QueueShares: bounds a queue, and shares it out between tenants.

A tenant may hold at most SHARE times as much as is still free (the dynamic thresholds of Choudhury and Hahne, 1998). So a flood
never takes the last ninth of the queue, however long it lasts, and a tenant that comes after it finds room at once. With several
floods, each of n tenants may hold 8 / (8 n + 1) of the queue, so they end with equal parts. Nothing that waits has to give way:
whoever was accepted stays.

While all requests so far were of one tenant, that tenant may fill the queue.
"""

from __future__ import annotations

from typing import NamedTuple

SHARE = 8


class Held(NamedTuple):
    """What waits in a queue, all of it or that of one tenant."""

    requests: int
    tokens: int


class QueueShares:
    """`max_requests` and `max_tokens` bound what may wait. A request of more tokens than that may wait alone."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._most = Held(max_requests, max_tokens)
        self._first: str | None = None  # tenant of the first request
        self._shared = False  # whether another tenant has sent a request too

    def note(self, tenant: str) -> None:
        """Take note of a request of `tenant`, whether it has to wait, and may, or not.

        A request that finds the queue full of another tenant's thus makes room for those that follow it.
        """
        if self._first is None:
            self._first = tenant
        self._shared = self._shared or tenant != self._first

    def refusal(self, tokens: int, waiting: Held, own: Held, *, more: int = 0) -> str | None:
        """Return why a new request of so many `tokens` may not wait. None if it may. Its tenant must have been noted.

        `waiting` is what waits already, and `own` the part of it that is the tenant's. `more` requests may wait beyond the bound.
        """
        free = Held(self._most.requests + more - waiting.requests, self._most.tokens - waiting.tokens)
        if free.requests < 1 or (waiting.tokens and tokens > free.tokens):
            return f"{waiting.requests} requests with {waiting.tokens} tokens are already waiting"
        most = Held(SHARE * free.requests, SHARE * free.tokens)
        if self._shared and own.requests and (own.requests >= most.requests or own.tokens + tokens > most.tokens):
            return (
                f"{own.requests} requests with {own.tokens} tokens of this tenant are already waiting, and the rest of the queue "
                "is for others"
            )
        return None
