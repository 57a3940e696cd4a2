"""Tests every figure against records made by hand."""

import numpy as np
import pytest

from loadtest.figures import is_good, percentiles, tokens_in, whole, windows
from loadtest.measure import Measurement
from loadtest.options import slo
from loadtest.plan import WARM_UP
from loadtest.spec import Step, Target
from tests.unit.loadtest.samples import failed, load, record

TARGET = Target("http://host", "generate", model="m")


def measurement(*records, **fields):
    shape = fields.pop("load", None) or load(steps=(Step(1, 1, 10),))
    return Measurement(load=shape, target=TARGET, records=list(records), wall_s=fields.pop("wall_s", 12.0), **fields)


def test_percentiles_are_values_that_occurred_by_nearest_rank():
    assert percentiles([i / 1000 for i in range(1, 101)]) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
    assert percentiles([0.003, 0.001, 0.002]) == {"p50": 2, "p90": 3, "p95": 3, "p99": 3}
    assert percentiles([0.004], scale=1) == {"p50": 0.004, "p90": 0.004, "p95": 0.004, "p99": 0.004}
    assert percentiles([]) is None


def test_latencies_of_one_request():
    f = whole(measurement(record((0.1, 0.2, 0.5, 0.55))), [])
    latencies = {name: getattr(f, f"{name}_ms")["p50"] for name in ("ttft", "gap", "tpot", "e2e", "itl")}
    assert latencies == pytest.approx({"ttft": 100, "gap": 300, "tpot": 150, "e2e": 550, "itl": 100}, abs=0.01)
    assert f.user_tok_s == pytest.approx(1 / 0.15, abs=0.01)


def test_tpot_counts_tokens_and_not_events():
    several = record((0.1, 0.5), tokens=[1, 4])
    assert several.tpot == pytest.approx(0.1)
    assert whole(measurement(several), []).events_per_token == 0.4
    untold = record((0.1, 0.5), tokens=[0, 0], output=5)
    assert untold.tpot == pytest.approx(0.1)
    assert untold.weights.tolist() == [2.5, 2.5]


def test_a_single_token_has_no_gap_and_no_tpot():
    f = whole(measurement(record((0.1,))), [slo("tpot=1,gap=1")])
    assert f.gap_ms["p99"] == 0
    assert (f.tpot_ms, f.user_tok_s, f.itl_ms) == (None, None, None)
    assert f.goodput == {"tpot=1,gap=1": 0.1}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("ttft=101", True), ("ttft=99", False), ("gap=301", True), ("gap=299", False), ("tpot=151", True), ("tpot=149", False),
        ("e2e=551", True), ("e2e=549", False), ("ttft=101,gap=299", False), ("ttft=101,gap=301,tpot=151,e2e=551", True),
    ],
)  # fmt: skip
def test_a_request_is_good_if_it_keeps_all_limits(text, good):
    assert is_good(record((0.1, 0.2, 0.5, 0.55)), slo(text)) is good
    assert not is_good(failed("failed", "500"), slo(text))


def test_goodput_counts_good_requests_a_second_and_its_share_leaves_out_what_cannot_be_judged():
    records = [
        record((0.1, 0.2)),
        record((0.9, 1.0)),
        record((0.1, 0.2), slow=True),
        failed("cancelled", "cancelled"),
        failed("refused", "429 overloaded", e2e=0.004, retry_after=2.0),
        failed("failed", "500 internal"),
        failed("unfinished", "unfinished"),
    ]
    f = whole(measurement(*records), [slo("ttft=500")])
    assert (f.sent, f.ok, f.refused, f.failed, f.cancelled, f.unfinished, f.slow) == (7, 3, 1, 1, 1, 1, 1)
    assert f.sent == f.ok + f.refused + f.failed + f.cancelled + f.unfinished
    assert (f.goodput, f.judged) == ({"ttft=500": 0.1}, 5)
    assert f.errors == {"429 overloaded": 1, "500 internal": 1}
    assert f.refusal_ms["p99"] == 4.0
    assert f.retry_after_s["p50"] == 2.0
    assert f.ttft_ms["p99"] == pytest.approx(900), "slow readers' times are their own"


