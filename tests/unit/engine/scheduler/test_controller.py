"""Tests of the controllers on simulated devices: which policy holds when, step times, settling, and facts for metrics."""

import logging
import random

import pytest

from engine.config import BatchingConfig, EngineConfig, ModelLimits, SchedulerConfig, resolve
from engine.scheduler.changes import REASONS
from engine.scheduler.controller import make_controller
from engine.scheduler.limits import Load, StepLimits, StepShape
from engine.scheduler.step_cost import StepCost
from tests.unit.engine.scheduler.devices import CPU, FLAT, H200, LAPTOP, ColdDevice, CompilingDevice, Device, chat_steps, scaled
from tests.unit.engine.scheduler.simulated import Job, SimulatedServer, chat_jobs, step_percentile

LIMITS = ModelLimits(max_model_len=200_000, vocab_size=10, eos_token_ids=(), dtype="float32")
BUSY = Load(decodes=50, kv_tokens=30_000, running=52, waiting=5, prompt_tokens=5000, context=0, itl=0.05)


def make(policy="auto", *, table=None, seqs=256, tokens=8192, offline=False, **batching):
    """Return a controller and the StepCost that it learns, which starts from `table`."""
    config = EngineConfig(
        model="m",
        scheduler=SchedulerConfig(max_num_seqs=seqs, max_step_tokens=tokens),
        batching=BatchingConfig(policy=policy, **batching),
        offline=offline,
    )
    cost = StepCost.of_size(seqs, tokens, table)
    return make_controller(resolve(config, LIMITS, has_cuda=False), cost), cost


def served(controller, table, jobs, until, **device) -> SimulatedServer:
    server = SimulatedServer(controller, Device(table, **{"outliers": 0.0} | device))
    server.run(jobs, until)
    return server


def changes_between(server: SimulatedServer, begin: float, end: float) -> int:
    return sum(begin <= at < end for at, _ in server.changes)


def test_fixed_limits_are_those_of_the_settings_whatever_happens():
    controller, cost = make("fixed", tokens=2048, seqs=100)
    for now in range(50):
        controller.observe(StepShape(50, 9000, 500, 500), 10.0, float(now))
        assert controller.limits(BUSY, float(now)) == StepLimits(2048, 100, 2048)
    assert (controller.policy, dict(controller.changes), controller.last_reason) == ("fixed", {}, None)
    assert cost.predict(StepShape(50, 9000, 500, 500)) == pytest.approx(10.0)  # admission asks it, whatever the policy


@pytest.mark.parametrize("policy", ["auto", "aimd"])
def test_an_offline_engine_is_fixed_and_learns_nothing(policy):
    controller, cost = make(policy, offline=True)
    for _ in range(50):
        controller.observe(StepShape(50, 9000, 0, 0), 10.0, 0.0)
    assert controller.policy == "fixed"
    assert cost.predict(StepShape(50, 9000, 0, 0)) == 0


@pytest.mark.parametrize(
    ("policy", "table", "expected"),
    [("auto", None, "aimd"), ("auto", H200, "model"), ("aimd", H200, "aimd"), ("model", H200, "model")],
)
def test_the_policy_at_the_start(policy, table, expected):
    path = {"cost_file": "some.json"} if policy == "model" else {}
    assert make(policy, table=table, **path)[0].policy == expected


def test_the_model_takes_over_once_the_costs_are_learnt_and_aimd_while_they_are_wrong(caplog):
    controller, cost = make("auto")
    load, now = BUSY, 0.0
    policies = []
    with caplog.at_level(logging.INFO, "engine.scheduler.controller"):
        for device in (Device(H200), Device(scaled(H200, 4))):
            for shape in chat_steps(400):
                seconds = device.seconds(shape)
                now += seconds
                controller.observe(shape, seconds, now)
                controller.limits(load, now)
                policies += [controller.policy] if policies[-1:] != [controller.policy] else []
    assert policies == ["aimd", "model", "aimd", "model"]
    switches = [record for record in caplog.records if record.message == "policy of the batch changed"]
    assert [record.policy for record in switches] == ["model", "aimd", "model"]
    assert controller.changes["policy"] >= 1
    assert cost.trusted


