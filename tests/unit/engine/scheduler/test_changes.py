"""Tests of LimitChanges: changes are counted by reason, and logged at most once a second."""

import logging

from engine.scheduler.changes import LimitChanges
from engine.scheduler.limits import StepLimits

FIRST, SECOND = StepLimits(512, 8, 256), StepLimits(256, 8, 128)


def test_changes_are_counted_by_reason_and_the_same_limits_are_no_change():
    changes = LimitChanges(FIRST)
    changes.set(FIRST, "prompt_steps_long", 0.0)
    assert (changes.counts, changes.last_reason) == ({}, None)
    changes.set(SECOND, "prompt_steps_long", 1.0)
    changes.set(FIRST, "prompt_steps_short", 2.0)
    assert (changes.present, changes.counts, changes.last_reason) == (
        FIRST,
        {"prompt_steps_long": 1, "prompt_steps_short": 1},
        "prompt_steps_short",
    )


def test_a_log_line_a_second_has_the_reason_both_limits_and_the_number_of_silent_changes(caplog):
    changes = LimitChanges(FIRST)
    with caplog.at_level(logging.INFO):
        for i in range(10):
            changes.set((SECOND, FIRST)[i % 2], "prompt_steps_long", 10.0 + i * 0.15)
    first, second = caplog.records
    assert (first.reason, first.tokens_old, first.tokens_new, first.seqs_new, first.chunk_new) == (
        "prompt_steps_long",
        512,
        256,
        8,
        128,
    )
    assert not hasattr(first, "changes_not_logged")
    assert second.changes_not_logged == 6
