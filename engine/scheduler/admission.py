"""Admission: which waiting requests may start in a step, in the policy's order.

A waiting request is passed over in seven cases.

    deferred   Another request is computing the next block of its prompt right now. The request shares that block one step later.
               A sibling (n > 1) is deferred until its leader's whole prompt is computed, and then forks it.
    loading    Blocks of its prompt are on their way from a lower tier, for this request or for another one.
    blocked    The request does not fit into the free blocks. Later requests may pass it at most `max_skips` times.
    unknown    The request was preempted, and its next token is not committed yet.
    long       The step has only so many tokens left beside a long prompt, and this request could not finish its own in them.
    lower      A request of a higher class was passed over, and the next step would take back the place or blocks for it.
    spilling   Its context is larger than the GPU's cache. `spill_steps.py` starts it; if it lacks blocks for that, it is blocked.

A request is deferred by its prefix only while the other request advances. After MAX_STALLED steps in which the other one
did not advance, it starts and computes the prefix itself. A wait is therefore bounded by the length of the prefix, and ends
at once if the other request ends or is preempted.

A request whose next blocks lie in a lower tier gets GPU blocks for them if it could be admitted with all its blocks. Once they
are loaded it is admitted like any other. Until then it holds its prefix, and gives it back if a running request, or the first one
that does not fit, lacks blocks. So a request that waits neither preempts nor blocks one that could run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from engine.kvcache.manager import KVCacheManager
from engine.request import Request, Status
from engine.scheduler.policy import Policy
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.running import RunningSet

MAX_AHEAD = 16  # waiting requests whose prefixes are loaded before there is a place for them, or of which one may start to spill
MAX_BLOCKED = 16  # blocked requests after which a step stops looking for one that fits
MAX_DEFERRED = 128  # deferred requests after which a step stops looking for others
MAX_STALLED = 4  # steps that a request waits for a block while the request that computes the block does not advance


class Admission:
    """Selects the waiting requests that may start in a step. It reads the queue and the running set, and changes neither.

    `requests` are all running and waiting requests by id.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        queue: WaitingQueue,
        running: RunningSet,
        requests: Mapping[str, Request],
        policy: Policy,
        max_skips: int,
    ) -> None:
        self._policy = policy
        self._cache = cache
        self._queue = queue
        self._running = running
        self._requests = requests
        self._max_skips = max_skips

    def admissible(
        self,
        in_step: list[Request],
        now: float,
        seqs: int,
        *,
        above: int | None = None,
        longest: Callable[[], int | None] = lambda: None,
    ) -> Iterator[Request]:
        """Yield each waiting request that can start now, after giving it its blocks. Begin the loads of those passed over.

        `in_step` are the requests whose prompt chunks are already in this step, and `seqs` is the largest number of requests that
        may run. The caller must admit each yielded request before it continues the iteration. Only requests of a better level
        than `above` are yielded. Those with more uncomputed tokens than `longest` returns are passed over. None means any.
        """
        in_step = list(in_step)
        computing = {self._cache.next_digest(request): request for request in self._running.prompts + in_step}
        blocked: list[Request] = []
        deferred: list[Request] = []
        for request in self._policy.order(self._queue.lanes, now):
            if len(blocked) == MAX_BLOCKED or len(deferred) == MAX_DEFERRED:
                return
            if any(other.skips >= self._max_skips for other in blocked):
                return
            if above is not None and self._policy.level(request, now) >= above:
                return
            if request.num_uncommitted:
                continue
            if request.spills:
                if self._running.spilled is None and self._cache.num_needed(request) + self._spare > self._cache.num_free:
                    blocked.append(request)
                continue
            if self._cache.is_loading(request):
                deferred.append(request)
                continue
            leader = self.leader(request)
            if self._awaits_leader(request, leader, in_step) or self._awaits_prefix(request, leader, computing):
                deferred.append(request)
                continue
            most = longest()
            if most is not None and self._uncomputed(request, leader) > most:
                deferred.append(request)
                continue
            if self._is_in_the_way(request, deferred, seqs):
                deferred.append(request)
                continue
            if self._loads(request, leader, spare=self._spare):
                deferred.append(request)
                if self._cache.is_loading(request):
                    _overtake(blocked)
                continue
            if not self._reserve(request, leader) and (blocked or not self._reserve_held(request, leader)):
                blocked.append(request)
                continue
            yield request
            in_step.append(request)
            computing[self._cache.next_digest(request)] = request
            _overtake(blocked)

    def next_spilling(self, now: float) -> Request | None:
        """Return the first waiting request that spills, after giving it its window. None if it cannot start now.

        It takes no blocks that requests before it will need, and none while another request spills.
        """
        if self._running.spilled is not None:
            return None
        needed = self._spare
        for request in islice(self._policy.order(self._queue.lanes, now), MAX_AHEAD):
            if needed > self._cache.num_free:
                return None
            if not request.spills:
                needed += self._cache.num_needed(request)
                continue
            if request.num_uncommitted:
                return None
            if self._cache.admit_spilling(request, spare=needed):
                return request
            return request if needed == self._spare and self._reserve_held(request, None) else None
        return None

    def load_ahead(self, now: float) -> None:
        """Begin the loads of the first waiting requests, whether there is a place for them or not.

        A load takes no blocks that requests before it will need.
        """
        needed = self._spare
        for request in islice(self._policy.order(self._queue.lanes, now), MAX_AHEAD):
            if not request.num_uncommitted and not self._cache.num_held(request):
                self._loads(request, self.leader(request), spare=needed)
            needed += self._cache.num_needed(request)
            if needed > self._cache.num_free:
                return

    def _loads(self, request: Request, leader: Request | None, *, spare: int) -> bool:
        """Begin to load what a lower tier has of the request's prefix. Returns whether the request must wait for a load."""
        if not self._cache.has_tiers or not self._may_match(request) or (leader and leader.status is Status.RUNNING):
            return False
        if self._cache.awaits_load(request):
            return True
        if not self._cache.load(request, spare=spare):
            return False
        request.status = Status.LOADING
        return True

    def _awaits_leader(self, request: Request, leader: Request | None, in_step: list[Request]) -> bool:
        """Return whether `request` must wait for its leader, whose prompt is to be computed in this step or in a later one."""
        if leader is None:
            return False
        if leader.status is not Status.RUNNING:
            return leader.rank < request.rank
        return leader.num_computed < leader.num_prompt or any(other is leader for other in in_step)

    def _awaits_prefix(self, request: Request, leader: Request | None, computing: dict[bytes | None, Request]) -> bool:
        """Return whether `request` must wait because another request computes the first block that it misses in the cache.

        Returns False once the other request has not advanced for more than MAX_STALLED steps.
        """
        if not self._may_match(request) or (leader is not None and leader.status is Status.RUNNING):
            return False
        self._cache.match(request)
        digest = self._cache.next_digest(request)
        other = None if digest is None else computing.get(digest)
        if other is None:
            return False
        if other.num_computed > request.awaited:
            request.awaited = other.num_computed
        else:
            request.stalled += 1
        return request.stalled <= MAX_STALLED

    def displaced_level(self, started: Request, now: float) -> int | None:
        """Return the level of a prompt that has started if requests of higher classes wait. They may go before it.

        Its level rises as it ages, so that it does not starve.
        """
        level = self._policy.level(started, now)
        return level if len(self._queue) and self._queue.best_class < level else None

    def _is_in_the_way(self, request: Request, deferred: list[Request], seqs: int) -> bool:
        """Return whether the next step would take place or blocks of `request` for `deferred` requests of higher classes."""
        higher = [other for other in deferred if other.slo.rank < request.rank[0]]
        if not higher:
            return False
        blocks = sum(self._cache.num_needed(other) for other in [*higher, request]) + self._cache.num_blocks // 100
        return len(higher) >= self._running.num_places(seqs) or blocks > self._cache.num_free

    def _may_match(self, request: Request) -> bool:
        """Return whether `request` may use cached blocks. A prompt with log-probabilities requested is computed completely.

        So is one that spills.
        """
        if request.spills or not self._cache.prefix_caching:
            return False
        return request.params.prompt_logprobs is None or request.num_outputs > 0

    def _uncomputed(self, request: Request, leader: Request | None) -> int:
        """Return how many tokens must be computed for `request` before its next token. `_awaits_prefix` was just asked."""
        if leader is not None and leader.status is Status.RUNNING:
            return 1
        cached = self._cache.match(request) * self._cache.block_size if self._may_match(request) else 0
        return len(request.tokens) - cached

    def leader(self, request: Request) -> Request | None:
        """Return the sibling that `request` can fork: its prompt and salt are the same, and nothing must be computed again."""
        if request.fork_of is None or not self._cache.can_fork or request.spills:
            return None
        leader = self._requests.get(request.fork_of)
        if leader is None or leader is request or request.num_outputs or request.params.prompt_logprobs is not None:
            return None
        if leader.spills:
            return None
        if leader is request.leader:
            return leader
        if leader.salt != request.salt or leader.tokens[: leader.num_prompt] != request.tokens:
            return None
        request.leader = leader
        return leader

    def _reserve(self, request: Request, leader: Request | None) -> bool:
        """Give `request` blocks for all its tokens, or its window if it spills. Returns False if the request does not fit."""
        spare = self._spare
        if request.spills:
            return self._cache.admit_spilling(request, spare=spare)
        if leader is not None and leader.status is Status.RUNNING:
            return self._cache.fork(request, leader, spare=spare)
        return self._cache.admit(request, spare=spare, match=self._may_match(request))

    def _reserve_held(self, request: Request, leader: Request | None) -> bool:
        """Give `request` blocks that other waiting requests hold and give back, the worst rank first.

        Nobody gives back anything if all of it would not be enough.
        """
        holders = [other for other in self._cache.holders() if other is not request]
        if sum(map(self._cache.num_held, holders)) < self._cache.shortage(request):
            return False
        while holders:
            worst = self._policy.victim(holders)
            holders.remove(worst)
            self._cache.give_back(worst)
            if self._reserve(request, leader):
                return True
        return False

    @property
    def _spare(self) -> int:
        """The blocks that stay free for running requests, one in a hundred, so that an admission does not cause a preemption."""
        return self._cache.num_blocks // 100 if len(self._running) else 0


def _overtake(blocked: list[Request]) -> None:
    """Count that a later request has got blocks before those that do not fit."""
    for other in blocked:
        other.skips += 1
