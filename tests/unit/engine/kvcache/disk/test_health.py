"""Tests when the disk tier turns off, why, and when it tries again. The clock is the test's."""

from pathlib import Path

import pytest

from engine.kvcache.disk.health import SLOW_READS, Health
from engine.kvcache.disk.outcome import BAD_RECORD, DISK_FAULT, Outcome
from engine.kvcache.disk.settings import DiskSettings
from tests.support.clock import Clock

SETTINGS = DiskSettings(folder=Path("/kv"), max_bytes=1, slow_read=1.0, retry=5.0, max_retry=30.0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    return Health(SETTINGS, clock)


@pytest.mark.parametrize("fault", sorted(DISK_FAULT))
def test_a_fault_of_the_disk_turns_it_off_with_its_reason(health, fault):
    health.note(fault)
    assert not health.is_on
    assert health.reason is fault
    assert health.outages == {fault: 1}


@pytest.mark.parametrize("outcome", [*sorted(BAD_RECORD), Outcome.OK, Outcome.OFF])
def test_what_is_no_fault_of_the_disk_does_not(health, outcome):
    for _ in range(10):
        health.note(outcome, 0.5)
    assert health.is_on


def test_slow_reads_in_a_row_turn_it_off_and_single_ones_do_not(health):
    for _ in range(5):
        for _ in range(SLOW_READS - 1):
            health.note(Outcome.OK, 1.1)
        health.note(Outcome.OK, 0.9)
    assert health.is_on
    for _ in range(SLOW_READS):
        health.note(Outcome.OK, 1.1)
    assert health.reason is Outcome.SLOW


def test_a_read_that_does_not_end_turns_it_off(health):
    health.note_running(SLOW_READS * 1.0)
    assert health.is_on
    health.note_running(SLOW_READS * 1.0 + 0.1)
    assert health.reason is Outcome.SLOW


def waits(health, clock, outcomes):
    """Return the seconds until each attempt, of which each ends with one of `outcomes`."""
    found = []
    for outcome in outcomes:
        began = clock.now
        while not health.is_due:
            clock.now += 0.5
        found.append(clock.now - began)
        if outcome is Outcome.OK:
            health.turn_on()
        else:
            health.turn_off(outcome)
    return found


def test_attempts_come_at_twice_the_time_up_to_a_bound(health, clock):
    health.note(Outcome.READ_ONLY)
    assert waits(health, clock, [Outcome.READ_ONLY] * 5) == [5, 10, 20, 30, 30]
    assert health.outages == {Outcome.READ_ONLY: 1}


def test_a_disk_that_fails_again_at_once_waits_longer_and_one_that_worked_for_long_does_not(health, clock):
    health.note(Outcome.IO_ERROR)
    assert waits(health, clock, [Outcome.OK]) == [5]
    clock.now += 1
    health.note(Outcome.IO_ERROR)
    assert waits(health, clock, [Outcome.OK]) == [10]
    clock.now += 10
    health.note(Outcome.IO_ERROR)
    assert waits(health, clock, [Outcome.OK]) == [5]
    assert health.outages == {Outcome.IO_ERROR: 3}


def test_faults_while_it_is_off_do_not_put_off_the_attempt(health, clock):
    health.note(Outcome.IO_ERROR)
    clock.now = 4.0
    health.note(Outcome.IO_ERROR)
    clock.now = 5.0
    assert health.is_due


def test_the_log_has_one_line_for_each_change(health, clock, caplog):
    caplog.set_level("INFO")
    health.note(Outcome.DISK_FULL)
    health.note(Outcome.DISK_FULL)
    waits(health, clock, [Outcome.DISK_FULL, Outcome.READ_ONLY, Outcome.OK])
    assert [record.message for record in caplog.records] == [
        "the disk tier is off: disk full",
        "the disk tier is off: read only",
        "the disk tier is on again",
    ]
    assert {record.folder for record in caplog.records} == {"/kv"}
