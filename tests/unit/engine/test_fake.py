"""Tests of FakeRunner: the tokens that it generates, the errors that it finds in plans, and its simulated times."""

import math
import statistics
from functools import partial

import pytest

from engine.config import CacheConfig, EngineConfig, FakeConfig, ModelLimits
from engine.errors import ConfigError, InternalError
from engine.fake import FakeRunner, build_fake, expected_tokens
from engine.fake_blocks import record_bytes
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.kvcache.host_memory import HostMemory
from engine.plan import NO_TOKEN, PER_TOKEN, AdmittedRow, Arrival, BlockCopy, GrownRow, Place, SpilledContext, StepPlan, gpu, host
from engine.request import SamplingParams
from engine.scheduler.cost_file import CostKey, cost_key, save_costs
from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepShape

LIMITS = ModelLimits(max_model_len=100, vocab_size=50, eos_token_ids=(3,), dtype="float32")


def make_runner(**changes) -> FakeRunner:
    return FakeRunner(LIMITS, **{"num_blocks": 8, "block_size": 4, "verify": True} | changes)


def host_memory(num_slots: int) -> HostMemory:
    return HostMemory(num_slots, record_bytes(4, PER_TOKEN))


def make_plan(step, slices, *, num_decodes=0, samples=(), admitted=(), grown=(), copies=()) -> StepPlan:
    rows, starts, nums = (list(column) for column in zip(*slices, strict=True))
    return StepPlan(step, rows, starts, nums, num_decodes, list(samples), list(admitted), list(grown), list(copies))


def row(number: int, tokens: list[int], blocks: list[int], num_prompt: int | None = None, **params) -> AdmittedRow:
    return AdmittedRow(number, tokens, num_prompt or len(tokens), blocks, SamplingParams(**{"max_tokens": 50} | params), seed=0)


def test_tokens_depend_on_prompt_outputs_and_seed_alone():
    params = SamplingParams(max_tokens=50)
    tokens = expected_tokens([1, 2, 3], 10, params, 0, LIMITS)
    assert tokens == expected_tokens([1, 2, 3], 10, params, 0, LIMITS)
    assert tokens != expected_tokens([1, 2, 4], 10, params, 0, LIMITS)
    assert tokens != expected_tokens([1, 2, 3], 10, params, 1, LIMITS)


def test_chunks_decodes_and_recomputation_give_the_same_tokens():
    runner, prompt = make_runner(), [9, 8, 7, 6, 5]
    expected = expected_tokens(prompt, 4, SamplingParams(max_tokens=50), 0, LIMITS)
    runner.submit(make_plan(1, [(0, 0, 3)], admitted=[row(0, prompt, [0, 1])]))
    seen = runner.submit(make_plan(2, [(0, 3, 2)], samples=[0])).result().tokens
    seen += runner.submit(make_plan(3, [(0, 5, 1)], num_decodes=1, samples=[0])).result().tokens
    again = row(2, prompt + seen, [4, 5], num_prompt=5)
    seen += runner.submit(make_plan(4, [(2, 0, 7)], samples=[0], admitted=[again])).result().tokens
    grown = [GrownRow(2, 2, [6])]
    seen += runner.submit(make_plan(5, [(2, 7, 1)], num_decodes=1, samples=[0], grown=grown)).result().tokens
    assert seen == expected


def first_step(runner: FakeRunner) -> None:
    """Submit a step that computes the 6 prompt tokens of row 0, in blocks 0 and 1."""
    runner.submit(make_plan(1, [(0, 0, 6)], samples=[0], admitted=[row(0, [1, 2, 3, 4, 5, 6], [0, 1])]))


def test_a_row_may_share_a_full_block_and_copy_the_next_one():
    runner = make_runner()
    first_step(runner)
    sibling = row(1, [1, 2, 3, 4, 5, 6], [0, 2])
    runner.submit(make_plan(2, [(1, 5, 1)], samples=[0], admitted=[sibling], copies=[BlockCopy(gpu(1), gpu(2))]))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(make_plan(2, [(1, 5, 1)], samples=[0], admitted=[row(1, [1, 2, 3, 4, 5, 6], [0, 2])]), id="missing copy"),
        pytest.param(make_plan(2, [(1, 4, 1)], samples=[0], admitted=[row(1, [1, 2, 3, 9, 5], [0, 2])]), id="other prefix"),
        pytest.param(make_plan(2, [(1, 4, 2)], samples=[0], admitted=[row(1, [1, 2, 3, 4, 5, 6], [5, 2])]), id="wrong block"),
        pytest.param(make_plan(2, [(0, 7, 1)], num_decodes=1, samples=[0]), id="position skipped"),
        pytest.param(make_plan(2, [(0, 5, 1)], num_decodes=1, samples=[0]), id="position repeated"),
        pytest.param(make_plan(2, [(0, 6, 1), (0, 6, 1)], num_decodes=2, samples=[0]), id="row twice"),
        pytest.param(make_plan(2, [(0, 6, 1)], samples=[0], grown=[GrownRow(0, 3, [4])]), id="growth out of place"),
        pytest.param(make_plan(2, [(0, 6, 1), (1, 0, 2)], samples=[0], admitted=[row(1, [1, 2], [1])]), id="overwritten"),
    ],
)
def test_a_wrong_plan_raises(plan):
    runner = make_runner()
    first_step(runner)
    with pytest.raises(InternalError):
        runner.submit(plan)


