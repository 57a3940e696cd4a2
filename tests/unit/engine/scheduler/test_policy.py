"""Tests of FairPolicy: classes, ageing, due times, priorities, shares of tenants, and victims."""

import random

from engine.scheduler.policy import AGEING_SECONDS, PRIORITY_SECONDS, FairPolicy
from engine.scheduler.queue import WaitingQueue
from tests.unit.engine.scheduler.rig import make_request


class Waiting:
    """A queue whose requests a FairPolicy orders."""

    def __init__(self) -> None:
        self.policy = FairPolicy()
        self.queue = WaitingQueue()

    def add(self, name: str, **fields):
        request = make_request(name, **fields)
        self.policy.arrived(request)
        self.queue.push(request)
        return request

    def order(self, now: float = 0.0) -> list[str]:
        return [request.request_id for request in self.policy.order(self.queue.lanes, now)]

    def serve(self, now: float = 0.0, *, num_outputs: int = 0):
        """Admit the first request and end it with `num_outputs` outputs."""
        request = next(iter(self.policy.order(self.queue.lanes, now)))
        self.queue.remove(request)
        self.policy.admitted(request, now)
        request.tokens.extend([5] * num_outputs)
        self.policy.ended(request)
        return request


def test_classes_go_in_order_and_within_a_class_the_earliest_due_goes_first():
    waiting = Waiting()
    waiting.add("batch", slo="batch", arrival=0.0)
    waiting.add("standard", arrival=1.0)
    waiting.add("late", slo="interactive", arrival=3.0)
    waiting.add("early", slo="interactive", arrival=2.0)
    assert waiting.order(3.0) == ["early", "late", "standard", "batch"]


def test_a_deadline_that_is_earlier_than_the_class_target_is_due_first():
    waiting = Waiting()
    waiting.add("first", arrival=0.0)
    waiting.add("urgent", arrival=1.0, deadline_s=0.5)
    waiting.add("patient", arrival=0.5, deadline_s=50.0)
    assert waiting.order(1.0) == ["urgent", "first", "patient"]


def test_a_request_moves_up_a_class_for_each_ageing_time_that_it_waits():
    waiting = Waiting()
    waiting.add("batch", slo="batch", arrival=0.0)
    for i in range(3):
        waiting.add(f"new{i}", slo="interactive", arrival=2 * AGEING_SECONDS - 1 + i)
    assert waiting.order(2 * AGEING_SECONDS - 0.5)[-1] == "batch"
    waiting.add("standard", slo="standard", arrival=2 * AGEING_SECONDS)
    assert waiting.order(2 * AGEING_SECONDS) == ["new0", "batch", "new1", "new2", "standard"]  # by due time: 59.5, 60, 60.5, 61.5


def test_no_class_starves_under_a_steady_flow_of_a_higher_one():
    waiting = Waiting()
    waiting.add("batch", slo="batch", arrival=0.0)
    for second in range(1000):
        for i in range(2):  # two arrive for each that is served
            waiting.add(f"{second}-{i}", slo="interactive", arrival=float(second))
        if waiting.serve(float(second)).request_id == "batch":
            break
    assert 2 * AGEING_SECONDS <= second < 200


def test_a_priority_is_worth_a_time_of_waiting_and_starves_nobody():
    waiting = Waiting()
    waiting.add("old", arrival=0.0)
    waiting.add("urgent", arrival=PRIORITY_SECONDS - 1, priority=-1)
    waiting.add("too late", arrival=PRIORITY_SECONDS + 1, priority=-1)
    waiting.add("patient", arrival=0.0, priority=1)
    assert waiting.order(PRIORITY_SECONDS) == ["urgent", "old", "too late", "patient"]


