"""Runs random requests over a small KV cache and a small host tier, whose moves take time and sometimes fail.

FakeRunner verifies the content of every block that is read, in whichever tier it has been meanwhile. After every operation, the
scheduler checks its own state, the caps of the tiers and the pins of their slots.
"""

import random
from collections import Counter
from functools import partial

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import FakeConfig
from engine.core import Core
from engine.fake import build_fake
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.plan import PER_TOKEN, PoolKind, Tier
from engine.request import CachedTokens, TokenEvent
from tests.property.test_scheduling import LIMITS, Workload, run

STEP_MS = 1.0


class TieredWorkload(Workload):
    """Requests continue a few sessions, whose prefixes do not all fit into the GPU's blocks."""

    kinds = PER_TOKEN
    block_bytes = 1000
    aborted_share = 0.2  # of the steps during a load in which a request that loads is aborted

    def make_core(self) -> Core:
        """Choose the sizes of the tiers and the speed of moves, and make the first Core."""
        rng, cache = self.rng, self.config.cache
        steps = rng.choice((0.0, 0.1, 1.0, 7.0))  # duration of a move
        self.host_slots = rng.choice((1, 3, rng.randint(60, 600) // cache.block_size))
        self.config = msgspec.structs.replace(
            self.config,
            cache=msgspec.structs.replace(
                cache,
                num_blocks=max(rng.randint(60, 200) // cache.block_size, 1),
                host_tier_bytes=self.host_slots * self.block_bytes + rng.randrange(self.block_bytes),
            ),
            fake=FakeConfig(
                nan_token=self.config.fake.nan_token,
                step_ms=STEP_MS,
                block_bytes=self.block_bytes,
                host_gb_s=self.block_bytes / (steps * STEP_MS / 1e3) / 1e9 if steps else 0.0,
                failing_moves=rng.choice((0.0, 0.0, 0.1)),
            ),
        )
        self.sessions = [[rng.randrange(40) for _ in range(60)] for _ in range(4)]
        self.aborted_loads = 0
        self.time = SimulatedTime()
        return self.start_core()

    def start_core(self) -> Core:
        self.moves: Counter[tuple[Tier, Tier]] = Counter()
        self.failed = 0
        self.reported = CachedTokens()
        device = partial(SimulatedDevice, clock=self.time.clock, sleep=self.time.sleep)
        core = Core(build_fake(self.config, LIMITS, make_device=device, kinds=self.kinds), clock=self.time.clock)
        core._runner = CountMoves(core._runner, self)
        core._scheduler.cache.tiers._gate = RandomGate(self.rng)
        return core

    def prompt(self) -> list[int]:
        if self.rng.random() < 0.3:
            return super().prompt()
        return self.rng.choice(self.sessions)[: self.rng.randint(1, 60)]

    def step(self) -> None:
        super().step()
        loading = [request.request_id for request in self.scheduler._queue if self.scheduler.cache.is_loading(request)]
        if loading and self.rng.random() < self.aborted_share:
            self.aborted_loads += 1
            self.core.abort(self.rng.choice(loading))

    def receive(self, event: TokenEvent) -> None:
        super().receive(event)
        self.reported += event.cached or CachedTokens()

    def waits_for_moves(self) -> bool:
        return self.scheduler.cache.num_loading > 0

    def check(self) -> None:
        super().check()
        stats = self.core.stats()
        tier = stats.tiers["host"]
        moves = self.moves[Tier.GPU, Tier.HOST] + self.moves[Tier.HOST, Tier.GPU]
        moves += sum(copy.is_move for copy in self.scheduler.cache.tiers.moves.waiting)
        assert tier.num_demoted + tier.num_promoted + tier.num_failed + self.scheduler.cache.num_moving == moves
        assert tier.num_failed == self.failed
        assert tier.blocks_used <= self.host_slots
        # Some requests end before their first token, which would tell what was cached.
        assert self.reported.host <= tier.cached_tokens
        assert self.reported.gpu <= stats.cached_tokens - sum(lower.cached_tokens for lower in stats.tiers.values())
        assert stats.loading <= stats.waiting


class RandomGate:
    """Lets all or a random part of a prefix be loaded."""

    def __init__(self, rng):
        self.rng = rng

    def num_worth(self, sources, num_found, num_tokens, now):
        return self.rng.choice((len(sources), len(sources), self.rng.randint(0, len(sources))))

    def patience(self, sources, num_found):
        return self.rng.choice((0.0, 10.0, 10.0, 10.0))


class CountMoves:
    """Wraps a runner and counts the moves of plans and their failures."""

    def __init__(self, runner, workload):
        self.runner, self.workload = runner, workload
        self.num_blocks, self.num_compiled = runner.num_blocks, 0

    def submit(self, plan):
        self.workload.moves.update((copy.src.tier, copy.dst.tier) for copy in plan.copies)
        return self.runner.submit(plan)

    def poll(self, seconds=0.0):
        arrivals = self.runner.poll(seconds)
        self.workload.failed += sum(not arrival.ok for arrival in arrivals)
        return arrivals

    def close(self):
        self.runner.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_thousands_of_random_operations_over_two_tiers(overlap):
    seen: Counter[str] = Counter()
    for seed in range(16):
        workload = TieredWorkload(random.Random(seed), overlap=overlap)
        run(workload, 400)
        stats = workload.core.stats()
        assert workload.scheduler.cache.num_moving == 0
        assert not workload.scheduler.cache.tiers.host._moving
        seen.update(
            demoted=workload.moves[Tier.GPU, Tier.HOST],
            promoted=workload.moves[Tier.HOST, Tier.GPU],
            forked=workload.moves[Tier.GPU, Tier.GPU],
            failed_moves=workload.failed,
            aborted_loads=workload.aborted_loads,
            preempted=stats.num_preemptions,
            failed=stats.num_failed,
            loaded_tokens=workload.reported.host,
            shared_tokens=workload.reported.gpu,
            evicted=workload.scheduler.cache.tiers.host.num_evicted,
        )
    # The random runs must cover each kind of event often.
    assert min(seen.values()) > 20, seen


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), overlap=st.booleans(), operations=st.integers(1, 80))
def test_short_random_runs_over_two_tiers_that_can_be_shrunk(rng, overlap, operations):
    run(TieredWorkload(rng, overlap=overlap), operations)


class KindsWorkload(TieredWorkload):
    """The model has pools of one or several kinds."""

    def make_core(self) -> Core:
        rng = self.rng
        window = PoolKind("window", rng.choice((1, 3, 8, 20)))
        others = rng.choice(((PoolKind("state"),), (window,), (window, PoolKind("state"))))
        self.kinds = (*rng.choice(((), PER_TOKEN)), *others)
        return super().make_core()


@pytest.mark.parametrize("overlap", [False, True])
def test_thousands_of_random_operations_over_pools_of_all_kinds(overlap):
    seen: Counter[str] = Counter()
    for seed in range(12):
        workload = KindsWorkload(random.Random(seed), overlap=overlap)
        run(workload, 400)
        state = any(kind.name == "state" for kind in workload.kinds)
        assert not (state and workload.moves[Tier.GPU, Tier.GPU])  # no state of a prompt but its last token exists
        seen["cached with states" if state else "cached"] += workload.core.stats().cached_tokens
        seen["promoted with states" if state else "promoted"] += workload.moves[Tier.HOST, Tier.GPU]
    assert len(seen) == 4
    assert min(seen.values()) > 100, seen


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), overlap=st.booleans(), operations=st.integers(1, 80))
def test_short_random_runs_over_pools_of_all_kinds_that_can_be_shrunk(rng, overlap, operations):
    run(KindsWorkload(rng, overlap=overlap), operations)
