"""Tests of the simulator: its times are those of the cost file, and the policies do in it what they are for."""

from array import array
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.messages import EngineStats
from engine.request import FinishReason
from engine.scheduler.cost_file import CostKey, load_costs, save_costs
from engine.scheduler.cost_table import CostTable
from server.bench.loads import SHAPES, Arrival, Client, poisson
from server.bench.outcomes import Target, outcome, percentile, phase
from server.bench.simulate import Machine, Run, Sample, limits_over_time, simulate

H200 = Path(__file__).resolve().parents[4] / "loadtest/costs/h200-llama-8b-bf16.json"
PROMISED = Client(slo="interactive", promised=True)
TABLE = CostTable([8], [0.01], [10, 1000], [0.02, 0.2], 0.0, 0.0, 0.0)


@pytest.fixture
def machine(tmp_path) -> Machine:
    """A device whose decode steps take 10 ms, and whose steps with a prompt of up to 10 tokens take 20 ms. Nothing varies."""
    save_costs(tmp_path / "costs.json", CostKey("a device", "a model", "bfloat16"), "a test", TABLE)
    return Machine(tmp_path / "costs.json", policy="fixed", kv_tokens=10_000, between=0.0, noise=0.0)


def tokens(num: int, first: int = 20) -> array:
    return array("i", range(first, first + num))


def test_one_request_takes_the_time_of_its_steps(machine):
    run = simulate([Arrival(3.0, tokens(10), 5)], machine)
    (one,) = run.served
    assert (one.finish, one.ok) == (FinishReason.LENGTH, True)
    assert one.ttft == pytest.approx(0.02)
    assert list(one.gaps) == pytest.approx([0.01] * 4)
    assert (one.e2e, one.tpot, one.longest_gap) == pytest.approx((0.06, 0.01, 0.01))
    assert [(step.decodes, step.prompt_tokens) for step in run.steps] == [(0, 10)] + [(1, 0)] * 4
    assert run.seconds == pytest.approx(3.06)
    assert run.busy == pytest.approx(0.06 / 3.06)


def test_the_device_is_idle_between_steps(machine):
    run = simulate([Arrival(0.0, tokens(10), 5)], machine._replace(between=0.001))
    assert run.served[0].e2e == pytest.approx(0.065)


def test_the_same_seed_gives_the_same_run(machine):
    def times(seed):
        run = simulate(poisson(20, 2, SHAPES["chat"]), Machine(H200), seed=seed)
        return [one.first for one in run.served]

    assert times(1) == times(1) != times(2)


def test_a_request_whose_deadline_passes_is_ended_and_is_not_good(machine):
    late = Arrival(0.0, tokens(10), 100, Client(deadline_s=0.5))
    run = simulate([late, Arrival(0.1, tokens(10, 50), 3)], machine)
    assert [one.finish for one in run.served] == [FinishReason.ABORT, FinishReason.LENGTH]
    assert run.seconds == pytest.approx(0.5, abs=0.03)
    found = outcome(run.served, 1.0)
    assert (found.sent, found.ok, found.unfinished, found.good) == (2, 1, 1, 1)


def test_a_simulation_may_end_before_its_requests(machine):
    run = simulate([Arrival(0.0, tokens(10), 100), Arrival(5.0, tokens(10), 3)], machine, until=0.5)
    (one,) = run.served
    assert (one.finish, len(one.gaps)) == (None, pytest.approx(48, abs=2))
    assert one.in_time(0.03, 0.02)
    assert not one.in_time(0.01, 0.02)
    assert not one.good(0.03, 0.02)
    assert outcome(run.served, 1.0).unfinished == 1


def test_shared_prefixes_are_not_computed_again(machine):
    prompt = tokens(200)
    run = simulate([Arrival(0.0, prompt, 2), Arrival(1.0, prompt, 2)], machine)
    assert run.served[1].ttft < run.served[0].ttft / 1.5
    run = simulate([Arrival(0.0, prompt, 2), Arrival(1.0, prompt, 2)], machine._replace(prefix_caching=False))
    assert run.served[1].ttft == pytest.approx(run.served[0].ttft)


def test_refused_requests_are_counted_apart(machine):
    # A prompt of 4,000 tokens takes 0.8 s, so the second request cannot have its first token within 0.5 s.
    load = [Arrival(0.0, tokens(4000), 2, PROMISED), Arrival(0.01, tokens(5), 2, PROMISED)]
    run = simulate(load, machine._replace(max_step_tokens=1000, policy="fixed"))
    assert [one.refused for one in run.served] == [None, "overloaded"]
    assert run.served[1].retry_after == 1
    found = outcome(run.served, 2.0)
    assert (found.sent, found.ok, found.refused, found.good, found.goodput) == (2, 1, 1, 0, 0.0)
    assert found.ttft_ms["p50"] == found.ttft_ms["p99"] == pytest.approx(800)
    assert found.refusal_ms["p99"] == pytest.approx(190)  # the engine hears of it after its step


