"""Tests that a checkpoint's fingerprint changes with whatever changes the KV of the model, and with nothing else."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.weights.fingerprint import fingerprint

TENSORS = {name: np.arange(5000, dtype=np.float32) + i for i, name in enumerate("abc")}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"layers": 3}))
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def of(folder, **changes) -> str:
    return fingerprint(EngineConfig(model=str(folder), **{"dtype": "float32"} | changes))


def test_a_copy_has_the_same_fingerprint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert of(folder) == of(tmp_path / "copy")


@pytest.mark.parametrize("name", TENSORS)
def test_other_values_in_one_tensor_change_it(folder, name):
    before = of(folder)
    save_file(TENSORS | {name: TENSORS[name] * 1.001}, folder / "model.safetensors")
    assert of(folder) != before


def test_another_config_type_or_name_of_a_tensor_changes_it(folder):
    found = {of(folder), of(folder, dtype="bfloat16"), of(folder, load_format="dummy"), of(folder, load_format="dummy", seed=1)}
    tensors = load_file(folder / "model.safetensors")
    save_file({"d" if name == "c" else name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    found.add(of(folder))
    (folder / "config.json").write_text(json.dumps({"layers": 4}))
    found.add(of(folder))
    assert len(found) == 6


def test_a_torn_file_is_refused_by_its_folder(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="cannot be read for its fingerprint"):
        of(folder)