@pytest.mark.parametrize("table", [FLAT, H200], ids=["flat", "h200"])
@pytest.mark.parametrize("itl", [0.05, 0.1])
def test_a_burst_gets_its_places_although_few_prompts_have_run(table, itl):
    """256 streams begin at once, and the first of them end after 400 steps. Until then there is no further prompt."""
    jobs = [Job(6, 400, 0.0, itl) for _ in range(256)]
    server = served(make("auto")[0], table, jobs, 30)
    first = next(step for step in server.steps if step.shape.decodes == 256)
    assert server.steps.index(first) < 60
    fixed = served(make("fixed")[0], table, jobs, 30)
    assert len(server.done) == len(fixed.done) == 256
    assert max(job.last_at for job in server.done) < 1.1 * max(job.last_at for job in fixed.done)


def test_tokens_follow_aimd_while_only_decodes_are_known():
    controller, cost = make("auto")
    for step in range(30):
        shape = StepShape(8, 4000, 0, 0) if step else StepShape(0, 0, 500, 125_000)
        controller.observe(shape, H200.predict(shape), step / 100)
        limits = controller.limits(BUSY, step / 100)
    assert (controller.policy, cost.trusted) == ("model", False)
    assert limits.seqs > 64
    assert limits.tokens == controller.present.tokens == 512
    assert controller.limits(BUSY._replace(itl=None), 1.0).tokens == 512  # nothing is promised, and yet nothing is known
    for step in range(8):  # these steps are too long
        shape = StepShape(50, 30_000, 450, 100_000)
        controller.observe(shape, 0.07, 1 + step / 10)
        limits = controller.limits(BUSY, 1 + step / 10)
    assert controller.present.tokens < 512
    assert limits.tokens <= 50 + 16
    assert controller.changes["prompt_steps_long"] == 1


@pytest.mark.parametrize("make_device", [ColdDevice, CompilingDevice])
def test_a_server_whose_first_steps_are_slow_gets_the_limits_of_one_that_was_warm(make_device):
    jobs = chat_jobs(lambda _: 25, 12)
    cold, warm = (SimulatedServer(make("auto")[0], device(H200, outliers=0.0)) for device in (make_device, Device))
    for server in (cold, warm):
        server.run(jobs, 14)
    assert cold.controller.policy == "model"
    assert cold.controller.present.seqs == warm.controller.present.seqs == 256
    assert cold.controller.present.tokens >= 0.7 * warm.controller.present.tokens
    assert changes_between(cold, 6, 14) <= 3


def test_a_wrong_table_leaves_the_first_tokens_of_aimd_and_not_all():
    controller, _ = make("auto", table=H200)
    now = 0.0
    for shape in list(chat_steps(60)):
        now += 0.1
        controller.observe(shape, 5 * H200.predict(shape), now)
        limits = controller.limits(BUSY, now)
    assert controller.policy == "aimd"
    assert limits.tokens <= 512
    assert limits.seqs <= 64


@pytest.mark.parametrize("table", [H200, None], ids=["seeded", "cold"])
def test_a_step_of_load_keeps_steps_short_and_settles_within_three_seconds(table):
    """10 requests a second become 40 and 10 again. No request is promised more than 50 ms between tokens, and none gets less."""
    controller, _ = make("auto", table=table)
    jobs = chat_jobs(lambda now: 40 if 10 <= now < 20 else 10, 30)
    server = served(controller, H200, jobs, 32)
    for begin, end in ((3, 10), (10, 20), (20, 32)):
        steps = [step for step in server.steps if begin <= step.at < end]
        assert step_percentile(steps, 0.99) < 0.05
        assert step_percentile(steps, 1) < 0.055
    for begin, end in ((4, 10), (13, 20), (23, 32)):
        assert changes_between(server, begin, end) <= (end - begin) / 2


def test_without_limits_the_same_load_has_long_steps():
    fixed = served(make("fixed")[0], H200, chat_jobs(lambda now: 40 if 10 <= now < 20 else 10, 20), 20)
    assert step_percentile([step for step in fixed.steps if step.at >= 10], 0.99) > 0.05


def test_aimd_keeps_its_own_bounds_under_a_step_of_load():
    server = served(make("aimd")[0], H200, chat_jobs(lambda now: 30 if 10 <= now < 20 else 10, 30), 32)
    assert step_percentile([step for step in server.steps if step.at > 3], 0.99) < 0.05
    assert changes_between(server, 3, 10) + changes_between(server, 13, 32) <= 5


