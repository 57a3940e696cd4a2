"""Tests that every way to load weights reports progress piece by piece, so that a long load does not look like a hanging
start."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from reference import make

from engine.config import EngineConfig
from engine.core import build_core
from engine.models import registry
from engine.models.families import read_spec
from engine.startup import StartupClock
from engine.weights import dummy, loader, stream
from engine.weights.files import open_folder

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    make("llama", tmp_path, num_hidden_layers=2)
    return registry.build(read_spec(tmp_path), dtype=torch.float32, device=CPU)


def test_the_plain_loader_reports_each_tensor(model, tmp_path):
    reports = []
    loader.load(model, tmp_path, lambda: reports.append(None))
    assert len(reports) == len(model.weights().targets)


def test_the_streamed_loader_reports_each_piece(model, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 1000)
    reports, weights = [], model.weights()
    with ExitStack() as stack:
        stored = open_folder(tmp_path, stack)
        scales = loader._check_all(tmp_path, stored, weights, None)
        stream.fill(loader.transfers(stored, scales, weights, None), CPU, lambda: reports.append(None))
    assert len(reports) == sum(-(-target.nbytes // 1000) for target in weights.targets.values()) > len(weights.targets)


def test_random_weights_report_each_parameter(model):
    reports = []
    with torch.inference_mode():
        dummy.fill(model, seed=0, progress=lambda: reports.append(None))
    assert len(reports) == len(list(model.parameters()))


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_a_whole_start_reports_the_load_between_its_phases(tmp_path, monkeypatch, load_format):
    make("llama", tmp_path, num_hidden_layers=2)
    monkeypatch.setattr("engine.startup.PROGRESS_SECONDS", 0.0)
    reports = []

    def report():
        reports.append(len(clock.seconds))

    clock = StartupClock(report=report)
    build_core(EngineConfig(model=str(tmp_path), device="cpu", max_model_len=64, load_format=load_format), clock).close()
    during_load = list(clock.seconds).index("weights")  # number of phases that had ended when the weights were loaded
    assert reports.count(during_load) > 10
    assert set(reports) == set(range(1, len(clock.seconds) + 1)) | {during_load}
