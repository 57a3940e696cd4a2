"""Tests of StepCost on steps that were measured on an H200 with llama-8b (2026-12-01, random weights, synchronous steps).

A line of the data is a JSON list: decodes, tokens of KV that the decodes read, [start, tokens] of each chunk of a prompt, and
microseconds.
"""

import json
import random
from pathlib import Path
from statistics import median

import pytest

from engine.config import SchedulerConfig
from engine.scheduler.cost_file import load_costs
from engine.scheduler.limits import StepShape
from engine.scheduler.step_cost import StepCost
from server.bench.cost import Observation, fit

STEPS = Path(__file__).parent / "data" / "h200-llama-8b-steps.jsonl"
H200_FILE = Path(__file__).resolve().parents[4] / "loadtest" / "costs" / "h200-llama-8b-bf16.json"
SIZES = SchedulerConfig(max_num_seqs=256, max_step_tokens=8192)
MOST_ERROR = 0.1  # median relative error


def observation(line: str) -> Observation:
    decodes, kv_tokens, chunks, microseconds = json.loads(line)
    parts = [StepShape(decodes, kv_tokens, 0, 0), *(StepShape.with_chunk(0, 0, num, start) for start, num in chunks)]
    return Observation(StepShape(*map(sum, zip(*parts, strict=True))), microseconds * 1e-6)


@pytest.fixture(scope="module")
def found() -> list[Observation]:
    return [observation(line) for line in STEPS.read_text().splitlines()]


def test_a_table_fitted_to_four_fifths_of_the_steps_predicts_the_others(found):
    fitted = fit(SIZES, found)
    assert (len(found), fitted.held_out) == (880, 176)
    assert fitted.error < MOST_ERROR


def test_the_cost_file_predicts_decodes_and_steps_with_prompts(found):
    table = load_costs(H200_FILE, setting="x").table
    for prompts in (False, True):
        steps = [step for step in found if (step.shape.prompt_tokens > 0) == prompts]
        assert len(steps) > 100
        assert median(abs(table.predict(shape) / seconds - 1) for shape, seconds in steps) < MOST_ERROR


@pytest.mark.parametrize("seed", range(4))
def test_costs_that_are_learnt_while_the_steps_run_are_soon_right(found, seed):
    cost = StepCost.of_size(SIZES.max_num_seqs, SIZES.max_step_tokens)
    errors = []
    for shape, seconds in random.Random(seed).sample(found, len(found)):
        errors.append(abs(cost.predict(shape) / seconds - 1))  # predicted before the step is learnt from
        cost.observe(shape, seconds)
    assert cost.trusted
    assert median(errors[:20]) > MOST_ERROR
    assert median(errors[-200:]) < MOST_ERROR
