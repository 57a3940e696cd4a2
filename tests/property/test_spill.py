"""Runs random requests, of which many have a context that the GPU's cache cannot hold, over a cache of a few blocks.

FakeRunner verifies that each step attends to its own prefix, whether a block lies in the GPU or in the host, and that nothing is
read there before it has arrived. All requests get the tokens that they would get alone.
"""

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import Core
from engine.plan import Tier
from tests.property.test_scheduling import LIMITS, run
from tests.property.test_tiers import CountMoves, TieredWorkload


class SpillWorkload(TieredWorkload):
    """The cache holds 10 to 60 tokens of contexts of up to 96. The host holds the rest of some, or of all."""

    def make_core(self) -> Core:
        self.plans: Counter[str] = Counter()
        super().make_core()
        rng, cache = self.rng, self.config.cache
        size, blocks = cache.block_size, max(2, rng.randint(10, 60) // cache.block_size)
        self.host_slots = rng.randint(20, 150) // size + 1
        cache = msgspec.structs.replace(
            cache,
            num_blocks=blocks,
            host_tier_bytes=self.host_slots * self.block_bytes + rng.randrange(self.block_bytes),
            resident_tokens=rng.choice((1, 5, 20, 1000)),
        )
        longest = min(LIMITS.max_model_len, (blocks + self.host_slots) * size)
        self.config = msgspec.structs.replace(self.config, cache=cache, max_model_len=longest)
        return self.start_core()

    def start_core(self) -> Core:
        core = super().start_core()
        core._runner = CountSpilled(core._runner.runner, self)
        return core

    def step(self) -> None:
        """Run a step. A request may be preempted because the cache is too small for it, so ranks say little here."""
        for event in self.core.step():
            self.receive(event)


class CountSpilled(CountMoves):
    """Counts the kinds of plans, and checks that a step of a request that spills has no other slices."""

    def submit(self, plan):
        if plan.spilled is None:
            self.workload.plans["ordinary"] += bool(plan.rows)
            return super().submit(plan)
        assert len(plan.rows) == 1
        self.workload.plans["decode" if plan.num_decodes else "chunk"] += 1
        self.workload.plans["reads the host"] += bool(plan.spilled.slots)
        self.workload.plans["beside others"] += self.workload.core.stats().running > 1
        return super().submit(plan)


@pytest.mark.parametrize("overlap", [False, True])
def test_thousands_of_random_operations_with_contexts_larger_than_the_cache(overlap):
    seen: Counter[str] = Counter()
    for seed in range(24):
        workload = SpillWorkload(random.Random(seed), overlap=overlap)
        run(workload, 300)
        cache = workload.scheduler.cache
        assert cache.num_moving == 0
        assert not cache.tiers.host._moving
        stats = workload.core.stats()
        seen.update(workload.plans)
        seen.update(moved_out=workload.moves[Tier.GPU, Tier.HOST], failed_moves=workload.failed, preempted=stats.num_preemptions)
        seen.update(failed=stats.num_failed, cached=stats.cached_tokens, promoted=workload.moves[Tier.HOST, Tier.GPU])
    # The random runs must cover each kind of event often.
    assert min(seen.values()) > 20, seen
    assert len(seen) == 11, seen


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), overlap=st.booleans(), operations=st.integers(1, 80))
def test_short_random_runs_with_contexts_larger_than_the_cache_that_can_be_shrunk(rng, overlap, operations):
    run(SpillWorkload(rng, overlap=overlap), operations)
