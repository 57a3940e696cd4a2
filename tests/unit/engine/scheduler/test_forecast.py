"""Tests of Forecast and Intake: what is predicted, whom a prediction refuses, and what queues have room for."""

import math

import pytest

from engine.errors import Overloaded, RequestTimeout
from engine.request import Status
from engine.scheduler.accuracy import FIRST_SPREAD, SURE
from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepLimits
from engine.scheduler.step_cost import StepCost
from tests.unit.engine.scheduler.rig import Rig, make_request

LIMITS = StepLimits(tokens=100, seqs=8, chunk=100)
STEP_SECONDS = 0.1


def make_rig(*, seeded: bool = True, **options) -> Rig:
    """Make a rig on a device whose steps of 100 prompt tokens take 0.1 s, and whose decode steps take 0.01 s.

    All its steps report 0.1 s, so that is the usual step.
    """
    table = CostTable([8], [0.01], [1, 100], [0.001, STEP_SECONDS], 0.0, 0.0, 0.0)
    cost = StepCost([8], 100, table if seeded else None)
    return Rig(budget=100, blocks=2000, block_size=10, cost=cost, **{"rows": 8, "max_model_len": 100_000} | options)


def expected(rig: Rig, num_prompt: int, **fields) -> float:
    request = make_request("new", num_prompt=num_prompt, arrival=rig.now + 1e-6, **fields)
    return rig.scheduler.forecast.expected(request, rig.limits).seconds


def test_an_idle_engine_needs_the_time_of_the_prompt():
    assert expected(make_rig(), 100) == pytest.approx(0.1)
    assert expected(make_rig(), 1000) == pytest.approx(1.0)


def test_prompts_that_go_before_count():
    rig = make_rig()
    rig.add("a", 300)
    rig.step()  # 100 tokens are computed
    rig.add("b", 500)
    assert expected(rig, 100) == pytest.approx(0.2 + 0.5 + 0.1, rel=0.01)
    assert rig.scheduler.forecast.waiting_seconds(rig.limits) == pytest.approx(0.7, rel=0.01)


def test_lower_classes_do_not_count_and_higher_ones_do():
    rig = make_rig()
    rig.add("batch", 500, slo="batch")
    rig.add("urgent", 300, slo="interactive")
    assert expected(rig, 100) == pytest.approx(0.4)
    assert expected(rig, 100, slo="interactive") == pytest.approx(0.4)
    assert expected(rig, 100, slo="batch") == pytest.approx(0.9)


def test_another_tenant_counts_with_no_more_than_an_equal_share():
    rig = make_rig()
    for i in range(20):
        rig.add(f"flood{i}", 400, tenant="flood")
    assert expected(rig, 100, tenant="flood") == pytest.approx(8.1)
    assert expected(rig, 100, tenant="calm") == pytest.approx(0.2)


def test_a_cached_prefix_is_not_computed_again():
    rig = make_rig()
    prompt = list(range(10, 910))
    rig.add("a", prompt, max_tokens=1)
    while rig.scheduler.has_requests:
        rig.step()
    request = rig.add("b", [*prompt, 5, 6, 7], promised=True, slo="interactive")
    assert request.num_matched == 900
    assert request.expected_at is not None


def test_a_full_batch_is_waited_for():
    rig = make_rig(rows=2)
    for i in range(2):
        rig.add(f"short{i}", 5, max_tokens=20)
    while rig.scheduler.has_requests:  # 20 tokens are now the usual length of an output
        rig.step(device_seconds=0.01)
    for i in range(2):
        rig.add(f"r{i}", 5)
    rig.step(device_seconds=0.01)
    # The place of the first of two that end comes after half an output. Then come the step in flight and the prompt's own step.
    assert expected(rig, 1) == pytest.approx(20 * 0.01 / 2 + 0.01 + 0.016)


def test_a_place_that_a_lower_class_gives_up_is_not_waited_for():
    rig = make_rig(rows=2)
    for i in range(2):
        rig.add(f"long{i}", 5, max_tokens=500, slo="batch")
    while rig.scheduler.has_requests:  # 500 tokens are now the usual length of an output
        rig.step(device_seconds=0.01)
    for i in range(2):
        rig.add(f"r{i}", 5, slo="batch")
    rig.step(device_seconds=0.01)
    assert expected(rig, 1, slo="batch") > 2.5
    urgent = rig.add("urgent", 1, slo="interactive", promised=True)
    assert urgent.expected_at == pytest.approx(rig.now + 0.01 + 0.016)
    rig.step()
    assert urgent.num_outputs == 1


