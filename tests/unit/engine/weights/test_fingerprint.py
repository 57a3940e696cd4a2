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
@pytest.mark.parametrize("at", [0, 1234, -1])
def test_another_value_in_one_tensor_changes_it(folder, name, at):
    before = of(folder)
    changed = TENSORS[name].copy()
    changed[at] += 1
    save_file(TENSORS | {name: changed}, folder / "model.safetensors")
    assert of(folder) != before


def test_a_file_is_read_whole_in_parts(folder, monkeypatch):
    monkeypatch.setattr("engine.weights.fingerprint.PART_BYTES", 4096)
    monkeypatch.setattr("engine.weights.fingerprint.READ_BYTES", 1024)
    file, found, progress = folder / "model.safetensors", set(), []
    content = bytearray(file.read_bytes())
    for at in range(0, len(content), 509):
        content[at] ^= 1
        file.write_bytes(content)
        found.add(fingerprint(EngineConfig(model=str(folder)), lambda: progress.append(1)))
    assert len(found) == len(range(0, len(content), 509))
    assert len(progress) == len(found) * -(-len(content) // 4096)


def test_another_config_type_or_name_of_a_tensor_changes_it(folder):
    found = {of(folder), of(folder, dtype="bfloat16"), of(folder, load_format="dummy"), of(folder, load_format="dummy", seed=1)}
    tensors = load_file(folder / "model.safetensors")
    save_file({"d" if name == "c" else name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    found.add(of(folder))
    (folder / "config.json").write_text(json.dumps({"layers": 4}))
    found.add(of(folder))
    assert len(found) == 6


def test_a_file_that_cannot_be_read_is_refused_by_its_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read for its fingerprint"):
        of(folder)
