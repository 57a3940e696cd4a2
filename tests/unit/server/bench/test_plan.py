"""Tests of `tidegate bench plan`: the rate that a replica keeps, the number of replicas, and what cannot be planned."""

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.scheduler.cost_file import load_costs, save_costs
from server.bench import plan
from server.bench.loads import SHAPES
from server.bench.outcomes import Target
from server.bench.simulate import Machine

H200 = Path(__file__).resolve().parents[4] / "loadtest/costs/h200-llama-8b-bf16.json"
# Targets of a card that is six times slower than an H200. Its steps and requests are few, so that a test is short.
SLOW = {"ttft_ms": 4000.0, "gap_ms": 300.0, "seconds": 15.0}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in (("WARM_UP", 5.0), ("FEWEST_REQUESTS", 40), ("PRECISION", 1.1), ("ALONE", 50)):
        monkeypatch.setattr(plan, name, value)


def scaled(folder: Path, factor: float) -> Path:
    """Write a cost file of a card whose steps take `factor` times as long as those of an H200."""
    found = load_costs(H200, setting="costs")
    table = found.table._replace(
        decode_seconds=[seconds * factor for seconds in found.table.decode_seconds],
        step_seconds=[seconds * factor for seconds in found.table.step_seconds],
        kv_token_seconds=found.table.kv_token_seconds * factor,
        attention_pair_seconds=found.table.attention_pair_seconds * factor,
        long_pair_seconds=found.table.long_pair_seconds * factor,
    )
    path = folder / f"{factor}.json"
    save_costs(path, found.key._replace(device=f"card {factor}"), "a test", table)
    return path


def test_the_rate_that_a_replica_keeps_decides_on_the_number_of_replicas(tmp_path, capsys):
    line = plan.run([scaled(tmp_path, 6), scaled(tmp_path, 12)], rate=30.0, **SLOW)
    fast, slow = line.cards
    for card in line.cards:
        by_rate = {tried.rate: tried.good_share for tried in card.rates}
        assert by_rate[card.kept_rate] >= 0.99
        above = min(rate for rate in by_rate if rate > card.kept_rate)
        assert by_rate[above] < 0.99
        assert above / card.kept_rate < 1.11
        assert (card.replicas - 1) * card.kept_rate < 30.0 <= card.replicas * card.kept_rate
    assert 4 < fast.kept_rate < 10
    # The slow card cannot keep the 100 ms of the class, so its steps may be larger, and cost less for each token.
    assert 1.2 < fast.kept_rate / slow.kept_rate < 4
    out, err = capsys.readouterr()
    assert json.loads(out)["cards"][0]["kept_rate"] == fast.kept_rate
    assert err.splitlines()[-1] == (
        f"For 30 requests/s of chat, 99% within TTFT 4000 ms and gaps of 300 ms: {fast.replicas} replicas of card 6 (llama-8b, "
        f"bfloat16), each of which keeps {fast.kept_rate:.3g} requests/s, or {slow.replicas} replicas of card 12 (llama-8b, "
        f"bfloat16), each of which keeps {slow.kept_rate:.3g} requests/s."
    )


def test_a_card_that_cannot_keep_the_targets_is_named_beside_one_that_can(tmp_path, capsys):
    line = plan.run([scaled(tmp_path, 6), scaled(tmp_path, 100)], rate=1.0, **SLOW)
    assert [card.replicas for card in line.cards] == [1, 0]
    assert "card 100 (llama-8b): no rate keeps it: the prompt alone takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttft_ms": 200.0}, r"no rate keeps it: the prompt alone takes \d+ ms for 0\.99 of the requests, and ttft_ms is 200"),
        ({"gap_ms": 20.0}, r"no rate keeps it: a token alone takes \d+(\.\d)? ms, and gap_ms is 20: allow more"),
        ({"rate": 0.0}, r"rate is 0\.0: it must be a finite number above 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"ttft_ms": -1.0}, r"ttft_ms is -1\.0"),
        ({"gap_ms": float("inf")}, "gap_ms is inf"),
        ({"seconds": 0.0}, r"seconds is 0\.0"),
        ({"share": 1.5}, r"share is 1\.5: it must be more than 0 and at most 1"),
        ({"prefix": -1}, "prefix is -1"),
        ({"rate": None}, "rate is missing: name the requests a second"),
        ({"cv": 0.0}, r"cv is 0\.0"),
        ({"trace": Path("none.jsonl")}, r"trace is 'none\.jsonl', which cannot be read"),
        ({"shape": "talk"}, "shape is 'talk': it must be one of chat, rag, long"),
        ({"kv_tokens": [1, 2]}, "kv_tokens is given 2 times for 1 cost files"),
        ({"kv_tokens": [0]}, "kv_tokens is 0"),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan.run([scaled(tmp_path, 6)], **{"rate": 1.0, **SLOW, **changes})


def test_cost_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ConfigError, match="costs is missing"):
        plan.run([], rate=1.0, **SLOW)
    (tmp_path / "torn.json").write_bytes(H200.read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"torn\.json' \(costs\): it is not a complete JSON document"):
        plan.run([tmp_path / "torn.json"], rate=1.0, **SLOW)


@pytest.mark.parametrize(
    ("target", "slo", "promised"),
    [(Target(0.5, 0.05), "interactive", True), (Target(2.0, 0.05), "interactive", False), (Target(2.0, 0.2), "standard", True)],
)
def test_requests_have_the_class_that_keeps_the_targets(target, slo, promised):
    client = plan.Wanted(SHAPES["chat"], target).client
    assert (client.slo, client.promised) == (slo, promised)


def test_a_card_whose_cache_holds_little_keeps_less(tmp_path):
    wanted = plan.Wanted(SHAPES["chat"], Target(4.0, 0.3), seconds=15.0)
    machine = Machine(scaled(tmp_path, 6))
    kept = [plan.highest_rate(each, wanted, plan.Console(quiet=True))[0] for each in (machine, machine._replace(kv_tokens=9000))]
    assert kept[1] < kept[0] / 1.5


def test_bursts_leave_less_of_the_rate(tmp_path):
    machine = Machine(scaled(tmp_path, 6))
    shape = SHAPES["chat"]._replace(
        prompt=SHAPES["chat"].prompt._replace(high=400), outputs=SHAPES["chat"].outputs._replace(high=20)
    )
    even, uneven = (plan.Wanted(shape, Target(1.0, 0.3), cv=cv, seconds=15.0) for cv in (1.0, 4.0))
    kept = [plan.highest_rate(machine, wanted, plan.Console(quiet=True))[0] for wanted in (even, uneven)]
    assert kept[1] < kept[0] / 1.3


def test_a_trace_is_planned_at_its_own_rate_and_with_its_lengths(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"at": {i / 5}, "prompt_tokens": 300, "output_tokens": 10}}\n' for i in range(1, 101)))
    line = plan.run([scaled(tmp_path, 6)], trace=trace, **SLOW)
    assert (line.rate, line.workload) == (5.0, "trace trace.jsonl")
    assert line.cards[0].kept_rate > 5
    assert line.cards[0].replicas == 1
    assert "For 5 requests/s of trace trace.jsonl, 99% within" in capsys.readouterr().err


def test_a_trace_at_one_moment_has_no_rate(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at": 0, "prompt_tokens": 300, "output_tokens": 10}\n')
    with pytest.raises(ConfigError, match="trace has requests at 0 s only"):
        plan.run([scaled(tmp_path, 6)], trace=trace, **SLOW)
