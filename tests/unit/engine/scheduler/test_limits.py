"""Tests of the limits of a step, of the shares of long and short prompts, and of requests that give up their places."""

import pytest

from engine.plan import StepPlan
from engine.request import Status
from engine.scheduler.limits import LONG_PAIRS, Load, StepLimits, StepShape
from engine.scheduler.policy import AGEING_SECONDS
from tests.unit.engine.scheduler.rig import Rig, slices


def test_each_step_keeps_the_limit_of_tokens_that_it_is_given():
    rig = Rig(budget=64)
    rig.add("a", 40)
    nums = []
    for tokens in (5, 1, 30):
        rig.limits = StepLimits(tokens=tokens, seqs=8, chunk=tokens)
        plan = rig.schedule()
        nums.append(plan.nums)
        rig.commit(plan)
    assert nums == [[5], [1], [30]]


def test_a_lower_limit_of_sequences_admits_nobody_and_preempts_nobody():
    rig = Rig()
    running = [rig.add(f"r{i}", 3, max_tokens=4) for i in range(4)]
    rig.step()
    rig.limits = StepLimits(tokens=64, seqs=2, chunk=64)
    waiting = rig.add("w", 3)
    for _ in range(3):
        plan = rig.schedule()
        assert (plan.num_decodes, waiting.status) == (4, Status.WAITING)
        rig.commit(plan)
    assert [request.status for request in running] == [Status.FINISHED] * 4
    rig.step()
    assert waiting.status is Status.RUNNING


def test_the_best_prompt_advances_though_decodes_take_all_tokens():
    rig = Rig(rows=4)
    for i in range(3):
        rig.add(f"r{i}", 1)
    rig.step()
    prompt = rig.add("p", 10)
    rig.limits = StepLimits(tokens=2, seqs=4, chunk=1)
    for computed in (1, 2, 3):
        rig.step()
        assert prompt.num_computed == computed


def test_a_short_prompt_does_not_wait_behind_a_long_one():
    rig = Rig(budget=64, blocks=1000)
    rig.limits = StepLimits(tokens=64, seqs=8, chunk=32)
    long = rig.add("long", 640)
    rig.step()
    short, medium = rig.add("short", 10), rig.add("medium", 60)
    plan = rig.schedule()
    # `short` is computed beside `long`. `medium` would not be finished in this step, so what is left goes to `long`.
    assert slices(plan) == [(short.row, 0, 10), (long.row, 64, 54)]
    assert (plan.samples, medium.status) == ([0], Status.WAITING)


def test_a_long_prompt_keeps_its_chunk_whatever_else_waits():
    rig = Rig(budget=64, blocks=1000, rows=50)
    rig.limits = StepLimits(tokens=64, seqs=50, chunk=32)
    long = rig.add("long", 320)
    rig.step()
    steps = 1
    while long.num_outputs == 0:
        for i in range(5):
            rig.add(f"short{steps}-{i}", 30, max_tokens=1)
        rig.step()
        steps += 1
    assert steps <= 10  # alone it takes 5


def test_the_first_that_waits_keeps_a_chunk_too():
    rig = Rig(budget=64, blocks=1000)
    rig.limits = StepLimits(tokens=64, seqs=8, chunk=32)
    long, other, short = rig.add("long", 200), rig.add("other", 200), rig.add("short", 20)
    assert slices(rig.schedule()) == [(short.row, 0, 20), (long.row, 0, 44)]
    assert other.status is Status.WAITING


def test_prompts_that_have_started_share_a_step_in_the_same_way():
    rig = Rig(budget=64, blocks=1000)
    first, second = rig.add("first", 100), rig.add("second", 80)
    rig.step()
    rig.limits = StepLimits(tokens=200, seqs=8, chunk=200)
    rig.scheduler.schedule(StepLimits(tokens=56, seqs=8, chunk=56))  # ends `first`, and begins `second`
    assert (first.num_computed, second.num_computed) == (100, 20)
    third = rig.add("third", 30)
    rig.limits = StepLimits(tokens=51, seqs=8, chunk=15)
    plan = rig.schedule()  # of the 50 tokens that one decode leaves, `second` keeps 15, so `third` fits beside it
    assert slices(plan)[1:] == [(third.row, 0, 30), (second.row, 20, 20)]


def test_a_full_batch_gives_up_the_latest_request_of_a_lower_class():
    rig = Rig(rows=3)
    early, late = rig.add("early", 3, slo="batch"), rig.add("late", 3, slo="batch")
    rig.add("standard", 3)
    rig.step()
    urgent = rig.add("urgent", 3, slo="interactive")
    rig.step()
    assert (urgent.status, early.status, late.status) == (Status.RUNNING, Status.RUNNING, Status.WAITING)
    rig.add("another batch", 3, slo="batch")
    rig.step()
    assert rig.scheduler.counts.num_preemptions == 1  # requests of one class do not displace each other


def test_blocks_are_given_up_too():
    rig = Rig(blocks=10, rows=4, prefix_caching=False)
    batch = [rig.add(f"b{i}", 14, slo="batch", max_tokens=20) for i in range(2)]
    rig.step()
    urgent = rig.add("urgent", 16, slo="interactive", max_tokens=20)
    rig.step()
    assert (urgent.status, batch[1].status) == (Status.RUNNING, Status.WAITING)


def test_nobody_gives_up_a_place_if_that_would_not_be_enough():
    rig = Rig(blocks=10, rows=4, prefix_caching=False)
    rig.add("first", 26, slo="interactive", max_tokens=5)
    batch = rig.add("batch", 6, slo="batch", max_tokens=5)
    rig.step()
    rig.add("urgent", 30, slo="interactive", max_tokens=2)
    rig.schedule()
    assert batch.status is Status.RUNNING
    assert rig.scheduler.counts.num_preemptions == 0


