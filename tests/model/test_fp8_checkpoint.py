"""Tests that a model from a block-scaled FP8 checkpoint has the logits that transformers computes with the dequantised
weights."""

from __future__ import annotations

import pytest
import torch
from fp8_checkpoint import to_fp8
from paged import PagedRun, random_sequences
from reference import VOCAB, make, reference_logits
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import loader

# With these sizes, each matrix has more than one FP8 block, and no size is a multiple of 128.
WIDE = {"hidden_size": 136, "intermediate_size": 200, "moe_intermediate_size": 144, "num_hidden_layers": 2}


def load(folder) -> registry.Model:
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(model, folder)
    return model


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3", "minimax-m2", "glm4-moe"])
def test_logits_equal_transformers_on_the_dequantised_weights(name, tmp_path):
    sizes = WIDE if name in ("deepseek-v3", "glm4-moe") else {"hidden_size": 136, "intermediate_size": 200, "head_dim": 40}
    reference = make(name, tmp_path, initializer_range=0.05, **sizes)
    assert to_fp8(tmp_path, reference) > 10
    sequences = random_sequences(VOCAB, (9, 30))
    for tokens, logits in zip(sequences, PagedRun(load(tmp_path), sequences).run(num_decoded=4), strict=True):
        torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=0.0)


def test_scale_of_the_wrong_shape_is_named(tmp_path):
    to_fp8(tmp_path, make("deepseek-v3", tmp_path, **WIDE))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    save_file(tensors | {name: torch.ones(1, 1)}, file)
    with pytest.raises(CheckpointError, match=rf"{name}.*\[1, 1\].*\[2, 2\]"):
        load(tmp_path)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"down_proj.weight is F8_E4M3, but its scales \({name}\)"):
        load(tmp_path)
