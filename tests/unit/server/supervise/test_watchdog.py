"""Tests of Watchdog, which calls a function when a process has sent no sign of progress for some time."""

import asyncio

from server.supervise.watchdog import TICKS, Watchdog


async def test_it_calls_back_when_no_sign_of_progress_comes():
    silent = asyncio.Event()
    watchdog = Watchdog(silent.set)
    watchdog.expect(0.02)
    await asyncio.wait_for(silent.wait(), 10)


async def test_each_sign_gives_the_whole_time_again():
    calls = []
    watchdog = Watchdog(lambda: calls.append(1))
    watchdog.expect(3600.0)
    for _ in range(TICKS - 1):
        watchdog._tick()
    watchdog.expect(3600.0)
    for _ in range(TICKS - 1):
        watchdog._tick()
    assert calls == []
    watchdog._tick()
    assert calls == [1]


async def test_stopping_ends_it():
    watchdog = Watchdog(lambda: None)
    watchdog.expect(3600.0)
    watchdog.stop()
    assert watchdog._timer is None


async def test_a_shorter_time_takes_effect_at_once():
    """A child may be allowed less time between two progress reports once it is ready."""
    silent = asyncio.Event()
    watchdog = Watchdog(silent.set)
    watchdog.expect(3600.0)
    watchdog.expect(0.02)
    await asyncio.wait_for(silent.wait(), 10)


async def test_it_does_nothing_before_the_first_sign():
    assert Watchdog(lambda: None)._timer is None