def test_limits_change_at_most_once_a_second_under_a_steady_load_with_noise_and_pauses():
    for table in (H200, None):
        server = served(make("auto", table=table)[0], H200, chat_jobs(lambda _: 25, 30), 30, noise=0.1, outliers=0.002)
        seconds = [int(at) for at, _ in server.changes if at > 5]
        assert len(seconds) <= 10
        assert max((seconds.count(second) for second in seconds), default=0) <= 2


def test_a_cpu_that_takes_300_ms_for_all_tokens_keeps_its_target_too():
    for table in (CPU, None):
        server = served(make("auto", table=table, seqs=64, tokens=512)[0], CPU, chat_jobs(lambda _: 1.0, 40, mu=4.5), 40)
        assert step_percentile([step for step in server.steps if step.at > 3], 0.99) < 0.05
        assert len(server.done) > 10


def test_a_long_prompt_beside_64_streams_delays_neither_them_nor_itself_much():
    streams = [Job(300, 4000, i / 100) for i in range(64)]
    alone = served(make("fixed")[0], H200, [Job(100_000, 8, 0.0)], 20).done[0].first_at
    server = served(make("auto", table=H200)[0], H200, [*streams, Job(100_000, 8, 3.0)], 20)
    steps = [step for step in server.steps if step.at > 3]
    assert step_percentile(steps, 0.99) < 0.05
    long = next(job for job in server.done if job.prompt == 100_000)
    assert long.first_at - 3 < 1.5 * alone


@pytest.mark.parametrize(("policy", "table"), [("auto", H200), ("auto", None), ("aimd", None)])
def test_prompts_advance_although_the_target_cannot_be_kept(policy, table):
    """A decode step alone takes four times the target."""
    slow = scaled(H200, 60)
    server = served(make(policy, table=table and slow)[0], slow, [Job(200, 20, 0.0, itl=0.01) for _ in range(12)], 200)
    assert len(server.done) == 12


def test_the_reasons_of_changes_are_the_listed_ones():
    seen = set()
    for policy, table, rate in (("auto", H200, 20), ("auto", None, 20), ("aimd", None, 60)):
        controller = served(make(policy, table=table)[0], H200, chat_jobs(lambda _, rate=rate: rate, 10), 12).controller
        seen |= set(controller.changes)
        assert controller.last_reason in controller.changes
        assert sum(controller.changes.values()) > 0
    assert {"predicted_over_target", "decode_steps_short", "prompt_steps_short"} <= seen <= set(REASONS)


def test_a_device_too_fast_to_be_measured_gets_all_sequences_of_aimd_and_teaches_no_costs():
    controller, cost = make("aimd")
    seqs = [4]
    for i in range(40):
        controller.observe(StepShape(seqs[-1], 100, 0, 0), 0.0, i / 1000)
        seqs.append(controller.limits(BUSY._replace(running=seqs[-1], decodes=seqs[-1]), i / 1000).seqs)
    assert sorted(set(seqs)) == [4, 8, 16, 32, 64]
    assert not cost.trusted
    assert cost.table.decode_seconds[-1] == 0


@pytest.mark.parametrize("policy", ["auto", "aimd"])
def test_on_a_laptop_that_keeps_no_target_requests_do_not_wait_for_long(policy):
    """Four sequences and 16 prompt tokens a step would not carry this load, and the queue would grow without end."""
    rng, jobs, now = random.Random(2), [], 0.0
    while (now := now + rng.expovariate(2.0)) < 60:
        jobs.append(Job(int(min(2500, max(16, rng.lognormvariate(5, 0.8)))), rng.randint(10, 74), now))
    server = served(make(policy, seqs=256, tokens=512)[0], LAPTOP, jobs, 70)
    waits = sorted(job.first_at - job.arrival for job in server.done)
    gaps = sorted(job.gap for job in server.done)
    assert len(server.done) > 0.9 * len(jobs)
    assert waits[int(0.9 * len(waits))] < 6
    assert gaps[int(0.5 * len(gaps))] < 0.435  # a full step of prompts, which would also serve everybody
