import asyncio
import contextlib

import pytest

from engine.errors import Aborted
from server.http.disconnect import while_connected


def client(*, leaves_after=None):
    async def receive():
        if leaves_after is None:
            await asyncio.Event().wait()
        await asyncio.sleep(leaves_after)
        return {"type": "http.disconnect"}

    return receive


async def test_work_that_ends_first_gives_its_result():
    async def work():
        await asyncio.sleep(0)
        return 7

    assert await while_connected(client(), work()) == 7


async def test_a_client_that_leaves_cancels_the_work_at_once():
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


async def test_the_works_own_error_goes_through():
    async def work():
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(client(), work())


async def test_cancelled_from_outside_stays_cancelled():
    task = asyncio.create_task(while_connected(client(), asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_watcher_is_left_behind():
    before = len(asyncio.all_tasks())
    for _ in range(20):
        await while_connected(client(), asyncio.sleep(0))
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before


@pytest.mark.parametrize("leaves_after", [0, 0.001])
async def test_leaving_at_the_moment_of_the_end_never_cancels_what_comes_after(leaves_after):
    for _ in range(200):
        with contextlib.suppress(Aborted):
            await while_connected(client(leaves_after=leaves_after), asyncio.sleep(leaves_after))
        await asyncio.sleep(0)
        assert asyncio.current_task().cancelling() == 0
