"""Tests of the probe, which finds checkpoints and settings that the engine would refuse, without reading weights."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from engine.config import CacheConfig, EngineConfig
from engine.weights.probe import problem_with, torch_facts
from tests.support.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def model(demo, tmp_path):
    return Path(shutil.copytree(demo, tmp_path / "model"))


def problem(folder, **options):
    return problem_with(EngineConfig(model=str(folder), device="cpu", **options))


def test_a_whole_checkpoint_has_no_problem(model):
    assert problem(model) is None


def test_a_file_that_is_cut_short_is_reported(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors: not a complete safetensors file" in problem(model)
    assert problem(model, load_format="dummy") is None


@pytest.mark.parametrize(
    ("change", "message"), [("drop", "1 tensors are missing"), ("cut", "has shape [63]"), ("add", "is unexpected")]
)
def test_tensors_that_the_model_cannot_load_are_reported(model, change, message):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_layernorm.weight"
    if change == "drop":
        del tensors[name]
    elif change == "cut":
        tensors[name] = tensors[name][1:]
    else:
        tensors["model.layers.0.extra"] = tensors[name]
    save_file(tensors, model / "model.safetensors")
    assert message in problem(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": CacheConfig(host_bytes=5)}, "host_bytes is 5, but one block of the KV cache has"),
        ({"cache": CacheConfig(num_blocks=2), "max_model_len": 129}, "max_model_len is 129, but the KV cache holds 128 tokens"),
        ({"max_model_len": 5000}, "but the model was made for 4096 tokens at most"),
    ],
)
def test_impossible_settings_are_reported(model, options, message):
    assert message in problem(model, **options)


def test_torch_facts_are_version_cuda_and_devices():
    assert set(torch_facts()) == {"version", "cuda", "devices"}
