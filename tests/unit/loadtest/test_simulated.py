"""Tests of the study in simulation: its parts run, and each result is a row and a line of JSON."""

import json
import sys

import pytest

from engine.scheduler.cost_file import load_costs
from engine.scheduler.limits import StepShape
from loadtest import simulated
from server.bench.simulate import Machine

BASE = Machine(simulated.COSTS)


def test_results_are_rows_and_lines_of_json(tmp_path, capsys, monkeypatch):
    record = tmp_path / "lines.jsonl"
    monkeypatch.setattr(simulated, "RATES", (20,))
    words = ["--part", "rates", "--seconds", "3", "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["simulated", *words])
    simulated.main()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(lines) == len(capsys.readouterr().out.splitlines()) == 10
    assert [line["policy"] for line in lines] == ["fixed 64", "fixed 256", "aimd", "model", "auto, no file"] * 2
    assert {line["workload"] for line in lines} == {"rates"}
    assert all(0 < line["goodput"] <= line["sent_s"] for line in lines)


def test_a_step_of_load_has_three_parts_for_each_policy():
    rows = list(simulated.load_steps(BASE, 12.0))
    assert [row["rate"] for row in rows] == [10, 80, 10] * 5
    model = [row for row in rows if row["policy"] == "model"]
    assert all(row["p99_step_ms"] < 50 for row in model)
    assert model[0]["limits"][0]["at"] < 1


def test_a_burst_is_served_nearly_as_fast_without_a_cost_file():
    rows = list(simulated.burst(BASE, 0.0))
    for device, num_prompt in (("25 ms", 6), (BASE.costs.stem, 6), (BASE.costs.stem, 400)):
        found = {row["policy"]: row for row in rows if (row["device"], row["prompt_tokens"]) == (device, num_prompt)}
        assert found["auto, no file"]["out_tok_s"] > 0.9 * found["fixed 256"]["out_tok_s"] > 1.4 * found["fixed 64"]["out_tok_s"]
        assert 0 < found["auto, no file"]["below_256_places_until_s"] < 1


def test_a_long_prompt_is_compared_with_its_time_alone():
    rows = {row["policy"]: row for row in simulated.long_prompt(BASE, 0.0)}
    assert rows["model"]["streams_itl_p99_ms"] < 50 < rows["fixed 256"]["streams_itl_p99_ms"]
    assert 1 <= rows["model"]["ratio"] <= 3.5  # its chunks are short, and pairs of short chunks are dear


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_table_is_scaled_as_a_whole(factor):
    table = load_costs(simulated.COSTS, setting="costs").table
    found = simulated.scaled(table, factor)
    for shape in (StepShape(50, 9000, 0, 0), StepShape(50, 9000, 700, 40_000)):
        assert found.predict(shape) == pytest.approx(factor * table.predict(shape))
