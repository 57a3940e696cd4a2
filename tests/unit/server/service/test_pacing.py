import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import TokenLogprobs
from server.service.pacing import SLICE, Backlog, Pacer, slices


def work(log, name, num_slices):
    """A generator for a Pacer: it appends (name, i) to `log` in slice i, and yields between two slices."""
    for i in range(num_slices):
        if i:
            yield
        log.append((name, i))


async def test_work_of_one_slice_runs_without_a_pause():
    log = []
    asyncio.get_running_loop().call_soon(log.append, "another task")
    await Pacer().run(work(log, "a", 1))
    assert log == [("a", 0)]


async def test_another_task_runs_between_two_slices():
    log = []

    async def other():
        while True:
            log.append("another task")
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await Pacer().run(work(log, "a", 5))
    task.cancel()
    slices_at = [i for i, entry in enumerate(log) if entry != "another task"]
    assert len(slices_at) == 5
    assert all(before + 1 < after for before, after in itertools.pairwise(slices_at))


async def test_requests_take_one_slice_in_turn_and_one_per_loop_iteration():
    log, pacer = [], Pacer()

    async def tick():
        while True:
            log.append("tick")
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    await asyncio.gather(*(pacer.run(work(log, name, 4)) for name in "abc"))
    ticker.cancel()
    ran = [entry for entry in log if entry != "tick"]
    assert ran[:3] == [("a", 0), ("b", 0), ("c", 0)]  # a first slice runs at once
    for i in range(3, len(ran), 3):
        assert {name for name, _ in ran[i : i + 3]} == set("abc")
    later = log[log.index(("c", 0)) + 1 :]
    assert not any(a != "tick" and b != "tick" for a, b in itertools.pairwise(later))


async def test_an_error_in_a_slice_lets_other_requests_go_on():
    log, pacer = [], Pacer()

    def broken():
        yield
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it is ours, and has no text
        await pacer.run(broken())
    await asyncio.wait_for(pacer.run(work(log, "a", 3)), 5)
    assert len(log) == 3


async def test_a_request_that_is_cancelled_lets_other_requests_go_on():
    log, pacer = [], Pacer()
    task = asyncio.create_task(pacer.run(work(log, "a", 10**9)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(log) >= 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.wait_for(pacer.run(work(log, "b", 3)), 5)
    assert [entry for entry in log if entry[0] == "b"] == [("b", 0), ("b", 1), ("b", 2)]


@pytest.mark.parametrize(("limit", "work_each", "pauses"), [(10, 1, 3), (10, 10, 30), (10, 25, 30), (31, 1, 0)])
def test_a_backlog_is_due_once_its_limit_is_reached(limit, work_each, pauses):
    backlog = Backlog(limit)
    assert sum(backlog.is_due(work_each) for _ in range(30)) == pauses


@given(st.lists(st.none() | st.integers(0, 20), max_size=400))
def test_slices_are_all_the_positions_in_order_and_none_is_much_too_long(tops):
    positions = [None if top is None else TokenLogprobs(i, -1.0, 1, [0] * top, [-1.0] * top) for i, top in enumerate(tops)]
    parts = list(slices(positions))
    assert [position for part in parts for position in part] == positions
    sizes = [sum(1 if p is None else 1 + len(p.top_ids) for p in part) for part in parts]
    assert all(size < SLICE + 21 for size in sizes)
    assert all(size >= SLICE for size in sizes[:-1])
