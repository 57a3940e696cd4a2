"""Tests lm_eval's model `local-completions`, which sends token ids: its log-likelihoods are those that transformers computes."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.clients import install
from tests.clients.cases import MODEL, Case
from tests.model.fp8_checkpoint import load_in_transformers
from tests.support.children import ROOT

pytestmark = pytest.mark.environment("lm_eval")

TASKS = "tests/clients/lm_eval_tasks"


@pytest.fixture(scope="module")
def samples(server, execute, tmp_path_factory):
    """Run all tasks once. Returns a function from the name of a task to lm_eval's record of its documents."""
    out = tmp_path_factory.mktemp("lm_eval")
    model = f"base_url={server.url}/v1/completions,model={MODEL},tokenized_requests=True,num_concurrent=4,max_retries=1"
    command = [str(install.program("lm_eval", "lm_eval")), "run", "--model", "local-completions", "--model_args", model]
    tasks = ["--tasks", "tidegate_choices,tidegate_rolling,tidegate_generate", "--include_path", TASKS]
    execute([*command, *tasks, "--log_samples", "--output_path", str(out)], HF_HOME=str(out / "cache"), HF_HUB_OFFLINE="1")

    def samples(task):
        (file,) = out.glob(f"*/samples_{task}_*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

    return samples


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / MODEL)


@pytest.fixture(scope="module")
def score(tokenizer, tmp_path_factory):
    """Return a function that scores the tokens after the first `given` ones with transformers. It returns (the sum of their
    log-probabilities, whether each is the argmax)."""
    model, _ = load_in_transformers(ROOT / MODEL, tmp_path_factory.mktemp("plain"))

    def score(tokens, given):
        with torch.inference_mode():
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[given - 1 : -1]
        scored = torch.tensor(tokens[given:])
        chosen = logprobs.gather(1, scored[:, None]).sum().item()
        return chosen, bool((logprobs.argmax(-1) == scored).all())

    return score


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_likelihoods_of_choices_are_those_of_transformers(samples, tokenizer, score):
    greedy = []
    for sample in samples("tidegate_choices"):
        context = encode(tokenizer, sample["doc"]["context"].rstrip())  # lm_eval counts the spaces between to the choice
        for choice, [[logprob, is_greedy]] in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            wanted, argmax = score(encode(tokenizer, sample["doc"]["context"] + choice), len(context))
            assert float(logprob) == pytest.approx(wanted, abs=1e-3)
            assert is_greedy == str(argmax)
            greedy.append(argmax)
    assert len(greedy) == 18
    assert any(greedy), "no choice is what the model would say: the test would not notice a wrong argmax"
    assert not all(greedy)


def test_likelihoods_of_whole_texts_are_those_of_transformers(samples, tokenizer, score):
    for sample in samples("tidegate_rolling"):
        wanted, _ = score([tokenizer.bos_token_id, *encode(tokenizer, sample["target"])], 1)
        assert float(sample["resps"][0][0]) == pytest.approx(wanted, abs=1e-3)


def test_generated_texts_are_those_of_plain_http(samples, tokenizer, raw):
    for sample in samples("tidegate_generate"):
        tokens = encode(tokenizer, sample["doc"]["context"])
        body = {"prompt": tokens, "max_tokens": 16, "temperature": 0, "stop": ["\n\n"]}
        (choice,) = raw.answer(Case("completion", body))["choices"]
        assert sample["resps"][0][0] == choice["text"]
