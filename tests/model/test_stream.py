"""Tests that the streaming loader loads the same weights as the plain loader. On a CPU it uses no pinned memory and no CUDA
streams."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
import torch
from fp8_checkpoint import to_fp8
from reference import make
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import loader, stream
from engine.weights.files import open_folder

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FILE = "model.safetensors"


def streamed(folder, dtype) -> registry.Model:
    model = registry.build(read_spec(folder), dtype=dtype, device=DEVICE)
    weights, block = model.weights(), model.spec.fp8
    with ExitStack() as stack:
        stored = open_folder(folder, stack)
        scales = loader._check_all(folder, stored, weights, block)
        stream.fill(loader.transfers(stored, scales, weights, block), DEVICE)
    return model


def plain(folder, dtype) -> registry.Model:
    model = registry.build(read_spec(folder), dtype=dtype, device=CPU)
    loader.load(model, folder)
    return model


@pytest.mark.parametrize("piece", [stream.PIECE, 1000, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "deepseek-v3", "fp8"])
def test_streamed_weights_equal_those_of_the_plain_loader(kind, dtype, piece, tmp_path, monkeypatch):
    """The cases cover weights that are copied unchanged, converted to another type, or scaled. Files are read in one piece, in
    several pieces, or in pieces that end within a number."""
    if kind == "fp8":
        to_fp8(tmp_path, make("qwen3", tmp_path, hidden_size=136, intermediate_size=200, num_hidden_layers=1))
    else:
        make(kind, tmp_path, num_hidden_layers=2)
    monkeypatch.setattr(stream, "PIECE", piece if piece > 100 or kind == "llama" else 333)
    with torch.inference_mode():
        found, wanted = streamed(tmp_path, dtype), plain(tmp_path, dtype)
        for (name, a), b in zip(found.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(a.cpu(), b), name


def transfer(folder, target, **changed):
    save_file({"first": torch.ones(3, dtype=torch.uint8), "x": torch.arange(12.0).view(3, 4)}, folder / FILE)
    at = stream.offsets(folder / FILE)["x"]
    return stream.Transfer(target, (stream.Source("x", folder / FILE, at, (3, 4), torch.float32)._replace(**changed),))


def test_a_target_need_not_be_contiguous(tmp_path):
    whole = torch.zeros(4, 6)
    stream.fill([transfer(tmp_path, whole[:, ::2].T)], CPU)
    assert torch.equal(whole[:, ::2].T, torch.arange(12.0).view(3, 4))
    assert not whole[:, 1::2].any()


def test_a_file_that_was_cut_short_after_its_check_is_refused(tmp_path):
    cut = transfer(tmp_path, torch.zeros(3, 4))
    os.truncate(tmp_path / FILE, cut.sources[0].offset + 5)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor x cannot be read: the file ends before it"):
        stream.fill([cut] * 20, CPU)


def test_an_error_of_the_operating_system_is_reported(tmp_path):
    wrong = transfer(tmp_path, torch.zeros(3, 4), offset=-100)
    with pytest.raises(CheckpointError, match=r"tensor x cannot be read: .*Invalid argument"):
        stream.fill([wrong], CPU)


def test_offsets_are_those_at_which_safetensors_stores_the_tensors(tmp_path):
    make("llama", tmp_path, num_hidden_layers=1)
    data = (tmp_path / FILE).read_bytes()
    tensors = load_file(tmp_path / FILE)
    for name, offset in stream.offsets(tmp_path / FILE).items():
        assert data[offset : offset + tensors[name].nbytes] == tensors[name].numpy().tobytes(), name
