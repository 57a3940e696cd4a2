"""Tests that a request whose logits are not finite ends with an error, and that none of its blocks stays in the prefix cache."""

import logging

import pytest

from engine.plan import NO_TOKEN, StepPlan, StepResult
from engine.request import FinishReason, Request, Status, TokenEvent
from tests.unit.engine.scheduler.rig import Rig

PROMPT = list(range(100, 141))  # ten full blocks and one token


def commit(rig: Rig, plan: StepPlan, failing: Request) -> dict[str, TokenEvent]:
    """Commit a step in which the row of `failing` samples NO_TOKEN and every other row samples 7."""
    tokens = [NO_TOKEN if plan.rows[index] == failing.row else 7 for index in plan.samples]
    assert NO_TOKEN in tokens
    events = rig.scheduler.commit(plan, StepResult(plan.step, tokens))
    rig.scheduler.check()
    return {event.request_id: event for event in events}


def failed(event: TokenEvent) -> bool:
    return event.finish is FinishReason.ERROR and event.failure.error == "NumericalError" and event.tokens == []


@pytest.mark.parametrize("num_outputs", [0, 1, 5])
def test_the_request_ends_with_an_error_and_its_neighbours_continue(num_outputs, caplog):
    rig = Rig()
    others = [rig.add(name, 5) for name in "ab"]
    bad = rig.add("bad", 6)
    others.append(rig.add("c", 5))
    for _ in range(num_outputs):
        rig.step()
    plan = rig.schedule()
    with caplog.at_level(logging.ERROR):
        events = commit(rig, plan, bad)
    assert failed(events["bad"])
    assert bad.status is Status.FINISHED
    assert all(events[other.request_id].tokens == [7] for other in others)
    counts = rig.scheduler.counts
    assert (counts.num_failed, counts.num_finished, counts.num_aborted, counts.num_accepted) == (1, 0, 0, 4)
    (record,) = caplog.records
    assert (record.request_id, record.step, record.output_token) == ("bad", plan.step, num_outputs + 1)
    assert rig.step().keys() == {"a", "b", "c"}


def test_a_step_that_was_submitted_before_the_failure_was_known_adds_nothing():
    rig = Rig()
    bad, other = rig.add("bad", 5), rig.add("other", 5)
    first, second = rig.schedule(), rig.schedule()
    assert commit(rig, first, bad).keys() == {"bad", "other"}
    assert rig.commit(second).keys() == {"other"}
    assert other.num_outputs == 2
    assert rig.scheduler.counts.num_failed == 1


def test_a_request_that_was_aborted_meanwhile_does_not_fail_too():
    rig = Rig()
    rig.add("a", 5)
    plan = rig.schedule()
    rig.scheduler.abort("a")
    assert rig.commit(plan, token=NO_TOKEN) == {}
    assert (rig.scheduler.counts.num_failed, rig.scheduler.counts.num_aborted) == (0, 1)


def test_a_preempted_request_fails_too_and_what_it_published_is_withdrawn():
    rig = Rig()
    rig.add("bad", PROMPT[:40])
    plan = rig.schedule()
    rig.scheduler._preempt(rig.scheduler._requests["bad"])
    assert rig.scheduler.cache.num_cached == 10
    assert failed(rig.commit(plan, token=NO_TOKEN)["bad"])
    assert (rig.scheduler.cache.num_cached, rig.scheduler.has_requests) == (0, False)


@pytest.mark.parametrize("num_outputs", [0, 3, 20])
def test_nothing_of_a_failed_request_is_found_in_the_cache(num_outputs):
    rig = Rig()
    bad = rig.add("bad", PROMPT)
    for _ in range(num_outputs):
        rig.step()
    commit(rig, rig.schedule(), bad)
    assert rig.scheduler.cache.num_cached == 0
    again = rig.add("again", PROMPT)
    rig.schedule()
    assert again.cached.total == 0


def test_blocks_that_a_failed_request_shared_are_withdrawn_while_their_holder_runs():
    """Either request may have computed the shared blocks wrongly. The other one continues, and publishes no further blocks."""
    rig = Rig()
    rig.add("first", PROMPT)
    rig.step()
    bad = rig.add("bad", [*PROMPT, 7, 8, 9])
    plan = rig.schedule()
    assert bad.cached.total == 40
    commit(rig, plan, bad)
    for _ in range(20):
        assert rig.step()["first"].tokens == [7]
    rig.scheduler.abort("first")
    assert rig.scheduler.cache.num_cached == 0


def test_a_sibling_that_ends_without_a_token_does_not_publish_its_failed_leaders_blocks():
    rig = Rig(budget=64)
    bad = rig.add("bad", PROMPT)
    rig.add("sibling", PROMPT, fork_of="bad")
    first, second = rig.schedule(), rig.schedule()  # the sibling has forked the leader before the failure is known
    assert second.copies == []
    assert len(second.rows) == 2
    commit(rig, first, bad)
    rig.scheduler.abort("sibling")
    assert rig.scheduler.cache.num_cached == 0
    assert rig.commit(second) == {}


def test_content_that_another_request_computed_by_itself_goes_too():
    """Content is known by its digest alone, so the block of the other request goes with the failed one's."""
    rig = Rig(budget=1000)
    own = rig.add("own", PROMPT, prompt_logprobs=0)
    bad = rig.add("bad", PROMPT, prompt_logprobs=0)
    commit(rig, rig.schedule(), bad)
    for _ in range(20):
        assert rig.step()["own"].tokens == [7]
    assert rig.scheduler.cache.num_cached == 0
    rig.scheduler.abort(own.request_id)
    rig.add("again", PROMPT)
    rig.step()
    assert rig.scheduler.cache.num_cached == 10  # a request that computes the prompt again publishes it again
