"""Tests that a streamed completion is the whole one: text, log-probabilities, and where the text of each token begins."""

import json

import msgspec
import pytest

from server.text.tokenizer import Tokenizer
from tests.support.http_api import http_api
from tests.support.local_engine import LIMITS, LocalEngine
from tests.support.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.server.text.tokenizers_for_tests import llama2_by_words

PROMPTS = {
    "text": "a🐟bc <|user|> été",
    "ids": [0, 70, 3, 71, 200],
    "several": ["The tide", "a🐟"],
    "several ids": [[5, 6], [300, 3]],
}
FIELDS = [
    {},
    {"echo": True},
    {"echo": True, "max_tokens": 0},
    {"echo": True, "max_tokens": 1, "prompt_logprobs": 1},
    {"n": 2, "echo": True},
    {"skip_special_tokens": False, "echo": True},
    {"stop": ["e", "a<|user|>"]},
    {"stop": ["e", "a<|user|>"], "echo": True, "include_stop_str_in_output": True},
    {"truncate_prompt_tokens": 2, "echo": True},
    {"allowed_token_ids": [3, 75, 180, 181], "temperature": 1, "seed": 3, "stop": ["<|user|><|user|>"], "max_tokens": 40},
]
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tokenizer.from_folder(write_tiny_checkpoint(tmp_path_factory.mktemp("demo")))


async def answers(api, body):
    """Return the choices of the whole answer and of the streamed one, each as index -> (text, columns, finish_reason)."""
    whole = (await api.http.post("/v1/completions", json=body)).json()["choices"]
    streamed = (await api.http.post("/v1/completions", json={**body, "stream": True})).text.split("\n\n")
    events = [json.loads(event[6:]) for event in streamed if event.startswith("data: {")]
    joined = {}
    for choice in (choice for event in events for choice in event["choices"]):
        text, columns, _ = joined.setdefault(choice["index"], ["", {name: [] for name in COLUMNS}, None])
        for name in COLUMNS:
            columns[name] += (choice["logprobs"] or {}).get(name, [])
        joined[choice["index"]] = [text + choice["text"], columns, choice["finish_reason"]]
    return {c["index"]: [c["text"], c["logprobs"], c["finish_reason"]] for c in whole}, joined


@pytest.mark.parametrize("logprobs", [0, 2])
@pytest.mark.parametrize("kind", ["byte level", "SentencePiece"])
async def test_streamed_and_whole_completions_agree(tiny, kind, logprobs):
    text = tiny if kind == "byte level" else llama2_by_words()
    engine = LocalEngine(limits=msgspec.structs.replace(LIMITS, vocab_size=text.vocab_size))
    async with http_api(text, engine=engine) as api:
        for name, prompt in PROMPTS.items():
            for fields in FIELDS:
                body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": logprobs, "ignore_eos": True, **fields}
                whole, streamed = await answers(api, body)
                assert streamed == whole, (name, fields)
                for text, columns, _ in whole.values():
                    offsets = columns["text_offset"]
                    assert offsets == sorted(offsets)
                    assert all(0 <= offset <= len(text) for offset in offsets)
                    assert len({len(columns[column]) for column in COLUMNS}) == 1


async def test_offsets_follow_the_echoed_prompt(tiny):
    async with http_api(tiny) as api:
        body = {"prompt": "a<|user|>b", "max_tokens": 0, "echo": True, "logprobs": 0}
        [choice] = (await api.http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["text"] == "a<|user|>b"
        assert choice["logprobs"]["tokens"] == ["<|begin|>", "a", "<|user|>", "b"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 9]
        hidden = {**body, "prompt": [0, *tiny.encode("a<|user|>b", add_special_tokens=False)]}
        for skip, text, offsets in ((True, "ab", [0, 0, 1, 1]), (False, "<|begin|>a<|user|>b", [0, 9, 10, 18])):
            [choice] = (await api.http.post("/v1/completions", json={**hidden, "skip_special_tokens": skip})).json()["choices"]
            assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)
