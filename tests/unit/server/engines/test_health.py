"""Pulse: which engines are fit for work, by a clock that the test sets."""

from types import SimpleNamespace

import pytest

from engine.messages import EngineStats
from server.engines.health import Pulse


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("server.engines.health.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_an_engine_that_beats_but_does_not_step_is_not_fit(clock):
    pulse = Pulse(stall_timeout=3.0)
    for _ in range(4):
        pulse.beat(EngineStats(step=4, running=1))
        assert pulse.reason() is None
        clock.now += 1.0
    assert "step" in (pulse.reason() or "")
    pulse.beat(EngineStats(step=5, running=1))
    assert pulse.reason() is None


def test_an_idle_engine_is_judged_by_its_heartbeats(clock):
    pulse = Pulse(stall_timeout=30.0)
    pulse.beat(EngineStats(step=4))
    clock.now += 1.0
    assert pulse.reason() is None
    clock.now += 1.5
    assert "heartbeat" in (pulse.reason() or "")


def test_an_engine_that_prepares_may_take_as_long_as_a_step(clock):
    pulse = Pulse(stall_timeout=5.0)
    pulse.beat(EngineStats(step=4), preparing=True)
    clock.now += 4.0
    assert pulse.reason() is None
    clock.now += 1.5
    assert "heartbeat" in (pulse.reason() or "")
    pulse.beat(EngineStats(step=4))
    clock.now += 2.5
    assert "heartbeat" in (pulse.reason() or "")
