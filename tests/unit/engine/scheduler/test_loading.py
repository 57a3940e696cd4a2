"""Tests that requests whose prefix lies in the host tier wait for it, that others do not, and that nobody waits for good."""

import pytest

from engine.plan import Arrival, StepPlan, Tier
from engine.request import CachedTokens, FinishReason, Request, Status
from tests.unit.engine.scheduler.rig import Rig, slices

PREFIX = list(range(100, 141))  # ten full blocks and one token
BLOCK = 4


def arrive(rig: Rig, plan: StepPlan, *, ok: bool = True) -> None:
    rig.scheduler.arrived([Arrival(copy.dst, ok) for copy in plan.copies if copy.is_move])
    rig.scheduler.check()


def run(rig: Rig, name: str, prompt, **params) -> Request:
    """Run one request to its end, with all moves arriving at once."""
    request = rig.add(name, prompt, max_tokens=1, **params)
    while rig.scheduler.has_requests:
        plan = rig.schedule()
        rig.commit(plan)
        arrive(rig, plan)
    return request


def demoted(**options) -> Rig:
    """Return a rig in whose host tier PREFIX is, and whose GPU blocks hold other content."""
    rig = Rig(**{"blocks": 24, "host_slots": 100} | options)
    run(rig, "first", PREFIX)
    run(rig, "filler", 24 * BLOCK - 1)
    assert len(rig.scheduler.cache.tiers.host) >= 10
    return rig


def test_a_request_computes_only_what_was_not_loaded():
    rig = demoted()
    request = rig.add("again", PREFIX)
    plan = rig.schedule()
    assert (plan.rows, request.status) == ([], Status.LOADING)
    assert rig.scheduler.schedule(rig.limits) is None
    arrive(rig, plan)
    rig.commit(plan)
    assert request.status is Status.WAITING
    assert slices(rig.schedule()) == [(request.row, 40, 1)]
    assert request.cached == CachedTokens(host=40)
    assert (rig.scheduler.counts.cached_tokens, rig.scheduler.counts.host_cached_tokens) == (40, 40)


def test_the_cached_tokens_are_those_of_the_first_admission():
    rig = demoted()
    request = rig.add("again", PREFIX)
    plan = rig.schedule()
    arrive(rig, plan)
    rig.commit(plan)
    preempted = rig.schedule()
    rig.scheduler._preempt(request)
    rig.commit(preempted)
    assert rig.scheduler.num_running == 0
    plan = rig.schedule()
    assert slices(plan) == [(request.row, 40, 2)]
    assert request.num_loaded == 0
    assert request.cached == CachedTokens(host=40)
    assert rig.scheduler.counts.host_cached_tokens == 40


def test_a_prompt_that_is_partly_on_the_device_is_split_by_tier():
    rig = demoted()
    assert run(rig, "beginning", PREFIX[:13]).cached == CachedTokens(host=12)
    assert run(rig, "again", PREFIX).cached == CachedTokens(gpu=12, host=28)
    counts = rig.scheduler.counts
    assert (counts.cached_tokens, counts.host_cached_tokens, counts.disk_cached_tokens) == (52, 40, 0)


def test_others_start_while_a_request_loads():
    rig = demoted()
    loading, other = rig.add("again", PREFIX), rig.add("other", 5)
    plan = rig.schedule()
    assert slices(plan) == [(other.row, 0, 5)]
    rig.commit(plan)
    assert [rig.step()["other"].tokens for _ in range(3)] == [[7]] * 3
    arrive(rig, plan)
    assert slices(rig.schedule())[-1] == (loading.row, 40, 1)


def test_prefixes_are_loaded_while_no_row_is_free():
    rig = demoted(rows=1)
    rig.add("running", 5)
    rig.step()
    waiting = rig.add("again", PREFIX)
    plan = rig.schedule()
    assert (len(plan.rows), waiting.status) == (1, Status.LOADING)
    rig.commit(plan)
    arrive(rig, plan)
    assert rig.scheduler.cache.num_held(waiting) == 10


def test_a_request_with_the_same_prefix_waits_for_the_load_and_shares_it():
    rig = demoted()
    first, second = rig.add("a", PREFIX), rig.add("b", PREFIX)
    plan = rig.schedule()
    assert [copy.src.tier for copy in plan.copies].count(Tier.HOST) == 10
    rig.commit(plan)
    arrive(rig, plan)
    plan = rig.schedule()
    assert {request.status for request in (first, second)} == {Status.RUNNING}
    assert second.blocks[:10] == first.blocks[:10]
    assert (rig.scheduler.counts.cached_tokens, rig.scheduler.counts.host_cached_tokens) == (80, 40)


@pytest.mark.parametrize("ok", [True, False])
def test_an_aborted_load_ends_once_and_its_blocks_come_back_with_its_moves(ok):
    rig = demoted()
    rig.add("again", PREFIX)
    plan = rig.schedule()
    event = rig.scheduler.abort("again")
    assert event.finish is FinishReason.ABORT
    assert rig.scheduler.cache.num_free == 14
    rig.commit(plan)
    arrive(rig, plan, ok=ok)
    assert rig.scheduler.cache.num_free == 24
    rig.scheduler.check()


