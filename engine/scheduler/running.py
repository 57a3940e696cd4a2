"""RunningSet: the requests that own a batch row, in two lists: prompts being computed, in rank order, and decodes.

Beside them at most one request runs that spills. It has steps of its own and is never preempted, so it is in neither list.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from engine.errors import InternalError
from engine.request import Request, Status
from engine.slo import SLO_CLASSES

_RANK = attrgetter("rank")
_ITL = tuple(slo.itl for slo in sorted(SLO_CLASSES.values(), key=attrgetter("rank")))  # by the rank of the class


class RunningSet:
    __slots__ = ("_decodes_by_class", "_max_rows", "_num_by_level", "decodes", "free_rows", "prompts", "spilled")

    def __init__(self, max_rows: int) -> None:
        self.prompts: list[Request] = []  # requests with known tokens that are not scheduled yet, the best rank first
        self.decodes: list[Request] = []  # requests that run one token in each step, in the order in which they began to
        self.spilled: Request | None = None
        self.free_rows = list(range(max_rows - 1, -1, -1))
        self._max_rows = max_rows
        self._num_by_level = [0] * len(_ITL)
        self._decodes_by_class = [0] * len(_ITL)

    def __len__(self) -> int:
        return len(self.prompts) + len(self.decodes) + (self.spilled is not None)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests that may be preempted: all but the one that spills."""
        return chain(self.prompts, self.decodes)

    def num_places(self, seqs: int) -> int:
        """Return how many more requests may run if at most `seqs` may."""
        return min(len(self.free_rows), seqs - len(self))

    @property
    def worst_level(self) -> int:
        """The largest level of a running request that may be preempted; -1 if none runs."""
        return max((level for level, num in enumerate(self._num_by_level) if num), default=-1)

    def num_lower(self, slo: int) -> int:
        """Return how many running requests would give up their place for one of the class of rank `slo`."""
        return sum(self._num_by_level[slo + 1 :])

    @property
    def itl(self) -> float | None:
        """The tightest inter-token target of the decodes, in seconds. None if nothing is promised to any of them."""
        targets = (target for target, num in zip(_ITL, self._decodes_by_class, strict=True) if num and target is not None)
        return min(targets, default=None)

    @property
    def num_spilled_left(self) -> int:
        """Return how many tokens of the request that spills are known and not computed, if its prompt is not yet computed."""
        left = 0 if self.spilled is None else len(self.spilled.tokens) - self.spilled.num_computed
        return left if left > 1 else 0

    def add(self, request: Request) -> int:
        """Give `request` a row, add it to the prompts unless it spills, and return the row."""
        request.row = row = self.free_rows.pop()
        request.status = Status.RUNNING
        if request.spills:
            self.spilled = request
            return row
        insort(self.prompts, request, key=_RANK)
        self._num_by_level[request.rank[0]] += 1
        return row

    def start_decoding(self, request: Request) -> None:
        """Move a request from the prompts to the decodes, once its last known token is scheduled."""
        self.prompts.remove(request)
        self.decodes.append(request)
        self._decodes_by_class[request.slo.rank] += 1

    def remove(self, request: Request) -> None:
        """Remove a request from the running set, and free its batch row for another request."""
        self.free_rows.append(row_of(request))
        request.row = None
        if request is self.spilled:
            self.spilled = None
            return
        if request in self.decodes:
            self.decodes.remove(request)
            self._decodes_by_class[request.slo.rank] -= 1
        else:
            self.prompts.remove(request)
        self._num_by_level[request.rank[0]] -= 1

    def check(self) -> None:
        """Raise InternalError if a batch row is lost or assigned twice, or if a request is in the wrong list or place."""
        spilled = [] if self.spilled is None else [self.spilled]
        rows = self.free_rows + [row_of(request) for request in [*self, *spilled]]
        if sorted(rows) != list(range(self._max_rows)):
            raise InternalError("batch rows are lost or given twice")
        if sorted(self.prompts, key=_RANK) != self.prompts:
            raise InternalError("running prompts are out of order")
        for request in self.prompts:
            if request.num_computed >= len(request.tokens) or request.num_uncommitted:
                raise InternalError(f"{request} has no prompt left to compute")
        for request in self.decodes:
            if request.num_computed != request.num_tokens - 1:
                raise InternalError(f"{request} is not exactly one token behind")
        levels = Counter(request.rank[0] for request in self)
        classes = Counter(request.slo.rank for request in self.decodes)
        for counts, found in ((self._num_by_level, levels), (self._decodes_by_class, classes)):
            if counts != [found[number] for number in range(len(counts))]:
                raise InternalError("the numbers of running requests by level or class are wrong")


def row_of(request: Request) -> int:
    """Return the batch row of a running request."""
    if request.row is None:
        raise InternalError(f"{request} has no row")
    return request.row
