"""Tests of the model policy: which limits follow from predictions, when they fall and when they rise."""

import pytest

from engine.scheduler.changes import LimitChanges
from engine.scheduler.chunks import FEWEST_SEQS, FEWEST_TOKENS, ROOM
from engine.scheduler.limits import Load, StepLimits, StepShape
from engine.scheduler.model_policy import HEADROOM, ModelPolicy
from engine.scheduler.step_cost import StepCost
from tests.unit.engine.scheduler.devices import H200

LARGEST = StepLimits(8192, 256, 8192)
LOAD = Load(decodes=60, kv_tokens=40_000, running=62, waiting=10, prompt_tokens=20_000, context=0, itl=0.05)


class Rig:
    def __init__(self, largest=LARGEST, table=H200) -> None:
        self.changes = LimitChanges(largest)
        self.cost = StepCost.of_size(largest.seqs, largest.tokens, table)
        self.policy = ModelPolicy(largest, self.cost, self.changes)

    def limits(self, now: float = 0.0, **load) -> StepLimits:
        return self.policy.limits(LOAD._replace(**load), now)

    def seconds(self, limits: StepLimits, **changes) -> float:
        load = LOAD._replace(**changes)
        tokens = limits.tokens - load.decodes
        return self.cost.predict(StepShape.with_chunk(load.decodes, load.kv_tokens, tokens, load.context))


@pytest.mark.parametrize("itl", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("context", [0, 5000, 100_000])
def test_a_step_keeps_the_tightest_target_and_uses_most_of_it(itl, context):
    rig = Rig()
    limits = rig.limits(itl=itl, context=context)
    assert 0.75 * itl < rig.seconds(limits, context=context) <= HEADROOM * itl
    assert limits.chunk == max(64, limits.tokens // 2)
    assert rig.changes.counts == {"predicted_over_target": 1}


@pytest.mark.parametrize("load", [{"itl": None}, {"decodes": 0, "kv_tokens": 0, "itl": None}])
def test_without_a_target_a_step_may_be_as_large_as_the_settings_say_and_that_is_no_change(load):
    rig = Rig()
    small = rig.limits(0.0)
    assert small.tokens < 2048
    assert rig.limits(0.1, **load)[:2] == (8192, 256)
    assert rig.limits(0.2) == small
    assert sum(rig.changes.counts.values()) == 1


def test_limits_fall_at_once_and_rise_later_and_with_a_margin():
    rig = Rig()
    wide = rig.limits(0.0, itl=0.1)
    tight = rig.limits(0.1, itl=0.02)
    assert tight.tokens < wide.tokens
    assert rig.limits(1.9, itl=0.1).tokens == tight.tokens
    risen = rig.limits(2.2, itl=0.1)
    assert tight.tokens < risen.tokens <= wide.tokens
    assert rig.changes.counts == {"predicted_over_target": 2, "predicted_under_target": 1}


def test_targets_that_come_and_go_change_the_limits_at_most_once_a_second():
    rig = Rig()
    for i in range(6000):
        rig.limits(i / 100, itl=(0.02, 0.1)[i // 7 % 2])
    assert sum(rig.changes.counts.values()) < 60 / 2


def test_a_load_that_swings_around_a_grid_point_does_not_change_the_limits():
    rig = Rig()
    for i in range(1000):
        rig.limits(i / 100, kv_tokens=40_000 + 1500 * (i % 2))
    assert sum(rig.changes.counts.values()) <= 2


def test_sequences_leave_a_part_of_the_step_to_prompts():
    rig = Rig()
    limits = rig.limits(decodes=64, kv_tokens=64 * 12_000)
    decodes = rig.cost.predict(StepShape(limits.seqs, limits.seqs * 12_000, 0, 0))
    assert limits.seqs in rig.cost.table.decode_rows
    assert 0.5 * 0.05 < decodes <= 0.9 * HEADROOM * 0.05
    assert Rig().limits().seqs == 256


def test_where_small_steps_take_most_of_the_target_steps_take_three_times_as_long():
    """The smallest steps would hardly keep the target, and prompts would wait many times longer."""
    rig = Rig()
    limits = rig.limits(itl=0.001, decodes=4, kv_tokens=2000)
    smallest = rig.cost.predict(StepShape(4, 2000, 16, 0))
    prompt_tokens = limits.tokens - 4
    assert 2.2 < rig.cost.predict(StepShape.with_chunk(4, 2000, prompt_tokens, 0)) / smallest <= 3
    assert limits.seqs == 256
    assert Rig(StepLimits(64, 2, 64)).limits(itl=0.001, decodes=2).seqs == 2


def test_a_target_that_leaves_room_beside_the_smallest_step_is_kept_however_many_wait():
    rig = Rig()
    smallest = rig.cost.predict(StepShape(FEWEST_SEQS, FEWEST_SEQS * 700, FEWEST_TOKENS, 0))
    itl = ROOM * smallest / HEADROOM * 1.01
    limits = rig.limits(itl=itl, decodes=4, kv_tokens=4 * 700, waiting=1000)
    assert rig.seconds(limits, decodes=4, kv_tokens=4 * 700) <= HEADROOM * itl


def test_larger_spread_leaves_more_room():
    rig = Rig()
    for i in range(400):
        shape = StepShape(60, 40_000, 0, 0)
        rig.cost.observe(shape, rig.cost.predict(shape) * (1.3 if i % 8 == 0 else 1.0))
        shape = StepShape.with_chunk(60, 40_000, 500, 0)
        rig.cost.observe(shape, rig.cost.predict(shape) * (1.3 if i % 8 == 0 else 1.0))
    assert rig.cost.spread > 1.2
    assert rig.limits().tokens < Rig().limits().tokens