def test_a_request_whose_load_failed_computes_its_prompt():
    rig = demoted()
    request = rig.add("again", PREFIX)
    plan = rig.schedule()
    rig.commit(plan)
    arrive(rig, plan, ok=False)
    assert slices(rig.schedule()) == [(request.row, 0, 41)]
    assert request.cached == CachedTokens()


def test_prompts_whose_log_probabilities_are_requested_load_nothing():
    rig = demoted()
    request = rig.add("again", PREFIX, prompt_logprobs=0)
    assert slices(rig.schedule()) == [(request.row, 0, 41)]


def test_a_waiting_request_gives_back_what_it_holds_before_anyone_is_preempted():
    rig = demoted(rows=1)
    running = rig.add("running", 40, max_tokens=50)
    rig.step()
    waiting = rig.add("again", PREFIX)
    plan = rig.schedule()
    rig.commit(plan)
    arrive(rig, plan)
    assert rig.scheduler.cache.num_held(waiting) == 10
    while running.num_outputs < 49:
        rig.step()
    assert rig.scheduler.counts.num_preemptions == 0
    assert rig.scheduler.cache.num_held(waiting) == 0
    assert waiting.status is Status.WAITING


def test_a_request_that_runs_alone_waits_for_blocks_that_are_being_loaded():
    rig = demoted(rows=1)
    running = rig.add("running", 40, max_tokens=50)
    rig.step()
    rig.add("again", PREFIX)
    plan = rig.schedule()
    rig.commit(plan)
    while rig.scheduler.cache.num_free or running.num_computed < BLOCK * len(running.blocks):
        rig.step()
    assert rig.scheduler.schedule(rig.limits) is None
    assert (running.status, rig.scheduler.counts.num_preemptions) == (Status.RUNNING, 0)
    arrive(rig, plan)
    assert rig.step().keys() == {"running"}


def test_the_first_request_gets_the_blocks_that_later_ones_hold():
    rig = demoted(rows=1)
    rig.add("running", 5, max_tokens=2)
    rig.step()
    later = rig.add("again", PREFIX, priority=1)
    plan = rig.schedule()
    arrive(rig, plan)
    first = rig.add("first", 20 * BLOCK, max_tokens=8)
    rig.commit(plan)
    assert slices(rig.schedule())[0] == (first.row, 0, 64)
    assert (later.status, rig.scheduler.cache.num_held(later)) == (Status.WAITING, 0)


@pytest.mark.parametrize(
    ("running", "large"), [("standard", "standard"), ("interactive", "standard"), ("interactive", "interactive")]
)
def test_nobody_gives_back_blocks_that_would_not_be_enough(running, large):
    """The large request needs 22 of 24 blocks. One of 12 blocks runs, and another one holds 10."""
    rig = demoted(rows=2, max_skips=0)
    rig.add("running", 11 * BLOCK, max_tokens=4, slo=running)
    rig.step()
    holder = rig.add("again", PREFIX, slo="batch")
    rig.limits = rig.limits._replace(seqs=1)
    plan = rig.schedule()
    arrive(rig, plan)
    rig.commit(plan)
    rig.limits = rig.limits._replace(seqs=2)
    rig.add("large", 22 * BLOCK - 1, slo=large, max_tokens=1)
    rig.step()
    assert (holder.status, rig.scheduler.cache.num_held(holder)) == (Status.WAITING, 10)
    assert rig.scheduler.counts.num_preemptions == 0


def test_a_load_takes_no_blocks_that_earlier_requests_need():
    rig = demoted(rows=1)
    rig.add("running", 5)
    rig.step()
    rig.add("first", 18 * BLOCK, max_tokens=8)
    later = rig.add("again", PREFIX, priority=1)
    for _ in range(3):
        rig.step()
    assert later.status is Status.WAITING


def test_a_preempted_request_comes_back_from_the_host_and_computes_only_its_last_block():
    rig = Rig(blocks=24, host_slots=100)
    first = rig.add("first", 41, max_tokens=40)
    victim = rig.add("victim", 37, max_tokens=40)
    victim_computed = []
    while not rig.scheduler.counts.num_preemptions:
        plan = rig.schedule()
        rig.commit(plan)
        arrive(rig, plan)
    known = len(victim.tokens)
    assert (victim.status, first.status) == (Status.WAITING, Status.RUNNING)
    while victim.status is not Status.RUNNING:
        plan = rig.schedule()
        victim_computed = [(start, num) for row, start, num in slices(plan) if row == victim.row]
        rig.commit(plan)
        arrive(rig, plan)
    (start, num) = victim_computed[0]
    assert start == known // BLOCK * BLOCK  # every full block came back
    assert num <= BLOCK
    assert rig.scheduler.cache.tiers.decisions == {"load": 1}
