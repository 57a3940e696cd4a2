"""Tests the table and the JSON lines of `tidegate bench kernels` with made-up measurements."""

import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from engine.errors import ConfigError
from server.bench import kernels


class Case(NamedTuple):
    kernel: str
    shape: str


CASES = (Case("decode", "1 row"), Case("decode", "64 rows"), Case("norm", "1 row"))
TIMING = SimpleNamespace(seconds=2e-6, num_bytes=4_000_000, operations=1_000_000)


@pytest.fixture
def device(monkeypatch):
    """Replace the measurements by those of a made-up device on which each kernel takes 1.5 times the least possible time. Returns
    the replaced modules by name."""
    modules = {
        "engine.kernels.hardware": SimpleNamespace(name=lambda: "a GPU", measure=lambda: (3e12, 1e15)),
        "engine.kernels.bench": SimpleNamespace(CASES=CASES, measure=lambda case: TIMING),
    }
    monkeypatch.setattr(kernels.importlib, "import_module", modules.__getitem__)
    return modules


def test_each_case_gives_a_row_and_a_line(device, capsys, tmp_path):
    kernels.run(record=tmp_path / "lines.jsonl")
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [(line["kernel"], line["shape"]) for line in found] == list(CASES)
    assert found[0]["bound_share"] == pytest.approx(4e6 / 3e12 / 2e-6, abs=0.001)
    assert (found[0]["seconds"], found[0]["bytes_s"], found[0]["device"]) == (2e-6, 2e12, "a GPU")
    assert (tmp_path / "lines.jsonl").read_text() == out
    assert "a GPU: 3.00 TB/s, 1000 TFLOP/s in bfloat16" in err
    assert err.count("67%") == 3


def test_kernels_are_chosen_by_name(device):
    assert [line.kernel for line in kernels.run(["norm"])] == ["norm"]
    with pytest.raises(ConfigError, match="kernel is 'nrom': it must be one of decode, norm"):
        kernels.run(["nrom"])


def test_a_machine_without_a_cuda_device_is_refused(device):
    device["engine.kernels.hardware"].name = lambda: None
    with pytest.raises(ConfigError, match="needs a CUDA device, and torch finds none"):
        kernels.run()