def test_a_row_without_a_block_for_its_next_position_raises():
    runner = make_runner()
    tokens = list(range(8))
    runner.submit(make_plan(1, [(0, 0, 8)], samples=[0], admitted=[row(0, tokens, [0, 1])]))
    with pytest.raises(InternalError):
        runner.submit(make_plan(2, [(0, 8, 1)], num_decodes=1, samples=[0]))


def test_stop_tokens_are_not_sampled_before_min_tokens():
    tiny = ModelLimits(max_model_len=100, vocab_size=4, eos_token_ids=(3,), dtype="float32")
    params = SamplingParams(max_tokens=60, min_tokens=30, stop_token_ids=(1,))
    tokens = expected_tokens([1], 60, params, 0, tiny)
    assert not {1, 3} & set(tokens[:30])
    assert {1, 3} <= set(tokens[30:])


def test_a_row_that_would_sample_the_nan_token_reports_it_and_stays_runnable():
    tokens = expected_tokens([1, 2, 3], 2, SamplingParams(max_tokens=50), 0, LIMITS)
    runner = make_runner(simulated=FakeConfig(nan_token=tokens[1]))
    plans = [make_plan(1, [(0, 0, 3)], samples=[0], admitted=[row(0, [1, 2, 3], [0, 1])])]
    plans += [make_plan(2 + i, [(0, 3 + i, 1)], num_decodes=1, samples=[0]) for i in range(2)]
    first, second, third = (runner.submit(plan).result().tokens for plan in plans)
    assert (first, second) == ([tokens[0]], [NO_TOKEN])
    assert 0 <= third[0] < LIMITS.vocab_size


def test_logprobs_have_the_requested_shape():
    runner = make_runner()
    admitted = row(0, [9, 8, 7, 6, 5], [0, 1], logprobs=2, prompt_logprobs=1)
    first = runner.submit(make_plan(1, [(0, 0, 3)], admitted=[admitted])).result()
    last = runner.submit(make_plan(2, [(0, 3, 2)], samples=[0])).result()
    assert [p.token for p in first.prompt_logprobs[0]] == [8, 7, 6]
    assert [p.token for p in last.prompt_logprobs[0]] == [5]
    assert last.logprobs[0].token == last.tokens[0]
    assert (len(last.logprobs[0].top_ids), len(last.logprobs[0].top_logprobs)) == (2, 2)
    assert first.logprobs == {}


def test_steps_run_one_after_the_other_on_the_simulated_device():
    """`submit` takes no time, and `result` waits until its step and all earlier steps have ended."""
    time = SimulatedTime(100.0)
    device = SimulatedDevice(FakeConfig(step_ms=20.0, token_us=1000.0), clock=time.clock, sleep=time.sleep)
    runner = make_runner(verify=False, device=device)
    first = runner.submit(make_plan(1, [(0, 0, 5)], samples=[0], admitted=[row(0, [1] * 5, [0, 1])]))
    second = runner.submit(make_plan(2, [(0, 5, 1)], num_decodes=1, samples=[0]))
    assert time.now == 100.0
    time.now += 0.005  # the CPU does something else meanwhile
    assert first.result().device_seconds == pytest.approx(0.025)
    assert time.now == pytest.approx(100.025)
    assert second.result().device_seconds == pytest.approx(0.021)
    assert time.now == pytest.approx(100.046)


def test_by_default_steps_take_real_time_and_none_without_durations(monkeypatch):
    slept = []
    monkeypatch.setattr("engine.fake_device.time.sleep", slept.append)
    plan = make_plan(1, [(0, 0, 5)], samples=[0], admitted=[row(0, [1] * 5, [0, 1])])
    assert make_runner().submit(plan).result().device_seconds == 0
    assert slept == []