def test_a_tenant_that_floods_gets_no_more_service_than_the_other():
    waiting, rng, served = Waiting(), random.Random(1), {"flood": 0, "calm": 0}
    for i in range(400):
        waiting.add(f"f{i}", tenant="flood", num_prompt=rng.randint(1, 200), arrival=0.0)
    for i in range(400):
        if i < 200:
            waiting.add(f"c{i}", tenant="calm", num_prompt=rng.randint(1, 200), arrival=float(i))
    for second in range(200):
        request = waiting.serve(float(second), num_outputs=rng.randint(0, 100))
        served[request.tenant] += request.num_prompt + 2 * request.num_outputs
    assert abs(served["flood"] - served["calm"]) <= 400  # one request of each at most


def test_an_idle_share_goes_to_those_who_want_it():
    waiting = Waiting()
    for i in range(5):
        waiting.add(f"f{i}", tenant="flood", num_prompt=100)
    assert [waiting.serve().request_id for _ in range(5)] == ["f0", "f1", "f2", "f3", "f4"]


def test_a_pause_earns_no_credit():
    waiting = Waiting()
    for i in range(20):
        waiting.add(f"a{i}", tenant="a", num_prompt=100)
    for _ in range(10):
        waiting.serve()
    for i in range(10):
        waiting.add(f"b{i}", tenant="b", num_prompt=100)
    names = [waiting.serve().tenant for _ in range(10)]
    assert sorted(names) == ["a"] * 5 + ["b"] * 5


def test_a_tenant_cannot_shed_its_debt_by_a_pause():
    waiting = Waiting()
    waiting.add("a", tenant="a", num_prompt=1000)
    for i in range(4):
        waiting.add(f"b{i}", tenant="b", num_prompt=100)
    assert [waiting.serve().tenant for _ in range(2)] == ["a", "b"]  # "a" has now been served ten times as much, and pauses
    waiting.add("a again", tenant="a", num_prompt=100)
    assert [waiting.serve().tenant for _ in range(4)] == ["b", "b", "b", "a"]


def test_outputs_of_running_requests_count():
    waiting = Waiting()
    running = waiting.add("a0", tenant="a", num_prompt=10)
    waiting.queue.remove(running)
    waiting.policy.admitted(running, 0.0)
    running.tokens.extend([5] * 500)
    waiting.add("b0", tenant="b", num_prompt=900)
    waiting.serve()
    waiting.add("a1", tenant="a")
    waiting.add("b1", tenant="b")
    assert waiting.order() == ["b1", "a1"]


def test_counters_of_tenants_that_left_are_forgotten():
    waiting = Waiting()
    for i in range(1000):
        waiting.add(f"r{i}", tenant=f"t{i}")
        waiting.serve()
    assert len(waiting.policy._served) == 1


def test_a_request_keeps_the_level_at_which_it_was_admitted():
    waiting = Waiting()
    aged = waiting.add("aged", slo="batch", arrival=0.0)
    new = waiting.add("new", slo="batch", arrival=2 * AGEING_SECONDS)
    standard = waiting.add("standard", arrival=2 * AGEING_SECONDS)
    for _ in range(3):
        waiting.serve(2 * AGEING_SECONDS)
    assert [request.rank[0] for request in (aged, new, standard)] == [0, 2, 1]
    assert FairPolicy().victim([aged, standard, new]) is new
    assert FairPolicy().victim([aged, standard]) is standard


def test_computing_again_after_a_preemption_is_no_service():
    waiting = Waiting()
    request = waiting.add("a", tenant="a", num_prompt=100)
    waiting.policy.admitted(request, 0.0)
    before = dict(waiting.policy._served)
    waiting.policy.admitted(request, 1.0)
    assert waiting.policy._served == before


def test_the_victim_has_the_worst_rank():
    requests = [
        make_request("interactive", slo="interactive", arrival=9.0),
        make_request("batch", slo="batch", arrival=0.0),
        make_request("late batch", slo="batch", arrival=1.0),
        make_request("standard", arrival=5.0),
    ]
    assert FairPolicy().victim(requests).request_id == "late batch"