def test_the_warm_up_does_not_count_but_its_tokens_that_arrive_in_the_window_do():
    early = record((0.5, 1.5, 2.5), sent=-1.0, step=WARM_UP, prompt_tokens=100)
    late = record((1.0, 3.0), sent=8.0, prompt_tokens=30)
    f = whole(measurement(early, late), [])
    assert (f.sent, f.ok, f.prompt_tokens) == (1, 1, 30)
    assert f.out_tok_s == pytest.approx((2 + 1) / 10)
    assert f.total_tok_s == pytest.approx((3 + 30) / 10)
    assert tokens_in([early, late], 0, 10) == (3.0, 30)


def test_steps_have_figures_of_their_own():
    shape = load(steps=(Step(10, 10, 2), Step(20, 20, 4)))
    records = [record((0.1,), sent=1.0), record((0.2, 0.4), sent=1.9, step=1), record((0.3,), sent=5, step=1)]
    first, second = windows(measurement(*records, load=shape), [slo("ttft=250")])
    assert (first.name, first.rate, first.start, first.seconds, first.sent) == ("10/s", 10, 0, 2, 1)
    assert (second.name, second.rate, second.start, second.seconds, second.sent) == ("20/s", 20, 2, 4, 2)
    assert (first.goodput["ttft=250"], second.goodput["ttft=250"]) == (0.5, 0.25)
    assert (first.out_tok_s, second.out_tok_s) == (0.5, 0.8), "tokens count when they arrive"
    assert whole(measurement(*records, load=shape), []).rate == pytest.approx((20 + 80) / 6, abs=0.001)


def test_classes_are_judged_by_their_own_targets():
    records = [
        record((0.4, 0.44), slo_class="interactive"),
        record((0.4, 0.46), slo_class="interactive"),
        record((1.9, 1.99), slo_class="standard"),
        record((9.0, 20.0), slo_class="batch"),
        failed("refused", "429", slo_class="standard"),
    ]
    found = whole(measurement(*records), []).by_class
    assert {name: (c.sent, c.ok, c.good) for name, c in found.items()} == {
        "interactive": (2, 2, 1),
        "standard": (2, 1, 1),
        "batch": (1, 1, None),
    }


def test_the_cached_share_is_of_the_prompt_tokens():
    f = whole(measurement(record(prompt_tokens=100, cached_tokens=75), record(prompt_tokens=300, cached_tokens=0)), [])
    assert f.cached_share == 0.1875
    assert whole(measurement(record()), []).cached_share is None


def test_a_load_of_a_number_of_requests_is_measured_until_its_end():
    shape = load(concurrency=1, seconds=60, requests=1)
    assert whole(measurement(record((0.1, 0.2)), load=shape, wall_s=4.0), []).out_tok_s == 0.5
    assert whole(measurement(record((0.1, 0.2)), load=shape, wall_s=80.0), []).seconds == 60


def test_an_interrupted_load_is_measured_until_its_interruption():
    f = whole(measurement(record((0.1,)), interrupted=True, wall_s=4.0), [slo("ttft=200")])
    assert (f.seconds, f.goodput["ttft=200"]) == (4.0, 0.25)


def test_lag_is_the_time_between_due_and_sent():
    f = whole(measurement(record(at=1.0, sent=1.25)), [])
    assert f.lag_ms["p50"] == 250


def test_a_load_without_any_answer_has_figures():
    f = whole(measurement(failed("failed", "no connection")), [slo("ttft=1")])
    assert (f.out_tok_s, f.ttft_ms, f.goodput) == (0.0, None, {"ttft=1": 0.0})
    assert np.isfinite(f.total_tok_s)