def test_goodput_needs_both_the_first_token_and_the_longest_gap():
    run = simulate(poisson(10, 5, SHAPES["chat"]), Machine(H200, policy="fixed"))
    both = outcome(run.served, 5, Target(0.03, 0.03)).good
    first, gap = (outcome(run.served, 5, target).good for target in (Target(0.03, 9), Target(9, 0.03)))
    assert 0 < both < min(first, gap)


def test_percentiles_are_values_that_so_many_do_not_exceed():
    assert [percentile(range(1, 101), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0


def test_the_model_policy_keeps_gaps_short_where_large_steps_do_not():
    found = {}
    for policy in ("fixed", "model"):
        run = simulate(poisson(36, 10, SHAPES["chat"], PROMISED), Machine(H200, policy=policy))
        found[policy] = outcome(run.served, 10)
    assert found["model"].gap_ms["p99"] < 50 < found["fixed"].gap_ms["p50"]
    assert found["model"].goodput > 1.3 * found["fixed"].goodput
    assert found["model"].refused == 0


@pytest.mark.parametrize("rate", [20, 36])
def test_a_server_without_a_cost_file_soon_serves_as_one_that_has_it(rate):
    good = {}
    for cold in (False, True):
        run = simulate(poisson(rate, 8, SHAPES["chat"], PROMISED), Machine(H200, policy="auto", cold=cold))
        good[cold] = outcome([one for one in run.served if one.arrival.at > 2], 6).goodput
    assert good[True] >= 0.95 * good[False] > 0.8 * rate


def test_an_overload_does_not_collapse_goodput():
    """At twice the rate that the device keeps, at least nine tenths of the goodput remain, since promises are refused in time."""
    good = {}
    for rate in (40, 80):
        run = simulate(poisson(rate, 14, SHAPES["chat"], PROMISED), Machine(H200, policy="model"))
        good[rate] = outcome([one for one in run.served if one.arrival.at > 4], 10).goodput
    assert good[80] > 0.9 * good[40] > 30


def test_limits_settle_and_are_listed_when_they_change():
    run = simulate(poisson(30, 12, SHAPES["chat"], PROMISED), Machine(H200, policy="model"))
    found = phase(run, 0.0, 12.0)
    assert found.settled_after < 5
    assert 0 < found.changes <= 12
    assert found.p99_step_ms < 50
    changes = limits_over_time(run)
    assert [entry["batching"] for entry in changes] == ["model"] * len(changes)
    assert found.changes / 2 < len(changes) - 1 <= found.changes  # two changes between two samples are listed as one


def scaled(folder: Path, factor: float) -> Path:
    found = load_costs(H200, setting="costs")
    table = found.table._replace(
        decode_seconds=[seconds * factor for seconds in found.table.decode_seconds],
        step_seconds=[seconds * factor for seconds in found.table.step_seconds],
    )
    save_costs(folder / "scaled.json", found.key, "a test", table)
    return folder / "scaled.json"


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_cost_file_that_is_a_quarter_off_is_corrected_while_the_model_holds(tmp_path, factor):
    run = simulate(poisson(30, 8, SHAPES["chat"], PROMISED), Machine(H200, believed=scaled(tmp_path, factor), policy="model"))
    assert {stats.batching for _, stats in run.samples} == {"model"}
    assert outcome(run.served, 8).good == len(run.served)


def test_a_device_that_is_too_slow_for_the_class_still_serves(tmp_path):
    """A decode takes 130 ms, the smallest step with a prompt 195 ms, and 50 ms are asked for.

    No limits keep that, and strict ones would serve four requests at a time.
    """
    load = poisson(0.5, 60, SHAPES["chat"], Client(slo="interactive"))
    run = simulate(load, Machine(scaled(tmp_path, 32), policy="model"), until=240)
    found = outcome(run.served, 60)
    assert found.ok == found.sent > 15
    assert found.ttft_ms["p99"] < 10_000
    assert found.gap_ms["p99"] < 3 * 195


def test_limits_that_change_often_have_not_settled():
    def sample(at, changes):
        return Sample(at, EngineStats(limit_changes={"policy": changes}))

    step = simulate(poisson(5, 1, SHAPES["chat"]), Machine(H200)).steps[0]
    run = Run(
        [], [step._replace(at=at) for at in (0, 5, 9)], [sample(*pair) for pair in ((1, 1), (1.5, 2), (2.2, 3), (8, 4))], 10, 1
    )
    assert phase(run, 0, 10).settled_after == 2.2
    assert phase(run, 0, 10).changes == 4
    assert phase(run, 3, 10).settled_after == 0


def test_a_cost_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "torn.json").write_bytes(H200.read_bytes()[:400])
    with pytest.raises(ConfigError, match=r"torn\.json.*not a complete JSON document"):
        simulate([], Machine(tmp_path / "torn.json"))
