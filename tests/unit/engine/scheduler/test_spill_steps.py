"""Tests the steps of a request whose context is larger than the GPU's cache, beside ordinary requests."""

from itertools import pairwise

import pytest

from engine.errors import ContextTooLong
from engine.plan import Arrival
from engine.request import CachedTokens, Status
from tests.unit.engine.scheduler.rig import Rig, slices


def make_rig(**options):
    return Rig(**{"blocks": 10, "block_size": 4, "host_slots": 40, "budget": 12} | options)


def step(rig):
    """Run a step, and let its moves arrive. Returns the plan."""
    plan = rig.schedule()
    rig.commit(plan)
    rig.scheduler.arrived([Arrival(copy.dst, True) for copy in plan.copies if copy.is_move])
    return plan


def test_a_prompt_larger_than_the_cache_runs_in_chunks_and_then_token_by_token():
    rig = make_rig()
    request = rig.add("long", 60, max_tokens=3)
    assert request.spills
    plans = []
    while request.status is not Status.FINISHED:
        plans.append(step(rig))
    own = [plan for plan in plans if plan.rows]
    assert [slices(plan)[0][1:] for plan in own] == [(0, 12), (12, 12), (24, 12), (36, 12), (48, 12), (60, 1), (61, 1)]
    assert [plan.num_decodes for plan in own] == [0] * 5 + [1, 1]
    assert [plan.samples for plan in own] == [[]] * 4 + [[0]] * 3
    for plan, (_, start, num) in zip(own, (slices(plan)[0] for plan in own), strict=True):
        slots, blocks = plan.spilled
        assert len(blocks) <= 5
        assert start + num <= 4 * (len(slots) + len(blocks)) < start + num + 4
    assert [plan.admitted[0].blocks for plan in own if plan.admitted] == [[]]
    assert rig.scheduler.cache.num_used == 0
    assert len(rig.scheduler.cache.tiers.host) == 0


def test_ordinary_requests_take_turns_with_the_one_that_spills():
    rig = make_rig()
    rig.add("long", 60, max_tokens=3)
    other = rig.add("short", 4, max_tokens=20)
    plans = [step(rig) for _ in range(12)]
    kinds = [plan.spilled is not None for plan in plans if plan.rows]
    assert {True, False} == set(kinds)
    assert all(a != b for a, b in pairwise(kinds) if a)  # never two of its steps in a row
    assert other.num_outputs >= 4


def test_a_chunk_of_a_context_that_spills_is_not_shortened_for_the_sake_of_other_steps():
    rig = make_rig()
    rig.limits = rig.limits._replace(tokens=2)
    rig.add("long", 60)
    assert slices(step(rig)) == [(0, 0, 12)]


def test_a_second_request_that_spills_waits_for_the_first_and_others_pass_it():
    rig = make_rig()
    first, second = rig.add("first", 60, max_tokens=1), rig.add("second", 60, max_tokens=1)
    short = rig.add("short", 4, max_tokens=1)
    while first.status is not Status.FINISHED:
        assert second.status is Status.WAITING
        step(rig)
    assert short.status is Status.FINISHED
    while second.status is not Status.FINISHED:
        step(rig)


def test_a_request_that_grows_beyond_the_cache_spills_from_then_on():
    rig = make_rig()
    request = rig.add("grows", 30, max_tokens=40)
    assert not request.spills
    kinds = []
    while request.status is not Status.FINISHED:
        plan = step(rig)
        if plan.rows:
            kinds.append(plan.spilled is not None)
    assert request.num_outputs == 40
    assert rig.scheduler.counts.num_preemptions == 1
    assert kinds.index(True) == 3 + 10  # three chunks, and tokens until all 40 positions of the cache are used
    assert all(kinds[kinds.index(True) :])


def test_a_request_that_spills_is_not_preempted_by_a_higher_class():
    rig = make_rig(rows=1)
    low = rig.add("low", 60, max_tokens=2, slo="batch")
    step(rig)
    rig.add("high", 4, max_tokens=1, slo="interactive")
    while low.status is not Status.FINISHED:
        step(rig)
    assert rig.scheduler.counts.num_preemptions == 0


def test_a_context_that_cache_and_host_tier_together_cannot_hold_is_refused_by_the_name_of_the_setting():
    rig = make_rig(max_model_len=1000)
    rig.scheduler._intake._host_tier_bytes = 40 * 1000
    rig.add("fits", 191, max_tokens=10)
    with pytest.raises(ContextTooLong, match=r"maximum context length is 200 tokens.*host_tier_bytes is 40000; with 41000 the"):
        rig.add("too-long", 192, max_tokens=10)


def test_without_a_host_tier_a_context_larger_than_the_cache_is_refused():
    rig = make_rig(host_slots=0)
    with pytest.raises(ContextTooLong, match="maximum context length is 40 tokens, which this server's KV cache can hold"):
        rig.add("long", 60)


def test_siblings_that_spill_compute_their_prompts_one_after_the_other():
    rig = make_rig()
    first = rig.add("first", list(range(100, 160)), max_tokens=2)
    second = rig.add("second", list(range(100, 160)), max_tokens=2, fork_of="first")
    for request in (first, second):
        while request.status is not Status.FINISHED:
            step(rig)
        assert request.cached == CachedTokens()