@pytest.mark.parametrize(("tokens", "decodes"), [(50, 0), (1, 1)])
def test_a_cost_file_says_how_long_the_steps_of_a_simulated_device_take(tmp_path, tokens, decodes):
    table = CostTable([1, 8], [0.004, 0.005], [16, 64], [0.006, 0.012], 1e-5, 1e-6, 1e-6)
    save_costs(tmp_path / "costs.json", CostKey("some GPU", "some model", "bfloat16"), "a test", table)
    time = SimulatedTime()
    config = EngineConfig(model="none", runner="fake", fake=FakeConfig(cost_file=str(tmp_path / "costs.json")))
    built = build_fake(config, LIMITS, make_device=partial(SimulatedDevice, clock=time.clock, sleep=time.sleep))
    assert built.device == "fake some GPU"
    assert cost_key(built.config, built.device) == ("some GPU", "some model", "bfloat16")
    plan = make_plan(1, [(0, 0, tokens)], samples=[0], admitted=[row(0, [1] * tokens, [0])], num_decodes=decodes)
    result = built.runner.submit(plan).result()
    expected = table.predict(StepShape.of(plan))
    assert expected > 0.004
    assert (result.device_seconds, time.now) == (expected, expected)


def test_a_device_is_idle_between_steps_and_its_steps_vary_with_the_seed():
    plan = make_plan(1, [(0, 0, 5)], samples=[0])

    def run(**options) -> tuple[list[float], float]:
        time = SimulatedTime()
        device = SimulatedDevice(FakeConfig(step_ms=20.0), clock=time.clock, sleep=time.sleep, **options)
        runner = make_runner(verify=False, device=device, only_token=7)
        results = [runner.submit(plan).result() for _ in range(400)]
        assert {tuple(result.tokens) for result in results} == {(7,)}
        return [result.device_seconds for result in results], time.now

    assert run(between=0.001) == ([0.02] * 400, pytest.approx(400 * 0.021))
    noisy, _ = run(noise=0.1, seed=1)
    assert noisy == run(noise=0.1, seed=1)[0] != run(noise=0.1, seed=2)[0]
    logs = [math.log(seconds / 0.02) for seconds in noisy]
    assert statistics.mean(logs) == pytest.approx(0.0, abs=0.02)
    assert statistics.stdev(logs) == pytest.approx(0.1, rel=0.15)


def test_a_cost_file_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"fake\.cost_file is 'none\.json', which cannot be read"):
        build_fake(EngineConfig(model="none", runner="fake", fake=FakeConfig(cost_file="none.json")), LIMITS)


def test_build_sets_the_number_of_blocks_and_overlap():
    built = build_fake(EngineConfig(model="none", runner="fake"), LIMITS)
    assert (built.runner.num_blocks, built.config.overlap, built.config.max_model_len) == (4096, True, 100)
    assert build_fake(EngineConfig(model="none", runner="fake", overlap=False), LIMITS).config.overlap is False


def test_a_plan_may_copy_blocks_and_have_no_slices():
    runner = make_runner()
    first_step(runner)
    result = runner.submit(StepPlan(2, copies=[BlockCopy(gpu(1), gpu(2))])).result()
    assert (result.step, result.tokens) == (2, [])
    runner.submit(make_plan(3, [(1, 5, 1)], samples=[0], admitted=[row(1, [1, 2, 3, 4, 5, 6], [0, 2])]))


def moved(runner: FakeRunner, *copies: tuple[Place, Place]) -> list[bool]:
    """Submit a plan that only moves blocks, and return whether each move ended well."""
    runner.submit(StepPlan(2, copies=[BlockCopy(src, dst) for src, dst in copies]))
    return [ok for _, ok in runner.poll()]


SIBLING = [1, 2, 3, 4, 5, 6]


def read_back(runner: FakeRunner, first_block: int) -> None:
    """Submit a step of a row whose first block is `first_block`, and that computes the rest itself."""
    runner.submit(make_plan(3, [(1, 4, 2)], samples=[0], admitted=[row(1, SIBLING, [first_block, 7])]))


def test_a_block_that_went_to_the_host_and_came_back_can_be_read():
    runner = make_runner(host=host_memory(2))
    first_step(runner)
    assert moved(runner, (gpu(0), host(1))) == [True]
    runner.submit(make_plan(3, [(2, 0, 4)], admitted=[row(2, [9, 9, 9, 9], [0])]))
    assert moved(runner, (host(1), gpu(5))) == [True]
    read_back(runner, 5)


