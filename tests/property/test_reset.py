"""Resets the KV cache at random moments, and checks that nothing is shared afterwards that was computed before.

What a request finds in the cache is read off the plans: its first slice begins behind it. After a reset of all tiers, that may
only be the beginning of a request that was admitted since.
"""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import Core
from engine.messages import TIER_NAMES, TierName
from engine.plan import Tier
from engine.request import Request
from tests.property.test_disk_tier import DiskWorkload
from tests.property.test_scheduling import run
from tests.property.test_tiers import CountMoves, TieredWorkload


class ResetWorkload(TieredWorkload):
    """Tiers are reset now and then, mostly while blocks are being loaded."""

    def make_core(self) -> Core:
        self.since: list[Request] = []  # requests that were admitted after the latest reset of all tiers
        self.num_resets = self.num_dropped_loads = self.num_hits = 0
        return super().make_core()

    def start_core(self) -> Core:
        core = super().start_core()
        core._runner = CheckAdmissions(core._runner, self)
        return core

    def step(self) -> None:
        if self.rng.random() < (0.2 if self.scheduler.cache.num_loading else 0.03):
            self.reset(self.rng.sample(TIER_NAMES, self.rng.choice((1, 2, 3, 3))))
        super().step()

    def reset(self, tiers: list[TierName]) -> None:
        before = self.held()
        self.num_resets += 1
        self.num_dropped_loads += self.scheduler.cache.num_loading if "gpu" in tiers else 0
        assert self.core.reset_cache(tiers) == {tier: before[tier] for tier in tiers}
        assert self.held() == before | dict.fromkeys(tiers, 0)
        self.check()
        if len(tiers) == len(TIER_NAMES):
            self.since = []

    def held(self) -> dict[str, int]:
        cache = self.scheduler.cache
        disk = cache.tiers.disk
        return {"gpu": cache.num_cached, "host": len(cache.tiers.host), "disk": len(disk.store.index) if disk else 0}


class DiskResetWorkload(ResetWorkload, DiskWorkload):
    def stop(self) -> None:
        self.core.close()  # an engine that is killed at once may leave records that it was told to forget


class CheckAdmissions(CountMoves):
    def submit(self, plan):
        by_row = {request.row: request for request in self.workload.scheduler._running}
        starts = dict(zip(plan.rows, plan.starts, strict=True))
        for admitted in plan.admitted:
            request, since = by_row[admitted.row], self.workload.since
            if request.leader is None:  # siblings share the prompt of a request that may be older than the reset
                others = [other.tokens for other in since if other.salt == request.salt]
                assert starts[admitted.row] <= max((common(request.tokens, tokens) for tokens in others), default=0)
                self.workload.num_hits += starts[admitted.row] > 0
            since.append(request)
        return self.runner.submit(plan)

    def poll(self, seconds=0.0):
        return self.runner.poll(seconds)


def common(one, other) -> int:
    """Return how many first tokens are equal."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


@pytest.mark.parametrize("overlap", [False, True])
def test_after_a_reset_nothing_is_shared_that_was_computed_before(overlap):
    seen: Counter[str] = Counter()
    for seed in range(12):
        workload = ResetWorkload(random.Random(seed), overlap=overlap)
        run(workload, 400)
        seen.update(
            resets=workload.num_resets,
            dropped_loads=workload.num_dropped_loads,
            hits=workload.num_hits,
            promoted=workload.moves[Tier.HOST, Tier.GPU],
            preempted=workload.core.stats().num_preemptions,
        )
    assert min(seen.values()) > 5, seen


@pytest.mark.parametrize("overlap", [False, True])
def test_after_a_reset_nothing_comes_from_the_disk_even_after_a_restart(overlap, tmp_path):
    seen: Counter[str] = Counter()
    for seed in range(8):
        workload = DiskResetWorkload(random.Random(seed), tmp_path / str(seed), overlap=overlap)
        workload.run(300)
        seen += workload.seen
        seen.update(resets=workload.num_resets, dropped_loads=workload.num_dropped_loads, hits=workload.num_hits)
    expected = ("restarts", "resets", "dropped_loads", "hits", "written", "read")
    assert min(seen[name] for name in expected) > 0, seen  # how often each comes is up to the disk's threads


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), overlap=st.booleans(), operations=st.integers(1, 80))
def test_short_random_runs_with_resets_that_can_be_shrunk(rng, overlap, operations):
    run(ResetWorkload(rng, overlap=overlap), operations)
