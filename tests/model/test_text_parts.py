"""The text models inside models that also see images: their tensors have a prefix, and other parts are left out by name."""

from __future__ import annotations

import json
import shutil
from typing import Any

import oddities
import pytest
import torch
import transformers
from oddities import TOKENS, ours, scores
from safetensors.torch import load_file, save_file

TEXT = oddities.HEADS | {"pad_token_id": None}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_SMALL = QWEN_VISION | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN2_TEXT = oddities.SIZES | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}}
WRAPPED: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": VISION | {"model_type": "pixtral", "patch_size": 14, "head_dim": 8},
    },
    "mistral3-ministral3": {
        "text_config": TEXT | {"model_type": "ministral3"},
        "vision_config": VISION | {"model_type": "pixtral", "patch_size": 14, "head_dim": 8},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 16},
    },
    "qwen2_vl": {"text_config": QWEN2_TEXT, "vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 32}},
    "qwen2_5_vl": {
        "text_config": QWEN2_TEXT,
        "vision_config": QWEN_SMALL,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": QWEN_SMALL | {"deepstack_visual_indexes": [0]},
    },
}


@pytest.fixture(scope="module", params=WRAPPED)
def saved(request, tmp_path_factory):
    """Return a folder and transformers' log-probabilities."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param.split("-")[0], tie_word_embeddings=False, **WRAPPED[request.param])
    config.text_config.tie_word_embeddings = False
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "norm" in name else 0.3 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return folder, scores(model(input_ids=torch.tensor([TOKENS])).logits[0])


@pytest.fixture
def wrapped(saved, tmp_path):
    """Return a copy of the folder that a test may change, and transformers' log-probabilities."""
    return shutil.copytree(saved[0], tmp_path / "copy"), saved[1]


def rename(folder, pairs: dict[str, str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for old, new in pairs.items():
        tensors = {(new + name.removeprefix(old)) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_text_model_is_served_and_other_parts_are_reported(wrapped, caplog):
    folder, wanted = wrapped
    with caplog.at_level("INFO", logger="tidegate.engine"):
        found = ours(folder)
    assert found.error is None, found.error
    torch.testing.assert_close(found.logprobs, wanted, atol=1e-4, rtol=0.0)
    assert "tensors are not used: " in caplog.text
    assert "(parts other than text)" in caplog.text
    assert "only the text model of" in found.notes


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_the_text_may_have_any_of_the_usual_prefixes(wrapped, prefix):
    folder, wanted = wrapped
    rename(folder, {"language_model.model.": "TEXT.", "model.language_model.": "TEXT.", "language_model.lm_head.": "lm_head."})
    rename(folder, {"model.layers.": "TEXT.layers.", "model.embed_tokens.": "TEXT.embed_tokens.", "model.norm.": "TEXT.norm."})
    rename(folder, {"TEXT.": prefix})
    if prefix.startswith("language_model"):
        rename(folder, {"lm_head.": "language_model.lm_head."})
    torch.testing.assert_close(ours(folder).logprobs, wanted, atol=1e-4, rtol=0.0)


def test_a_tensor_of_the_text_that_is_not_computed_is_refused(wrapped):
    folder, _ = wrapped
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight")).replace("weight", "lora")
    save_file(tensors | {name: torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"tensor {name} is unexpected" in ours(folder).error.message


def test_a_plain_architecture_may_have_the_prefix_too(tmp_path):
    plain = oddities.make("ministral3", tmp_path / "plain")
    wanted = ours(plain).logprobs
    rename(plain, {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."})
    assert json.loads((plain / "config.json").read_text())["architectures"] == ["Ministral3ForCausalLM"]
    assert torch.equal(ours(plain).logprobs, wanted)
