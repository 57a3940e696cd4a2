"""Tests that the training loop learns, that a resumed run ends with equal bits, and that several processes give the result of
one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_DRAFT, TINY_TIDEPOOL, make, plan, stream

from train import state
from train.distill import Distillation
from train.loop import LOG, Devices, Training
from train.pretrain import BIAS_SPEED, Pretraining

HERE = Path(__file__).parent


def train(run, steps, *, total=None, config=TINY_TIDEPOOL, **changes):
    """Train a tiny model up to step `steps` of a run of `total` steps. Returns the model."""
    model = make(config)
    training = Training(Pretraining(model), plan(total or steps, **changes), stream(), Devices("cpu"), run)
    training.train(until=steps)
    return model


def log(run):
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


def test_it_learns_both_predictions(tmp_path):
    train(tmp_path, 80, lr=1e-2)
    first, last = log(tmp_path)[0], log(tmp_path)[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["second_loss"] < 0.5 * first["second_loss"]
    assert [line["length"] for line in log(tmp_path)] == [16] * 40 + [32] * 40
    assert log(tmp_path)[-1]["tokens"] == 80 * 256


@pytest.mark.parametrize("config", [TINY_TIDEPOOL, TINY_DRAFT])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, config):
    whole = train(tmp_path / "whole", 7, config=config)
    train(tmp_path / "parts", 3, total=7, config=config)
    train(tmp_path / "parts", 5, total=7, config=config)  # steps 4 and 5 are not saved, so they run again
    parts = train(tmp_path / "parts", 7, config=config)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    without_time = [
        [{k: v for k, v in line.items() if k != "tok_s"} for line in log(tmp_path / run)] for run in ("whole", "parts")
    ]
    assert without_time[0] == without_time[1]


def test_the_state_of_another_model_is_refused(tmp_path):
    train(tmp_path, 3, config=TINY_DRAFT)
    with pytest.raises(SystemExit, match="another run"):
        train(tmp_path, 3, config=TINY_TIDEPOOL)


def test_the_state_of_another_plan_is_refused(tmp_path):
    train(tmp_path, 3, total=7)
    with pytest.raises(SystemExit, match=r"plan was .* and is .* now"):
        train(tmp_path, 6, total=7, lr=1e-2)


def test_what_was_spent_adds_up_and_a_run_that_is_done_stays_as_it_is(tmp_path):
    train(tmp_path, 3, total=6)
    before = json.loads((tmp_path / "run.json").read_text())
    train(tmp_path, 6)
    after = (tmp_path / "run.json").read_text()
    assert json.loads(after)["seconds"] > before["seconds"] > 0
    assert (before["steps"], json.loads(after)["steps"]) == (3, 6)
    train(tmp_path, 6)
    assert (tmp_path / "run.json").read_text() == after


def test_two_processes_do_what_one_does(tmp_path):
    alone = train(tmp_path / "alone", 4)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(HERE / "two_processes.py"),
    ]
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    subprocess.run([*command, str(tmp_path / "two")], check=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    together = make(TINY_TIDEPOOL, seed=5)
    state.load_model(tmp_path / "two", together)
    for (name, a), b in zip(alone.state_dict().items(), together.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    for one, two in zip(log(tmp_path / "alone"), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["max_over_mean"] == pytest.approx(one["max_over_mean"], rel=0.1)


def test_experts_with_too_little_become_likelier():
    objective = Pretraining(make(TINY_TIDEPOOL))
    load = torch.full((3, 8), 10.0)
    load[1, 2], load[1, 3] = 30.0, 1.0
    objective.after_step({"load": load}, 0.5)
    biases = [layer.gate.e_score_correction_bias for layer in objective.model.moe_layers()]
    assert biases[0].tolist() == [0.0] * 8
    mean = load[1].mean()
    assert torch.equal(biases[1], 0.5 * BIAS_SPEED * (mean - load[1]).sign())
    assert biases[1][2] < 0 < biases[1][3]


def test_balancing_evens_the_load(tmp_path, monkeypatch):
    train(tmp_path / "balanced", 80, lr=1e-3)
    monkeypatch.setattr("train.pretrain.BIAS_SPEED", 0.0)
    train(tmp_path / "left alone", 80, lr=1e-3)
    balanced, left_alone = (
        sum(line["max_over_mean"] for line in log(tmp_path / run)[-30:]) for run in ("balanced", "left alone")
    )
    assert balanced < 0.95 * left_alone


def test_a_draft_comes_near_its_teacher(tmp_path):
    teacher = train(tmp_path / "teacher", 60, lr=1e-2)
    student = make(TINY_DRAFT, seed=3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    Training(Distillation(student, teacher), plan(80, lr=1e-2), stream(), Devices("cpu"), tmp_path / "draft").train()
    lines = log(tmp_path / "draft")
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert lines[-1]["agreement"] > 0.7
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    model = make(TINY_DRAFT)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(SystemExit, match="lower learning rate"):
        Training(Pretraining(model), plan(2), stream(), Devices("cpu"), tmp_path).train()