def test_a_promised_class_is_refused_when_its_first_token_would_be_late():
    rig = make_rig()
    rig.add("before", 350, slo="interactive")
    accepted = rig.add("in time", 30, slo="interactive", promised=True)
    with pytest.raises(Overloaded, match=r"may come only after 0\.5\d s.* interactive promises it within 0\.5 s") as refusal:
        rig.add("late", 30, slo="interactive", promised=True)
    assert refusal.value.param == "slo_class"
    assert accepted.status is Status.WAITING
    assert rig.add("patient", 30, promised=True).status is Status.WAITING  # its class is standard
    assert rig.scheduler.counts.num_accepted == 3


def test_a_refusal_says_when_to_try_again():
    rig = make_rig()
    rig.add("long", 5000, slo="interactive")
    with pytest.raises(Overloaded) as refusal:
        rig.add("late", 100, slo="interactive", promised=True)
    # It is accepted once the delay by others, with its margin, is as long as the promise without the prompt's own time.
    assert refusal.value.retry_after == math.ceil(5.0 - (0.5 - 0.1) / math.exp(SURE * FIRST_SPREAD))


@pytest.mark.parametrize("deviation", [0.0, 0.4])
def test_the_margin_follows_how_much_first_tokens_deviate_from_predictions(deviation):
    forecast = make_rig().scheduler.forecast
    for i in range(400):
        request = make_request(f"r{i}", num_prompt=5, slo="interactive")
        request.expected_at = request.arrival + 0.3
        forecast.began(request, request.arrival + 0.3 * math.exp(deviation if i % 2 else -deviation))
    found = forecast.expected(make_request("new", num_prompt=100), LIMITS)
    assert found.margin == pytest.approx(math.exp(SURE * deviation), rel=0.05)
    assert found.late == pytest.approx(found.alone + (found.seconds - found.alone) * found.margin)


def test_short_waits_that_are_off_by_a_step_do_not_count_as_deviation():
    forecast = make_rig().scheduler.forecast
    before = forecast.expected(make_request("new", num_prompt=100), LIMITS).margin
    for i in range(100):
        request = make_request(f"r{i}", num_prompt=5, slo="interactive")
        request.expected_at = request.arrival + 0.01
        forecast.began(request, request.arrival + (0.02 if i % 2 else 0.005))
    assert forecast.expected(make_request("new", num_prompt=100), LIMITS).margin == before


@pytest.mark.parametrize("fields", [{}, {"promised": True, "resumed": True}, {"promised": True, "slo": "batch"}])
def test_who_was_promised_nothing_or_accepted_before_is_not_refused(fields):
    rig = make_rig()
    rig.add("long", 5000)
    assert rig.add("b", 100, **fields).status is Status.WAITING


def test_nothing_is_refused_while_the_cost_of_steps_is_not_known():
    rig = make_rig(seeded=False)
    rig.add("long", 5000)
    assert rig.add("b", 100, slo="interactive", promised=True, deadline_s=0.01).status is Status.WAITING
    assert rig.scheduler.forecast.waiting_seconds(rig.limits) == 0.0


def test_a_long_prompt_may_take_its_own_time_but_wait_no_longer_than_promised():
    rig = make_rig()
    assert rig.add("long", 1000, slo="interactive", promised=True).status is Status.WAITING  # 1 s alone
    rig = make_rig()
    rig.add("before", 600, slo="interactive")
    with pytest.raises(Overloaded):
        rig.add("long", 1000, slo="interactive", promised=True)


def test_a_deadline_that_cannot_be_met_is_refused():
    rig = make_rig()
    rig.add("a", 500, slo="interactive")
    assert rig.add("b", 100, deadline_s=0.7).status is Status.WAITING
    with pytest.raises(Overloaded, match="deadline") as refusal:
        rig.add("c", 100, deadline_s=0.4)
    assert (refusal.value.param, refusal.value.retry_after) == ("deadline_ms", 1)
    with pytest.raises(RequestTimeout, match=r"the prompt alone takes about 1 s"):
        rig.add("d", 1000, deadline_s=0.9)


