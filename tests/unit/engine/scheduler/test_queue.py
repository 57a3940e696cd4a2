"""Tests of WaitingQueue: the order of the waiting requests, and the removal of a request."""

import pytest

from engine.errors import InternalError
from engine.request import Request, SamplingParams
from engine.scheduler.queue import WaitingQueue


def make_request(name: str, priority: int = 0) -> Request:
    return Request(name, [1], SamplingParams(), num_prompt=1, seed=0, max_model_len=10, priority=priority)


def names(queue: WaitingQueue) -> list[str]:
    return [request.request_id for request in queue]


def test_requests_are_sorted_by_priority_then_by_arrival():
    queue = WaitingQueue()
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        queue.push(make_request(name, priority))
    assert names(queue) == ["d", "b", "e", "a", "c"]
    queue.check()


def test_a_preempted_request_returns_to_its_old_position():
    queue = WaitingQueue()
    requests = [make_request(name) for name in "abc"]
    for request in requests:
        queue.push(request)
    queue.remove(requests[0])
    queue.push(make_request("d"))
    queue.push(requests[0])
    assert names(queue) == ["a", "b", "c", "d"]


def test_removing_a_request_that_is_not_in_the_queue_is_an_error():
    queue = WaitingQueue()
    request = make_request("a")
    queue.push(request)
    queue.remove(request)
    assert len(queue) == 0
    with pytest.raises(InternalError):
        queue.remove(request)
