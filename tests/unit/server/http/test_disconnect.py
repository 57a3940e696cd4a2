"""Tests `while_connected`: it cancels work when the client of the work leaves, and only then."""

import asyncio
import contextlib

import pytest

from engine.errors import Aborted
from server.http.disconnect import while_connected


def client(leaves=None):
    """Return an ASGI `receive` function for a client that leaves when the event `leaves` is set. Without an event, the client
    stays."""

    async def receive():
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    return receive


async def iterations(number):
    """Wait for `number` iterations of the event loop."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_the_result_of_work_that_ends_before_the_client_leaves_is_returned():
    async def work():
        await asyncio.sleep(0)
        return 7

    assert await while_connected(client(), work()) == 7


async def test_the_work_is_cancelled_when_the_client_leaves():
    ended = []
    leaves = asyncio.Event()

    async def work():
        try:
            leaves.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(Aborted):
        await asyncio.wait_for(while_connected(client(leaves), work()), 5)
    assert ended == [True]
    assert asyncio.current_task().cancelling() == 0


async def test_an_error_of_the_work_is_raised():
    async def work():
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(client(), work())


async def test_a_cancellation_by_another_task_stays_a_cancellation():
    begun = asyncio.Event()

    async def work():
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(while_connected(client(), work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_task_is_left_running():
    before = len(asyncio.all_tasks())
    for _ in range(20):
        await while_connected(client(), asyncio.sleep(0))
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before


@pytest.mark.parametrize("work_iterations", range(6))
@pytest.mark.parametrize("client_iterations", range(6))
async def test_a_client_that_leaves_just_as_the_work_ends_cancels_nothing_else(work_iterations, client_iterations):
    leaves = asyncio.Event()

    async def leave():
        await iterations(client_iterations)
        leaves.set()

    leaving = asyncio.create_task(leave())
    with contextlib.suppress(Aborted):
        await while_connected(client(leaves), iterations(work_iterations))
    await leaving
    await iterations(3)
    assert asyncio.current_task().cancelling() == 0
