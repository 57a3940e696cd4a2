"""Tests of CrashCount: which deaths of a child process count, and the pause before the next start."""

from server.supervise.crashes import FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, CrashCount

NEVER, AT_ONCE = 3600.0, 0.0


def test_deaths_add_up_until_work_was_done():
    crashes = CrashCount(NEVER)
    assert [crashes.died(), crashes.died()] == [1, 2]
    crashes.ready()
    assert crashes.died() == 3
    crashes.ready()
    crashes.served()
    assert crashes.died() == 1
    assert crashes.died() == 2


def test_the_death_of_a_stable_process_neither_counts_nor_resets_the_count():
    crashes = CrashCount(AT_ONCE)
    assert [crashes.died(), crashes.died()] == [1, 2]  # the process was never ready, so it was not stable
    crashes.ready()
    assert crashes.died() == 2
    assert crashes.died() == 3


def test_readiness_of_an_earlier_life_does_not_make_a_later_one_stable():
    crashes = CrashCount(AT_ONCE)
    crashes.ready()
    assert [crashes.died(), crashes.died(), crashes.died()] == [0, 1, 2]


def test_pauses_double_up_to_a_limit():
    crashes, pauses = CrashCount(NEVER), []
    for _ in range(10):
        crashes.died()
        pauses.append(crashes.pause_seconds)
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses[-1] == MAX_PAUSE_SECONDS
