"""Tests the small languages of the command line, and that options without an effect and impossible shapes are refused by name."""

import dataclasses
import sys

import pytest

from loadtest import options
from loadtest.__main__ import missing
from loadtest.flags import DEFAULT_SLOS, Flags, loads_of, slos_of
from loadtest.spec import SHAPES, Lengths, LoadError, Step


@pytest.mark.parametrize(
    ("text", "back", "expected"),
    [
        ("20", False, [[(20, 20)]]),
        ("20,30", False, [[(20, 20)], [(30, 30)]]),
        ("10:40:10", False, [[(10, 10), (20, 20), (30, 30), (40, 40)]]),
        ("40:10:15", False, [[(40, 40), (25, 25), (10, 10)]]),
        ("10:30:10", True, [[(10, 10), (20, 20), (30, 30), (20, 20), (10, 10)]]),
        ("0-80", True, [[(0, 80), (80, 0)]]),
        ("0.1:0.3:0.1", False, [[(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)]]),
    ],
)
def test_rates(text, back, expected):
    found = options.rates(text, 5, back=back)
    assert [[(pytest.approx(s.rate), pytest.approx(s.end_rate)) for s in steps] for steps in found] == expected
    assert all(step.seconds == 5 for steps in found for step in steps)


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "10:20", "10:20:0", "1:2:3:4", "0-0", "nan", "inf", "10,,20"])
def test_rates_that_mean_nothing_are_refused(text):
    with pytest.raises(LoadError, match="--rate"):
        options.rates(text, 5, back=False)


def test_a_steady_rate_has_no_way_back():
    with pytest.raises(LoadError, match="--back needs a rate that moves"):
        options.rates("10", 5, back=True)


def test_lengths():
    assert options.lengths("512", "--prompt") == Lengths("fixed", 512, 512)
    assert options.lengths("uniform:10:20", "--prompt") == Lengths("uniform", 10, 20)
    assert options.lengths("lognormal:6.0:.8:16:4000", "--prompt") == SHAPES["chat"][0]


@pytest.mark.parametrize("text", ["0", "1.5", "uniform:20:10", "uniform:1", "normal:1:2", "lognormal:1:2:3", "lognormal:a:1:1:2"])
def test_lengths_that_mean_nothing_are_refused(text):
    with pytest.raises(LoadError, match="--prompt"):
        options.lengths(text, "--prompt")


def test_slo():
    assert options.slo("ttft=500, gap=50.0") == options.Slo("ttft=500,gap=50", (("ttft", 500.0), ("gap", 50.0)))


@pytest.mark.parametrize("text", ["", "ttft", "itl=5", "ttft=x", "ttft=0", "ttft=1,ttft=2"])
def test_an_slo_that_means_nothing_is_refused(text):
    with pytest.raises(LoadError, match="--slo"):
        options.slo(text)


def test_the_default_shape_and_slos_are_those_of_the_outside_yardstick():
    (load,) = loads_of(Flags(rate="10"))
    assert (load.prompt, load.output) == SHAPES["chat"]
    assert [slo.text for slo in slos_of(Flags())] == list(DEFAULT_SLOS)


def test_every_rate_of_a_list_has_prompts_of_its_own():
    loads = loads_of(Flags(rate="10,20", seed=3))
    assert [(load.number, load.seed) for load in loads] == [(0, 3), (1, 3)]


def test_without_a_seed_each_run_has_fresh_prompts():
    assert len({loads_of(Flags(rate="10"))[0].seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give one of --rate, --trace, --concurrency, --sessions"),
        ({"rate": "1", "concurrency": "2"}, "not --rate and --concurrency"),
        ({"concurrency": "2", "burstiness": 0.5}, "--burstiness has no effect with --concurrency"),
        ({"rate": "1", "turns": 3}, "--turns has no effect with --rate"),
        ({"rate": "5", "slow_bytes": 10}, "--slow-bytes has no effect without --slow"),
        ({"rate": "5", "prefixes": 2}, "--prefixes has no effect without --prefix"),
        ({"sessions": 2, "cancel": 0.5}, "--cancel has no effect with --sessions"),
        ({"rate": "5", "cancel": 1.5}, "--cancel is 1.5: a share is between 0 and 1"),
        ({"rate": "5", "cancel": 0.5, "cancel_after": "2:1"}, "--cancel-after"),
        ({"rate": "5", "seconds": 0}, "--seconds"),
        ({"rate": "5", "burstiness": 0}, "--burstiness"),
        ({"rate": "0.001", "seconds": 1, "seed": 1}, "no request arrives in 1 s"),
        ({"concurrency": "0"}, "--concurrency"),
        ({"concurrency": "2.5"}, "--concurrency"),
        ({"rate": "5", "shape": "poem"}, "--shape is 'poem'"),
        ({"rate": "5", "slo_class": "gold"}, "--slo-class is 'gold': it must be one of interactive, standard, batch"),
        ({"sessions": 2, "context": 500}, "--context 500 is too small for 40 turns"),
        ({"sessions": 0}, "--sessions"),
        ({"sessions": 2, "fork": 2.0}, "--fork is 2"),
    ],
)
def test_impossible_loads_are_refused(flags, message):
    with pytest.raises(LoadError) as refused:
        loads_of(Flags(**flags))
    assert message in str(refused.value)


def test_every_option_but_the_seed_reaches_the_load():
    """An option that is accepted and then ignored would make a silent difference."""
    base = {"rate": "5", "seed": 1, "warm_up": 0.0, "cancel": 0.5, "slow": 0.5, "prefix": 8}
    changes = {
        "burstiness": 0.5, "seconds": 7.0, "requests": 4, "warm_up": 1.0, "prompt": "9", "output": "9", "prefix": 16,
        "prefixes": 3, "cancel": 0.25, "cancel_after": "1", "slow": 0.25, "slow_bytes": 9.0, "slo_class": "batch",
        "deadline_ms": 5,
        "temperature": 0.1, "ignore_eos": False, "timeout": 3.0, "shape": "rag", "rate": "6", "seed": 2,
    }  # fmt: skip
    first = loads_of(Flags(**base))
    for name, value in changes.items():
        assert loads_of(Flags(**{**base, name: value})) != first, name
    elsewhere = {
        "trace",
        "speed",
        "concurrency",
        "sessions",
        "turns",
        "context",
        "think",
        "fork",
        "fork_turns",
        "back",
        "lengths",
        "slo",
    }
    assert {field.name for field in dataclasses.fields(Flags)} == set(changes) | elsewhere


def test_a_ramp_has_one_step():
    (load,) = loads_of(Flags(rate="10-80", seconds=30))
    assert load.steps == (Step(10, 80, 30),)
    assert load.measured_seconds == 30


@pytest.mark.parametrize(
    ("rate", "back", "name"),
    [
        ("10:80:10", True, "open 10 to 80 to 10/s in 15 steps"),
        ("80:10:35", False, "open 80 to 10/s in 3 steps"),
        ("0-40", True, "open 0 to 40 to 0/s in 2 steps"),
        ("0-40", False, "open 0 to 40/s"),
        ("7", False, "open 7/s"),
    ],
)
def test_a_load_is_named_by_where_its_rate_goes(rate, back, name):
    (load,) = loads_of(Flags(rate=rate, back=back))
    assert load.name == name


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    assert missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else name)
    remedy = missing() or ""
    assert "matplotlib, not installed here" in remedy
    assert f"{sys.executable} -m pip install -e '.[loadtest]'" in remedy
