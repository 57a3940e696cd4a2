"""RunningSet: the requests that own a batch row, in two lists in rank order: prompts being computed, and decodes."""

from __future__ import annotations

from bisect import insort

from engine.errors import InternalError
from engine.request import Request, Status
from engine.scheduler.queue import rank


class RunningSet:
    __slots__ = ("_max_rows", "decodes", "free_rows", "prompts")

    def __init__(self, max_rows: int) -> None:
        self.prompts: list[Request] = []  # requests with known tokens that are not scheduled yet
        self.decodes: list[Request] = []  # requests that run one token in each step
        self.free_rows = list(range(max_rows - 1, -1, -1))
        self._max_rows = max_rows

    def __len__(self) -> int:
        return len(self.prompts) + len(self.decodes)

    def add(self, request: Request) -> int:
        """Give `request` a row, add it to the prompts, and return the row."""
        request.row = row = self.free_rows.pop()
        request.status = Status.RUNNING
        insort(self.prompts, request, key=rank)
        return row

    def start_decoding(self, request: Request) -> None:
        """Move a request from the prompts to the decodes, once its last known token is scheduled."""
        self.prompts.remove(request)
        insort(self.decodes, request, key=rank)

    def remove(self, request: Request) -> None:
        """Remove a request from the running set, and free its batch row for another request."""
        (self.decodes if request in self.decodes else self.prompts).remove(request)
        self.free_rows.append(row_of(request))
        request.row = None

    def worst(self) -> Request:
        """Return the running request of the worst rank: the largest priority value, and the latest arrival among equals."""
        return max(self.decodes[-1:] + self.prompts[-1:], key=rank)

    def check(self) -> None:
        """Raise InternalError if a batch row is lost or assigned twice, or if a request is in the wrong list or place.

        The lists are those of prompts and of decodes, each in rank order.
        """
        rows = self.free_rows + [row_of(request) for request in self.prompts + self.decodes]
        if sorted(rows) != list(range(self._max_rows)):
            raise InternalError("batch rows are lost or given twice")
        for group in (self.prompts, self.decodes):
            if sorted(group, key=rank) != group:
                raise InternalError("running requests are out of order")
        for request in self.prompts:
            if request.num_computed >= len(request.tokens) or request.num_uncommitted:
                raise InternalError(f"{request} has no prompt left to compute")
        for request in self.decodes:
            if request.num_computed != request.num_tokens - 1:
                raise InternalError(f"{request} is not exactly one token behind")


def row_of(request: Request) -> int:
    """Return the batch row of a running request."""
    if request.row is None:
        raise InternalError(f"{request} has no row")
    return request.row