def test_siblings_share_the_prompt_of_the_first():
    rig = make_rig()
    first = rig.add("first", 300, slo="interactive", promised=True)
    for i in range(5):
        sibling = rig.add(f"sibling{i}", list(first.tokens), slo="interactive", promised=True, fork_of="first")
        assert sibling.num_matched == 299
    assert rig.scheduler.forecast.waiting_seconds(rig.limits) == pytest.approx(0.3, rel=0.1)


def test_an_idle_engine_refuses_nobody_by_what_it_remembers():
    rig = make_rig()
    for i in range(100):
        rig.add(f"r{i}", 100, max_tokens=1)
        rig.now += 5.0
        rig.step(device_seconds=1.0)  # usual steps are long, and first tokens come later than predicted
    assert expected(rig, 30) > 1.0
    assert rig.add("interactive", 30, slo="interactive", promised=True).status is Status.WAITING
    rig.step()
    assert rig.scheduler.abort("interactive")
    assert rig.add("with a deadline", 30, deadline_s=0.5).status is Status.WAITING


def test_what_a_prompt_takes_alone_does_not_depend_on_the_limits_that_others_cause():
    rig = make_rig()
    rig.limits = StepLimits(tokens=10, seqs=8, chunk=10)
    rig.add("a", 5)
    rig.step()
    request = make_request("new", num_prompt=1000)
    assert rig.scheduler.forecast.expected(request, rig.limits).alone == pytest.approx(1.0)


def test_a_refused_request_leaves_nothing_behind():
    rig = make_rig()
    rig.add("long", 5000, slo="interactive")
    with pytest.raises(Overloaded):
        rig.add("late", 100, slo="interactive", promised=True)
    assert rig.scheduler._policy._unfinished == {"": 1}
    assert len(rig.scheduler.cache._chains) == 0
    rig.scheduler.check()
    rig.add("late", 100)  # the id is free


def test_later_predictions_are_corrected_by_what_came_of_earlier_ones():
    rig = make_rig(prefix_caching=False)
    for i in range(200):
        rig.add(f"r{i}", 100, max_tokens=1, slo="interactive", promised=True)
        rig.now += 0.3  # predicted are 0.1 s for the step in flight, and 0.1 s for the prompt
        rig.step(device_seconds=0.1)
        rig.now += 1.0
    assert expected(rig, 100) == pytest.approx(0.3, rel=0.01)


def test_queues_are_bounded_by_requests_and_by_tokens():
    rig = Rig(max_queue=2, max_queue_tokens=100)
    rig.add("a", 60)
    with pytest.raises(Overloaded, match="1 requests with 60 tokens are already waiting"):
        rig.add("b", 41)
    rig.add("c", 40)
    with pytest.raises(Overloaded):
        rig.add("d", 1)


def test_a_prompt_longer_than_the_queue_may_hold_waits_alone():
    rig = Rig(max_queue_tokens=100, blocks=1000)
    assert rig.add("a", 200).status is Status.WAITING


def test_a_flood_of_one_tenant_leaves_room_for_another():
    rig = Rig(max_queue=90, rows=1)
    rig.add("running", 5, tenant="calm", max_tokens=300)
    rig.step()
    for number in range(80):
        rig.add(f"flood{number}", 5, tenant="flood")
    with pytest.raises(Overloaded, match="80 requests with 400 tokens of this tenant are already waiting, and the rest"):
        rig.add("one more", 5, tenant="flood")
    accepted = [rig.add(f"calm{number}", 5, tenant="calm") for number in range(5)]
    assert {request.status for request in accepted} == {Status.WAITING}
    rig.scheduler.check()
    rig.scheduler.abort("flood3")
    with pytest.raises(Overloaded):
        rig.add("more", 5, tenant="flood")  # the calm tenant has taken of the room that was free


def test_a_tenant_is_judged_by_its_own_errors():
    forecast = make_rig().scheduler.forecast
    for i in range(400):
        request = make_request(f"r{i}", num_prompt=5, slo="interactive", tenant="flood")
        request.expected_at = request.arrival + 0.3
        forecast.began(request, request.arrival + 0.3 * math.exp(0.5 if i % 2 else -0.5))
        request = make_request(f"s{i}", num_prompt=5, slo="interactive", tenant="calm")
        request.expected_at = request.arrival + 0.3
        forecast.began(request, request.arrival + 0.3)
    calm, flood = (forecast.expected(make_request("new", tenant=t), LIMITS).margin for t in ("calm", "flood"))
    assert calm < 1.05
    assert flood == pytest.approx(math.exp(SURE * 0.5), rel=0.05)
