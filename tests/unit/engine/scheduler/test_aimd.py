"""Tests of the AIMD policy on simulated devices, beside the bare rule that it improves on."""

import random

import pytest

from engine.config import BatchingConfig
from engine.scheduler.aimd import AimdPolicy
from engine.scheduler.changes import LimitChanges
from engine.scheduler.limits import Load, StepLimits, StepShape
from tests.unit.engine.scheduler.devices import CLIFF, CPU, H200, Device, scaled
from tests.unit.engine.scheduler.simulated import Job, SimulatedServer, chat_jobs, step_percentile

LARGEST = StepLimits(8192, 256, 8192)
LONG = 0.05


class Aimd(AimdPolicy):
    """The policy alone, with the limits that it has published."""

    def __init__(self, largest: StepLimits = LARGEST, **batching) -> None:
        self.published = LimitChanges(largest)
        super().__init__(largest, BatchingConfig(**batching), self.published)


class BareRule:
    """The rule without hysteresis: every tenth of a second, halve after a step over 50 ms and double after one under 30 ms."""

    def __init__(self) -> None:
        self.present = StepLimits(8192, 4, 8192)
        self._seconds, self._changed_at = 0.04, 0.0

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        self._seconds = seconds

    def limits(self, load: Load, now: float) -> StepLimits:
        factor = 0.5 if self._seconds > LONG else 2 if self._seconds < 0.03 else 1
        if now - self._changed_at >= 0.1 and factor != 1:
            self.present = self.present._replace(seqs=int(min(64, max(4, self.present.seqs * factor))))
            self._changed_at = now
        return self.present


def many_answers() -> list[Job]:
    """Return more requests than any batch can take, with short prompts and answers of 50 to 150 tokens."""
    rng = random.Random(1)
    return [Job(16, rng.randrange(50, 150), i / 1000) for i in range(4000)]


def served(controller, table, jobs, until, **device) -> SimulatedServer:
    server = SimulatedServer(controller, Device(table, **{"outliers": 0.0} | device))
    server.run(jobs, until)
    return server


def share_over(server: SimulatedServer, since: float) -> float:
    steps = [step for step in server.steps if step.at >= since]
    return sum(step.seconds > LONG for step in steps) / len(steps)


def test_the_bare_rule_oscillates_where_this_policy_settles():
    """Half of the batch takes 20 ms and all of it 60 ms, so the bare rule finds no rest."""
    bare = served(BareRule(), CLIFF, many_answers(), 60)
    aimd = served(Aimd(), CLIFF, many_answers(), 60)
    assert len([at for at, _ in bare.changes if at > 15]) > 20
    assert share_over(bare, 15) > 0.3
    assert len([at for at, _ in aimd.changes if at > 15]) <= 2
    assert share_over(aimd, 15) < 0.01
    assert aimd.changes[-1][1].seqs == 20  # the largest batch before the jump


def test_a_busy_device_gets_all_sequences_within_a_second():
    server = served(Aimd(), H200, many_answers(), 5)
    at, limits = server.changes[-1]
    assert limits.seqs == 64
    assert at < 1
    assert [limits.seqs for _, limits in server.changes] == [8, 16, 32, 64]


def test_sequences_that_do_not_wait_are_no_reason_to_grow():
    server = served(Aimd(), H200, [Job(16, 500, 0.0) for _ in range(4)], 5)
    assert server.changes == []


def test_long_decode_steps_halve_the_sequences_and_a_batch_that_drains_is_not_cut_again():
    policy = Aimd()
    policy.start_at(StepLimits(512, 64, 256), 0.0)
    now, load = 0.0, Load(decodes=64, kv_tokens=0, running=64, waiting=10, prompt_tokens=0, context=0, itl=None)
    for _ in range(20):
        now += 0.08
        policy.observe(StepShape(64, 0, 0, 0), 0.08, now)
        limits = policy.limits(load, now)
    assert (limits.seqs, policy.published.last_reason) == (32, "decode_steps_long")
    for _ in range(20):
        now += 0.08
        policy.observe(StepShape(32, 0, 0, 0), 0.08, now)
        limits = policy.limits(load._replace(decodes=32, running=32), now)
    assert limits.seqs == 16  # one cut more, now that no more run than the limit allows


