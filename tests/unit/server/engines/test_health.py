"""Tests of EngineHealthTracker: which engines are fit for work. The tests set the clock."""

import pytest

from engine.messages import EngineStats
from server.engines.health import EngineHealthTracker


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_an_engine_that_sends_heartbeats_but_runs_no_step_is_unhealthy(clock):
    tracker = EngineHealthTracker(3.0, clock)
    for _ in range(4):
        tracker.record_heartbeat(EngineStats(step=4, running=1))
        assert tracker.why_unhealthy() is None
        clock.now += 1.0
    assert "step" in (tracker.why_unhealthy() or "")
    tracker.record_heartbeat(EngineStats(step=5, running=1))
    assert tracker.why_unhealthy() is None


def test_tokens_prove_that_a_step_ended(clock):
    tracker = EngineHealthTracker(3.0, clock)
    tracker.record_heartbeat(EngineStats(step=4, running=1))
    clock.now += 2.0
    tracker.record_step()
    clock.now += 2.0
    assert tracker.why_unhealthy() is None
    clock.now += 2.0
    assert "step" in (tracker.why_unhealthy() or "")


def test_an_idle_engine_is_judged_by_its_heartbeats(clock):
    tracker = EngineHealthTracker(30.0, clock)
    tracker.record_heartbeat(EngineStats(step=4))
    clock.now += 1.0
    assert tracker.why_unhealthy() is None
    clock.now += 1.5
    assert "heartbeat" in (tracker.why_unhealthy() or "")


def test_an_engine_that_prepares_may_be_silent_for_as_long_as_a_step(clock):
    tracker = EngineHealthTracker(5.0, clock)
    tracker.record_heartbeat(EngineStats(step=4), preparing=True)
    clock.now += 4.0
    assert tracker.why_unhealthy() is None
    clock.now += 1.5
    assert "heartbeat" in (tracker.why_unhealthy() or "")
    tracker.record_heartbeat(EngineStats(step=4))
    clock.now += 2.5
    assert "heartbeat" in (tracker.why_unhealthy() or "")
