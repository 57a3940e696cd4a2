"""Watchdog."""

import asyncio

from server.supervise.watchdog import TICKS, Watchdog


async def test_it_calls_back_once_it_is_no_longer_fed():
    hungry = asyncio.Event()
    dog = Watchdog(0.02, hungry.set)
    dog.feed()
    await asyncio.wait_for(hungry.wait(), 10)


async def test_food_puts_it_off_and_stopping_ends_it():
    calls = []
    dog = Watchdog(3600.0, lambda: calls.append(1))
    dog.feed()
    for _ in range(TICKS - 1):
        dog._tick()
    dog.feed()
    for _ in range(TICKS - 1):
        dog._tick()
    assert calls == []
    dog._tick()
    assert calls == [1]
    dog.stop()
    assert dog._timer is None


async def test_it_does_nothing_before_it_is_fed():
    assert Watchdog(0.0, lambda: None)._timer is None
