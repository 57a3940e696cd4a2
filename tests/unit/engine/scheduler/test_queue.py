"""Tests of WaitingQueue: its lanes, their order, its sums, and the removal of a request."""

import pytest

from engine.errors import InternalError
from engine.scheduler.queue import WaitingQueue
from tests.unit.engine.scheduler.rig import make_request


def lanes(queue: WaitingQueue) -> list[list[str]]:
    return [[request.request_id for request in lane.requests] for lane in queue.lanes]


def test_each_tenant_and_class_has_a_lane_in_rank_order():
    queue = WaitingQueue()
    for name, tenant, slo, arrival in (
        ("a", "x", "standard", 2.0),
        ("b", "x", "standard", 1.0),
        ("c", "x", "batch", 0.0),
        ("d", "y", "standard", 0.0),
    ):
        queue.push(make_request(name, tenant=tenant, slo=slo, arrival=arrival))
    assert lanes(queue) == [["b", "a"], ["c"], ["d"]]
    assert [request.request_id for request in queue] == ["b", "a", "c", "d"]
    assert (len(queue), queue.best_class) == (4, 1)
    queue.check()


def test_a_preempted_request_returns_to_its_old_position():
    queue = WaitingQueue()
    requests = [make_request(name) for name in "abc"]
    for request in requests:
        queue.push(request)
    queue.remove(requests[0])
    queue.push(make_request("d"))
    queue.push(requests[0])
    assert lanes(queue) == [["a", "b", "c", "d"]]


def test_the_queue_counts_the_tokens_that_wait():
    queue = WaitingQueue()
    long, short = make_request("a", num_prompt=70), make_request("b", num_prompt=5)
    queue.push(long)
    queue.push(short)
    assert queue.num_tokens == 75
    queue.remove(long)
    assert queue.num_tokens == 5


def test_removing_a_request_that_is_not_in_the_queue_is_an_error():
    queue = WaitingQueue()
    request = make_request("a")
    queue.push(request)
    queue.remove(request)
    assert (len(queue), list(queue.lanes)) == (0, [])
    with pytest.raises(InternalError):
        queue.remove(request)
    queue.push(make_request("b"))
    with pytest.raises(InternalError):
        queue.remove(request)


def test_the_queue_says_what_waits_of_each_tenant():
    queue = WaitingQueue()
    requests = [
        make_request("a", num_prompt=70, tenant="x"),
        make_request("b", num_prompt=5, tenant="x", slo="batch"),
        make_request("c", num_prompt=9, tenant="y"),
    ]
    for request in requests:
        queue.push(request)
    assert [queue.held_by(tenant) for tenant in ("x", "y", "z")] == [(2, 75), (1, 9), (0, 0)]
    queue.remove(requests[0])
    assert queue.held_by("x") == (1, 5)
    queue.check()
