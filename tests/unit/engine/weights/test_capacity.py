"""Weights that do not fit into memory are refused before anything is allocated. Weights that fit are accepted."""

import json

import pytest
import torch

from engine import LLM
from engine.errors import CheckpointError
from engine.models import registry
from engine.models.families import parse_spec
from engine.weights import capacity
from tests.unit.engine.models.test_families import LLAMA, QWEN3_MOE, SMOLLM3, V3

CPU = torch.device("cpu")
MEMINFO = "MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  400 kB\nSwapFree:  100 kB\nHugePages_Total:  0\n"


@pytest.mark.parametrize("config", [LLAMA, SMOLLM3, QWEN3_MOE, V3], ids=lambda c: c["architectures"][0])
def test_weight_bytes_equal_the_bytes_that_the_model_allocates(config):
    spec = parse_spec(config)
    model = registry.build(spec, dtype=torch.bfloat16, device=CPU)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert capacity.weight_bytes(spec, torch.bfloat16) == sum(storages.values())


@pytest.mark.parametrize(
    ("meminfo", "limit", "found"),
    [
        (MEMINFO, "", 500 * 1024),
        (MEMINFO, "max\n", 500 * 1024),
        (MEMINFO, "1000\n", 1000),
        (MEMINFO, "99999999\n", 500 * 1024),
        ("", "1000\n", None),
    ],
)
def test_free_memory_of_the_host_is_the_systems_or_the_containers(meminfo, limit, found):
    assert capacity.host_bytes(meminfo, limit) == found


def test_weights_may_need_exactly_the_free_memory(monkeypatch):
    spec = parse_spec(LLAMA)
    need = capacity.weight_bytes(spec, torch.float32)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: need)
    capacity.check(spec, dtype=torch.float32, device=CPU)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: need - 1)
    with pytest.raises(CheckpointError, match=r"need \d+\.\d GiB as float32, and cpu has \d+\.\d GiB free"):
        capacity.check(spec, dtype=torch.float32, device=CPU)
    capacity.check(spec, dtype=torch.bfloat16, device=CPU)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: None)
    capacity.check(spec, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 1 << 24, "hidden_size": 1 << 18}, {"num_hidden_layers": 1 << 10, "intermediate_size": 1 << 18}],
    ids=["wide", "deep"],
)
@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_a_model_too_large_for_any_machine_is_refused(tmp_path, load_format, changes):
    wide = {"hidden_size": 1 << 14, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | wide | changes))
    with pytest.raises(CheckpointError, match="weights need"):
        LLM(tmp_path, device="cpu", load_format=load_format)


def test_memory_that_torch_has_cached_on_cuda_counts_as_free(monkeypatch):
    figures = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 20}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    assert capacity.free_bytes(torch.device("cuda")) == 130