@pytest.mark.parametrize("pauses", [1, 2])
def test_one_or_two_pauses_cut_nothing(pauses):
    policy, load = Aimd(), Load(decodes=4, kv_tokens=0, running=4, waiting=0, prompt_tokens=0, context=0, itl=None)
    for i in range(40):
        seconds = 2.0 if 20 <= i < 20 + pauses else 0.04
        policy.observe(StepShape(4, 0, 0, 0), seconds, i * 0.04)
        policy.limits(load, i * 0.04)
    assert policy.published.counts == {}


def test_long_steps_with_prompts_cut_the_tokens_and_not_the_sequences():
    policy, load = Aimd(), Load(decodes=4, kv_tokens=0, running=8, waiting=8, prompt_tokens=9000, context=0, itl=None)
    policy.start_at(StepLimits(512, 16, 256), 0.0)
    for i in range(6):
        policy.observe(StepShape(4, 0, 508, 0), 0.3, i * 0.3)
        limits = policy.limits(load, i * 0.3)
    assert limits == StepLimits(64, 16, 64)  # three halvings of 300 ms are below 50 ms
    assert policy.published.counts == {"policy": 1, "prompt_steps_long": 1}


def test_on_a_slow_cpu_steps_become_short_within_three_seconds():
    server = served(Aimd(StepLimits(512, 64, 512)), CPU, chat_jobs(lambda _: 1.0, 50, mu=4.5), 50)
    assert max(step.seconds for step in server.steps) > LONG
    assert step_percentile([step for step in server.steps if step.at > 3], 0.99) < LONG
    assert len([at for at, _ in server.changes if at > 3]) <= 3


def test_prompts_advance_beside_more_decodes_than_the_token_limit():
    policy, load = Aimd(), Load(decodes=100, kv_tokens=0, running=101, waiting=0, prompt_tokens=500, context=0, itl=None)
    policy.start_at(StepLimits(16, 64, 16), 0.0)
    assert policy.limits(load, 0.0).tokens == 116
    small = Aimd(StepLimits(108, 64, 108))
    small.start_at(StepLimits(16, 64, 16), 0.0)
    assert small.limits(load, 0.0).tokens == 108  # what the settings allow


def test_sequences_are_cut_if_steps_are_long_although_prompts_have_the_least():
    policy = Aimd()
    policy.start_at(StepLimits(16, 64, 16), 0.0)
    load = Load(decodes=60, kv_tokens=0, running=64, waiting=9, prompt_tokens=900, context=0, itl=None)
    for i in range(8):
        policy.observe(StepShape(60, 0, 16, 0), 0.09, i * 0.09)
        limits = policy.limits(load, i * 0.09)
    assert limits.seqs == 32


def test_a_load_of_prompts_alone_may_still_raise_the_sequences():
    """Prompts fill every step up to 40 ms, so that no step of decodes shows that more of them would do no harm."""
    policy = Aimd()
    load = Load(decodes=4, kv_tokens=0, running=4, waiting=50, prompt_tokens=90_000, context=0, itl=None)
    for i in range(100):
        policy.observe(StepShape(4, 0, 508, 0), 0.04, i * 0.04)
        limits = policy.limits(load, i * 0.04)
    assert 5 <= limits.seqs <= 8
    assert limits.tokens == 512


def test_bounds_are_the_settings_and_those_of_the_engine():
    assert Aimd(StepLimits(8192, 2, 8192)).present.seqs == 2
    server = served(Aimd(min_batch=2, max_batch=6), H200, many_answers(), 3)
    assert server.changes[-1][1].seqs == 6
    slow = served(Aimd(min_batch=3, max_batch=64), scaled(H200, 20), many_answers(), 20)
    assert slow.changes == [] or slow.changes[-1][1].seqs == 3
