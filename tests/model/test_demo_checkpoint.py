"""transformers takes the demo checkpoint as a DeepSeek-V3 one, with nothing missing and nothing over."""

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from server.demo import CONFIG, ensure_demo_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ensure_demo_checkpoint(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def loaded(folder):
    return DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)


def test_every_weight_finds_its_place(loaded):
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 4096


def test_greedy_tokens_vary_and_depend_on_the_prompt(folder, loaded):
    model, _ = loaded
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in ("The capital of France is", "The capital of Spain is", "def generate("):
        ids = torch.tensor([tokenizer.encode(prompt)])
        answers.append(model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist())
    assert all(len(set(answer)) > 8 for answer in answers)
    assert len({tuple(answer) for answer in answers}) == 3
    assert all(0 <= token < CONFIG["vocab_size"] for answer in answers for token in answer)
