"""Tests of simulated loads: they are those of real runs, and a wrong trace is named."""

import json
import statistics
from itertools import pairwise

import pytest

import loadtest.trace
from engine.errors import ConfigError
from server.bench.loads import SHAPES, Client, bursts, merge, poisson, read_trace, shape_of, steps


def test_a_load_has_the_requests_of_a_real_run_with_the_same_seed():
    """The benchmark of a served model draws these from the seed 7 + 1000 * rate: 484 requests in 15 s at 30 requests a second."""
    load = poisson(30, 15, SHAPES["chat"], seed=7 + 30_000)
    assert len(load) == 484
    found = [(round(a.at, 6), len(a.prompt), a.num_outputs, a.prompt[:3].tolist()) for a in load[:2]]
    assert found == [(0.001104, 304, 128, [5938, 4200, 271]), (0.057371, 280, 178, [8176, 987, 465])]


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_the_distances_of_bursts_have_the_rate_and_the_variation(cv):
    load = bursts(50, 400, SHAPES["chat"]._replace(prompt=SHAPES["chat"].prompt._replace(high=1, low=1)), cv=cv)
    distances = [b.at - a.at for a, b in pairwise(load)]
    assert statistics.mean(distances) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(distances) / statistics.mean(distances) == pytest.approx(cv, rel=0.05)


def test_the_rate_changes_between_phases_and_loads_merge_in_order():
    load = steps([(10, 20), (80, 20)], SHAPES["chat"], Client("a"))
    assert 150 < sum(a.at < 20 for a in load) < 250
    assert 1450 < sum(20 <= a.at < 40 for a in load) < 1750
    both = merge(load, poisson(5, 40, SHAPES["rag"], Client("b")))
    assert [a.at for a in both] == sorted(a.at for a in both)
    assert {a.client.tenant for a in both} == {"a", "b"}


def test_all_prompts_begin_with_the_shared_prefix_and_go_on_differently():
    load = poisson(10, 3, SHAPES["chat"], prefix=100)
    assert len({a.prompt[:100].tobytes() for a in load}) == 1
    assert len({a.prompt[100:110].tobytes() for a in load}) == len(load) > 10


def test_an_unknown_shape_is_named():
    with pytest.raises(ConfigError, match=r"shape is 'chatt': it must be one of chat, rag, long"):
        shape_of("chatt")


def test_a_trace_is_read_in_order_of_time(tmp_path):
    path = tmp_path / "trace.jsonl"
    asked = {"slo_class": "batch", "deadline_s": 4, "tenant": "t"}
    lines = [{"at": 0.5, "prompt_tokens": 20, "output_tokens": 3}, {"at": 0.25, "prompt_tokens": 7, "output_tokens": 1, **asked}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_trace(path)
    assert (first.at, len(first.prompt), first.num_outputs) == (0.25, 7, 1)
    assert first.client == Client("t", "batch", promised=True, deadline_s=4.0)
    assert (second.at, len(second.prompt), second.num_outputs, second.client) == (0.5, 20, 3, Client())


def test_the_load_test_and_a_simulation_take_the_same_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 1.5, "prompt_tokens": 20, "output_tokens": 3, "slo_class": "interactive"}\n')
    (sent,) = loadtest.trace.read_trace(path)
    (simulated,) = read_trace(path)
    assert (sent.at, sent.prompt_tokens, sent.output_tokens, sent.slo_class) == (1.5, 20, 3, "interactive")
    assert (simulated.at, len(simulated.prompt), simulated.num_outputs, simulated.client.slo) == (1.5, 20, 3, "interactive")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": -1}, r"line 2: Expected `float` >= 0\.0 - at `\$\.at`; a line is a JSON object with at, prompt_tokens"),
        ({"prompt_tokens": 0}, r"line 2: Expected `int` >= 1 - at `\$\.prompt_tokens`"),
        ({"output_tokens": "3"}, r"line 2: Expected `int`, got `str` - at `\$\.output_tokens`"),
        ({"slo_class": "fast"}, "line 2: Invalid enum value 'fast'"),
        ({"deadline_s": 0}, r"line 2: Expected `float` > 0\.0 - at `\$\.deadline_s`"),
        ({"outputs": 2}, "line 2: Object contains unknown field `outputs`"),
    ],
)
def test_a_wrong_trace_is_named_by_line_and_key(tmp_path, changes, message):
    right = {"at": 0.5, "prompt_tokens": 20, "output_tokens": 3}
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(right) + "\n" + json.dumps(right | changes) + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(path)
    assert caught.value.param == "trace"


def test_a_torn_trace_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 1, "prompt_tokens": 5')
    with pytest.raises(ConfigError, match="line 1: Input data was truncated"):
        read_trace(path)


def test_a_trace_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"which cannot be read: No such file"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(tmp_path / "empty")
