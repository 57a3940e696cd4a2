"""Tests real servers whose checkpoints say how they stop and are sampled, or hold NaN."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support import plain_http
from tests.support.children import ServerChild, wait_until
from tests.support.tiny_checkpoint import write_tiny_checkpoint

GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 1,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [9],
    "num_beams": 1,
}


def rewrite(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def post(server, path="/v1/generate", **body):
    return plain_http.post(server.url + path, json={"prompt": "The tide", "max_tokens": 4, **body}, timeout=60)


def outputs(server, **body):
    return post(server, **body).json()["outputs"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose config names token 0 as the end token, whose tokenizer names 1, and whose template writes 2 after a turn."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("demo"))
    rewrite(folder / "config.json", eos_token_id=0)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    template = "{% for m in messages %}<|user|>{{ m.content }}<|system|>{% endfor %}"
    rewrite(folder / "tokenizer_config.json", chat_template=template)
    with ServerChild(runner="torch", model=folder) as child:
        yield child


@pytest.mark.parametrize("token", [0, 1, 2])
def test_every_end_token_ends_an_output(server, token):
    forced = {"logit_bias": {str(token): 100}}
    [output] = outputs(server, **forced)
    assert (output["token_ids"], output["text"], output["finish_reason"]) == ([token], "", "stop")
    assert outputs(server, **forced, ignore_eos=True)[0]["token_ids"] == [token] * 4
    assert token not in outputs(server, **forced, min_tokens=4)[0]["token_ids"]


def test_a_stop_string_that_is_a_special_token_ends_an_output(server):
    [output] = outputs(server, logit_bias={"3": 100}, stop=["<|user|>"])
    assert (output["token_ids"], output["text"], output["stop_reason"]) == ([3], "", "<|user|>")


def test_the_authors_top_k_makes_all_answers_one(server):
    assert len({tuple(outputs(server)[0]["token_ids"]) for _ in range(3)}) == 1
    assert len({tuple(outputs(server, top_k=-1, temperature=2)[0]["token_ids"]) for _ in range(3)}) > 1


def test_a_token_that_the_author_suppresses_is_never_generated(server):
    assert outputs(server, allowed_token_ids=[9, 10], logit_bias={"9": 50})[0]["token_ids"] == [10] * 4


def test_bad_words_and_allowed_tokens_restrict_the_real_sampler(server):
    assert outputs(server, allowed_token_ids=[77])[0]["token_ids"] == [77] * 4
    word = plain_http.post(server.url + "/tokenize", json={"prompt": "tide", "add_special_tokens": False}).json()["tokens"]
    fields = {"allowed_token_ids": [*word, 300], "max_tokens": 60, "top_k": -1, "seed": 4, "temperature": 20}
    [free], [bound] = outputs(server, **fields), outputs(server, **fields, bad_words=["tide"])
    assert len(word) > 1
    assert "tide" in free["text"]
    assert "tide" not in bound["text"]


def test_a_request_whose_own_fields_exclude_every_token_is_refused(server):
    answer = post(server, allowed_token_ids=[0, 1], min_tokens=2)
    assert answer.status_code == 400
    said = "allowed_token_ids, bad_words and min_tokens together exclude every token that could be output token 1"
    assert answer.json()["error"]["message"].startswith(said)


def test_the_outputs_of_neighbouring_seeds_are_independent(server):
    found = [outputs(server, seed=seed, n=3, top_k=0, temperature=1) for seed in (7, 8)]
    assert len({tuple(output["token_ids"]) for each in found for output in each}) == 6


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_is_scored(server, max_tokens):
    body = {"echo": True, "logprobs": 0, "max_tokens": max_tokens, "temperature": 0}
    [choice] = post(server, "/v1/completions", prompt="a🐟bc", **body).json()["choices"]
    assert choice["text"].startswith("a🐟bc")
    found = choice["logprobs"]
    assert found["text_offset"][:6] == [0, 0, 1, 1, 1, 1]
    assert found["text_offset"][6:] == [2, 3, 4][: len(found["text_offset"]) - 6]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"])
    assert [None if top is None else list(top.values()) for top in found["top_logprobs"]] == [
        None if logprob is None else [logprob] for logprob in found["token_logprobs"]
    ]


def test_the_log_says_how_the_model_stops_and_is_sampled(server):
    text = "\n".join(line["message"] for line in server.lines)
    assert "an output ends at these tokens: '<|begin|>' (0: config), '<|end|>' (1: tokenizer_config.json), '<|system|>'" in text
    assert "generation_config.json: temperature 0.6, top_k 1; set generation_config to off" in text
    assert "asks for what this server does not do, so answers may differ from its author's: no_repeat_ngram_size" in text
    assert plain_http.get(server.url + "/v1/models").json()["data"][0]["default_sampling_params"] == {
        "temperature": 0.6,
        "top_k": 1,
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_weights_with_nan_are_an_error_and_a_log_line(nan_server, stream, max_tokens):
    for path, more in (("/v1/generate", {}), ("/v1/completions", {"echo": True, "logprobs": 1})):
        answer = post(nan_server, path, stream=stream, temperature=0, max_tokens=max_tokens, **more)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    said = "a request's logits are not finite (NaN or infinity): the request is ended"
    wait_until(lambda: nan_server.said(said), "the failure is in the log")


@pytest.fixture(scope="module")
def nan_server(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("nan"))
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    # In a vector NaN is refused at start (tests/model/test_oddities.py). A matrix is not searched.
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], np.nan)
    save_file(tensors, path)
    with ServerChild(runner="torch", model=folder, generation_config="off") as child:
        yield child