@pytest.mark.parametrize(
    ("moves", "first_block"),
    [
        pytest.param([(gpu(0), host(1)), (host(0), gpu(5))], 5, id="slot that holds nothing"),
        pytest.param([(gpu(0), host(1)), (host(1), gpu(5))], 5, id="loaded before it has arrived"),
        pytest.param([(gpu(0), host(2))], 0, id="slot that does not exist"),
        pytest.param([(gpu(3), host(0))], 0, id="block that holds nothing"),
        pytest.param([(gpu(0), host(0))], 5, id="block that was not loaded"),
    ],
)
def test_a_wrong_move_raises(moves, first_block):
    runner = make_runner(host=host_memory(2))
    first_step(runner)

    def move_and_read() -> None:
        moved(runner, *moves)
        read_back(runner, first_block)

    with pytest.raises(InternalError):
        move_and_read()


def test_a_block_that_is_read_before_its_move_has_arrived_raises():
    runner = make_runner(host=host_memory(2))
    first_step(runner)
    moved(runner, (gpu(0), host(0)))
    runner.submit(StepPlan(2, copies=[BlockCopy(host(0), gpu(5))]))
    with pytest.raises(InternalError, match="before its content has arrived"):
        read_back(runner, 5)


@pytest.mark.parametrize(
    ("slots", "blocks", "arrived", "right"),
    [
        pytest.param([1], [7], True, True, id="right"),
        pytest.param([0], [7], True, False, id="another slot"),
        pytest.param([1], [7], False, False, id="not arrived"),
        pytest.param([], [7], True, False, id="too few blocks"),
        pytest.param([1, 1], [7], True, False, id="written to the host"),
    ],
)
def test_a_context_in_the_host_is_verified(slots, blocks, arrived, right):
    runner = make_runner(host=host_memory(2))
    first_step(runner)
    runner.submit(StepPlan(2, copies=[BlockCopy(gpu(0), host(1))]))
    if arrived:
        runner.poll()
    plan = make_plan(3, [(1, 4, 2)], samples=[0], admitted=[row(1, SIBLING, [])])
    plan.spilled = SpilledContext(slots, blocks)
    if right:
        assert len(runner.submit(plan).result().tokens) == 1
        return
    with pytest.raises(InternalError):
        runner.submit(plan)


def test_a_step_whose_context_lies_in_the_host_takes_longer_by_the_time_to_read_it():
    simulated = FakeConfig(step_ms=20.0, block_bytes=10**9, host_gb_s=100.0)
    runner = make_runner(verify=False, simulated=simulated, device=SimulatedDevice(simulated))
    plan = make_plan(1, [(1, 4, 2)], samples=[0], admitted=[row(1, SIBLING, [])])
    plan.spilled = SpilledContext([0, 1, 2], [7])
    assert runner.submit(plan)._result.device_seconds == pytest.approx(0.05)


def test_a_slot_that_is_overwritten_while_it_is_read_raises():
    runner = make_runner(host=host_memory(2))
    first_step(runner)
    runner.submit(make_plan(2, [(2, 0, 4)], admitted=[row(2, [9, 9, 9, 9], [2])]))
    moved(runner, (gpu(0), host(0)))
    with pytest.raises(InternalError, match="overwritten while it was read"):
        moved(runner, (host(0), gpu(5)), (gpu(2), host(0)))


def test_moves_take_time_one_after_the_other_and_begin_after_the_steps_before_them():
    time = SimulatedTime(100.0)
    simulated = FakeConfig(step_ms=20.0, block_bytes=10**9, host_gb_s=100.0)
    device = SimulatedDevice(simulated, clock=time.clock, sleep=time.sleep)
    runner = make_runner(host=host_memory(2), device=device, simulated=simulated)
    first_step(runner)
    runner.submit(StepPlan(2, copies=[BlockCopy(gpu(0), host(0)), BlockCopy(gpu(0), host(1))]))
    assert (runner.poll(), time.now) == ([], 100.0)
    assert (runner.poll(0.005), time.now) == ([], 100.005)
    assert runner.poll(1.0) == [Arrival(host(0), True)]
    assert time.now == pytest.approx(100.03)
    time.now += 5.0
    assert runner.poll() == [Arrival(host(1), True)]
    assert runner.poll(1.0) == []
    assert time.now == pytest.approx(105.03)  # a poll does not wait if no move is under way


def test_a_share_of_the_moves_fails():
    runner = make_runner(host=host_memory(1000), simulated=FakeConfig(failing_moves=0.25))
    first_step(runner)
    ended = moved(runner, *((gpu(0), host(slot)) for slot in range(1000)))
    assert 200 < ended.count(False) < 300


def test_a_host_tier_of_too_many_blocks_is_refused_by_name():
    config = EngineConfig(model="", runner="fake", cache=CacheConfig(host_tier_bytes=10**23))
    with pytest.raises(ConfigError, match="the host tier holds at most 16777216 blocks") as refused:
        build_fake(config, LIMITS)
    assert refused.value.param == "cache.host_tier_bytes"
