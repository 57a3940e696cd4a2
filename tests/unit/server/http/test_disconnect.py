"""`while_connected`: work is cancelled when its client leaves, and only then."""

import asyncio
import contextlib

import pytest

from engine.errors import Aborted
from server.http.disconnect import while_connected


def client(*, leaves_after=None):
    """The `receive` of a client that leaves after so many seconds, or never."""

    async def receive():
        if leaves_after is None:
            await asyncio.Event().wait()
        await asyncio.sleep(leaves_after)
        return {"type": "http.disconnect"}

    return receive


async def test_the_result_of_work_that_ends_before_the_client_leaves_is_returned():
    async def work():
        await asyncio.sleep(0)
        return 7

    assert await while_connected(client(), work()) == 7


async def test_the_work_is_cancelled_at_once_when_the_client_leaves():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(Aborted):
        await asyncio.wait_for(while_connected(client(leaves_after=0.01), work()), 2)
    assert ended == [True]
    assert asyncio.current_task().cancelling() == 0


async def test_an_error_of_the_work_is_raised():
    async def work():
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(client(), work())


async def test_a_cancellation_by_another_task_stays_a_cancellation():
    task = asyncio.create_task(while_connected(client(), asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_task_is_left_running():
    before = len(asyncio.all_tasks())
    for _ in range(20):
        await while_connected(client(), asyncio.sleep(0))
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before


@pytest.mark.parametrize("leaves_after", [0, 0.001])
async def test_a_client_that_leaves_just_as_the_work_ends_cancels_nothing_else(leaves_after):
    for _ in range(200):
        with contextlib.suppress(Aborted):
            await while_connected(client(leaves_after=leaves_after), asyncio.sleep(leaves_after))
        await asyncio.sleep(0)
        assert asyncio.current_task().cancelling() == 0
