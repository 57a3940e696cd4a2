"""Tests of Watchdog, which calls a function when a process has sent no sign of progress for some time."""

import asyncio

import pytest

from server.supervise.watchdog import Watchdog
from tests.support.manual_timers import ManualTimers

SECONDS = 8.0


async def test_it_calls_back_when_no_sign_of_progress_comes():
    silent = asyncio.Event()
    watchdog = Watchdog(silent.set)
    watchdog.expect(0.02)
    await asyncio.wait_for(silent.wait(), 10)


@pytest.mark.parametrize("signs", [[], [0.0], [0.25], [0.999], [1.0], [7.999], [0.5, 0.5], [7.5] * 10, [0.125] * 100])
async def test_each_sign_gives_the_whole_time_again(signs):
    """Each number in `signs` is the time from one sign to the next. The silence after the last sign lasts an eighth longer."""
    silences, timers = [], ManualTimers()
    watchdog = Watchdog(lambda: silences.append(timers.now), timers.call_later)
    watchdog.expect(SECONDS)
    for pause in signs:
        timers.advance(pause)
        watchdog.expect(SECONDS)
    last = timers.now
    timers.advance(2 * SECONDS)
    (silence,) = silences
    assert SECONDS <= silence - last <= SECONDS * 9 / 8


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