def test_blocks_that_several_share_are_freed_only_once():
    rig = Rig(blocks=20, rows=8)
    rig.add("first", 38, slo="interactive", max_tokens=5)  # 10 blocks
    prompt = list(range(10, 26))
    rig.add("b0", [*prompt, 1], slo="batch", max_tokens=3)
    rig.step()
    batch = [rig.add(f"b{i}", [*prompt, 1], slo="batch", max_tokens=3) for i in (1, 2)]
    rig.step()
    assert rig.scheduler.cache.num_used == 10 + 4 + 3  # together they hold 15, of which four blocks are shared
    rig.add("urgent", 42, slo="interactive", max_tokens=5)  # needs 11 blocks, and 10 could be free
    rig.step()
    assert [request.status for request in batch] == [Status.RUNNING] * 2
    assert rig.scheduler.counts.num_preemptions == 0


@pytest.mark.parametrize("chunk", [32, 64])
def test_a_higher_class_does_not_wait_for_the_prompt_of_a_lower_one(chunk):
    rig = Rig(budget=64, blocks=2000)
    rig.limits = StepLimits(tokens=64, seqs=8, chunk=chunk)
    batch = rig.add("batch", 900, slo="batch")
    rig.step()
    urgent = rig.add("urgent", 40, slo="interactive")
    rig.step()
    assert (urgent.num_outputs, batch.num_computed) == (1, 64 + 24)


def test_the_prompt_of_a_lower_class_goes_on_once_it_has_aged():
    rig = Rig(budget=64, blocks=2000)
    batch = rig.add("batch", 900, slo="batch")
    rig.step()
    rig.now = 2 * AGEING_SECONDS
    urgent = rig.add("urgent", 64, slo="interactive")
    rig.step()
    assert (urgent.num_outputs, batch.num_computed) == (0, 128)


@pytest.mark.parametrize("sibling", [False, True])
def test_nobody_takes_a_place_that_a_higher_class_takes_back_at_once(sibling):
    rig = Rig(budget=20, rows=2, blocks=400)
    rig.limits = StepLimits(tokens=20, seqs=2, chunk=10)
    first = rig.add("first", 200, slo="interactive")
    rig.step()
    # It cannot start yet: it waits for its sibling's prompt, or is too long to be computed beside the first prompt.
    prompt = list(first.tokens) if sibling else 200
    second = rig.add("second", prompt, slo="interactive", fork_of="first" if sibling else None)
    batch = rig.add("batch", 4, slo="batch")
    while second.status is Status.WAITING:
        rig.step()
    assert (batch.num_outputs, rig.scheduler.counts.num_preemptions) == (0, 0)


def test_a_request_of_a_lower_class_starts_if_there_is_a_place_for_all():
    rig = Rig(budget=20, rows=3, blocks=400)
    rig.limits = StepLimits(tokens=20, seqs=3, chunk=10)
    rig.add("first", 200, slo="interactive")
    second = rig.add("second", 200, slo="interactive")
    batch = rig.add("batch", 4, slo="batch")
    rig.step()
    assert (second.status, batch.status) == (Status.WAITING, Status.RUNNING)


def test_places_are_made_for_no_more_requests_than_a_step_can_begin():
    rig = Rig(rows=6, budget=64)
    for i in range(6):
        rig.add(f"b{i}", 3, slo="batch")
    rig.step()
    for i in range(6):
        rig.add(f"u{i}", 30, slo="interactive")
    rig.limits = StepLimits(tokens=36, seqs=6, chunk=36)
    rig.schedule()
    assert rig.scheduler.counts.num_preemptions == 2  # 36 tokens are one prompt and the beginning of another


def test_the_load_is_what_the_next_step_has_to_do():
    rig = Rig(budget=20)
    rig.add("a", 8, slo="batch")
    rig.step()
    rig.step()
    assert rig.scheduler.load() == Load(1, 9, running=1, waiting=0, prompt_tokens=0, context=0, itl=None)
    rig.add("b", 30)
    rig.step()
    rig.add("c", 7, slo="interactive")
    assert rig.scheduler.load() == Load(1, 10, running=2, waiting=1, prompt_tokens=11 + 7, context=19, itl=None)
    rig.scheduler.abort("c")
    rig.step()
    assert rig.scheduler.load().itl == 0.1  # "b" decodes now, and its class is standard


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        (StepPlan(1, rows=[0, 1], starts=[10, 4], nums=[1, 1], num_decodes=2), StepShape(2, 16, 0, 0)),
        (StepPlan(1, rows=[0], starts=[0], nums=[3]), StepShape(0, 0, 3, 1 + 2 + 3)),
        (StepPlan(1, rows=[0, 1], starts=[9, 5], nums=[1, 2], num_decodes=1), StepShape(1, 10 + 5, 2, 6 + 7)),
        # Two long chunks of 2**13 tokens, one of them behind as many.
        (
            StepPlan(1, rows=[0, 1], starts=[0, 8192], nums=[8192, 8192], num_decodes=0),
            StepShape(0, 8192, 16384, 2 * LONG_PAIRS, 2**25 + 2**12 - LONG_PAIRS + 2**26 + 2**25 + 2**12 - LONG_PAIRS),
        ),
    ],
)
def test_the_shape_of_a_step_counts_what_its_duration_depends_on(plan, shape):
    assert StepShape.of(plan) == shape
