"""Tests of Link: what it learns from the blocks that come, and what it predicts."""

import pytest

from engine.kvcache.link import HALF_LIFE, MEMORY, TELLING, TELLING_SECONDS, Link


def measured(seconds: float) -> Link:
    """Return an idle link over which a block takes so many seconds. The time is 100."""
    link = Link()
    link.begin(TELLING, 100.0 - TELLING * seconds)
    link.end(TELLING, 100.0)
    return link


def test_an_unmeasured_link_is_believed_to_take_no_time():
    link = Link()
    link.begin(5, 0.0)
    assert link.predict(100, 50.0) == 0.0


def test_a_few_blocks_that_came_soon_tell_nothing_and_are_counted_until_they_do():
    link = Link()
    link.begin(TELLING, 0.0)
    for number in range(1, TELLING):
        link.end(1, number / 100)
        assert link.predict(1, number / 100) == 0.0
    link.end(1, TELLING / 100)
    assert link.predict(10, TELLING / 100) == pytest.approx(0.1)


def test_one_block_that_took_long_tells_so():
    link = Link()
    link.begin(1, 5.0)
    link.end(1, 5.0 + TELLING_SECONDS)
    assert link.predict(2, 5.0 + TELLING_SECONDS) == pytest.approx(2 * TELLING_SECONDS)


def test_the_time_in_which_nothing_was_under_way_does_not_count():
    link = Link()
    for began in (0.0, 100.0):
        link.begin(TELLING // 2, began)
        link.end(TELLING // 2, began + 0.04)
    assert link.predict(1, 100.04) == pytest.approx(0.08 / TELLING)
    assert link.seconds_busy == pytest.approx(0.08)
    assert link.num_blocks == TELLING


def test_later_measurements_count_for_less():
    link = measured(1.0)
    link.begin(TELLING, 100.0)
    link.end(TELLING, 100.0 + TELLING * 2.0)
    assert link.predict(1, 100.0 + TELLING * 2.0) == pytest.approx(1.0 + MEMORY)


def test_further_blocks_come_behind_those_under_way_unless_these_are_not_coming_any_more():
    link = measured(1.0)
    link.begin(6, 100.0)
    assert link.predict(4, 100.0) == pytest.approx(10.0)
    link.cancel(5)
    assert link.predict(4, 100.0) == pytest.approx(5.0)
    assert link.predict(0, 100.0) == 0.0


def test_a_link_that_was_slow_is_tried_again_after_a_while():
    link = measured(1.0)
    assert link.predict(8, 100.0 + HALF_LIFE) == pytest.approx(4.0)
    assert link.predict(8, 100.0 + 3 * HALF_LIFE) == pytest.approx(1.0)
